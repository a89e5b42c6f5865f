"""The ``shard`` parameter of a ticket request."""

from __future__ import annotations

import re
from http import HTTPStatus
from urllib.parse import parse_qsl

from gateway_queue.web.problems import Refused

SHARD_MAX = 2**31 - 1
"""Shard ids are 32-bit in every library that we know; more is a mistake of the caller."""


class BadShard(Refused):
    """The query names no shard that there could be."""

    status = HTTPStatus.BAD_REQUEST


def shard_of(query: bytes) -> int | None:
    """Read the shard from a raw query string, None if it names none.

    Raises:
      BadShard: it is not one whole number from 0 to ``SHARD_MAX``.
    """
    if b"=" not in query and b"shard" not in query:
        return None
    shards = {
        _whole_number(value)
        for name, value in parse_qsl(query.decode("latin-1"), keep_blank_values=True)
        if name == "shard"
    }
    if len(shards) > 1:
        raise BadShard("shard is given twice, with different values")
    return shards.pop() if shards else None


def _whole_number(text: str) -> int:
    # Ten digits are enough for SHARD_MAX, and int() takes far more than digits.
    if not re.fullmatch("0*[0-9]{1,10}", text, re.ASCII) or int(text) > SHARD_MAX:
        raise BadShard(f"shard takes a whole number from 0 to {SHARD_MAX}, got {text[:50]!r}")
    return int(text)
