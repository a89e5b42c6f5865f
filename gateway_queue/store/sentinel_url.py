"""The URL of a primary that sentinels name. This module does not import the Redis client."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote

SCHEME = "redis+sentinel://"

PORT = 26379

_URL = re.compile(
    re.escape(SCHEME)
    + r"(?:(?P<username>[^:@/?#]*):(?P<password>[^@/?#]*)@)?"
    + r"(?P<sentinels>[^@/?#]+)/(?P<service>[A-Za-z0-9._-]+)(?:/(?P<database>[0-9]{1,9}))?",
    re.ASCII,
)

_SENTINEL = re.compile(r"(?P<host>[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\])(?::(?P<port>[0-9]{1,5}))?")


@dataclass(frozen=True)
class SentinelUrl:
    """``redis+sentinel://[USER:PASSWORD@]HOST:PORT,HOST:PORT/SERVICE[/DATABASE]``."""

    sentinels: tuple[tuple[str, int], ...]
    """The host and port of each sentinel."""
    service: str
    """The name that the sentinels have for the primary and its replicas."""
    database: int
    username: str | None
    password: str | None


def parse_sentinel_url(text: str) -> SentinelUrl:
    """Read a URL.

    Raises:
      ValueError: the text does not have the form of :class:`SentinelUrl`.
    """
    url = _URL.fullmatch(text)
    if url is None:
        raise ValueError(text)
    return SentinelUrl(
        sentinels=tuple(map(_sentinel, url["sentinels"].split(","))),
        service=url["service"],
        database=int(url["database"] or 0),
        username=unquote(url["username"] or "") or None,
        password=unquote(url["password"] or "") or None,
    )


def _sentinel(text: str) -> tuple[str, int]:
    sentinel = _SENTINEL.fullmatch(text)
    port = int(sentinel["port"] or PORT) if sentinel else 0
    if sentinel is None or not 0 < port < 65536:
        raise ValueError(text)
    return sentinel["host"].strip("[]"), port
