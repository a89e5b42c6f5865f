"""The parameters of a request: ``shard``, ``confirm`` and ``bot``."""

from __future__ import annotations

import re
from http import HTTPStatus
from urllib.parse import parse_qsl

from gateway_queue.web.problems import RequestError

SHARD_MAX = 2**31 - 1
"""Shard ids have 32 bits in every library that we know; a larger number is a client's mistake."""

PARAMETERS_MAX = 100
"""Parameters of a request. To read thousands of them takes long."""

SHARD_ALONE = re.compile(rb"shard=([0-9]{1,9})")
"""A query without other parameters, which is read without parsing it."""


class BadParameter(RequestError):
    """A parameter of a request is not valid."""

    status = HTTPStatus.BAD_REQUEST


def asked_for(query: bytes) -> tuple[int | None, bool]:
    """Return the shard of a raw query string (or None), and whether the client will confirm.

    Raises:
      BadParameter: ``shard`` is not one whole number from 0 to ``SHARD_MAX``, or ``confirm`` is
        neither true nor false, or is true without a shard.
    """
    if b"shard" not in query and b"confirm" not in query and b"%" not in query:
        return None, False
    if alone := SHARD_ALONE.fullmatch(query):
        return int(alone[1]), False
    parameters = _parameters(query)
    shard = _shard(parameters)
    confirm = _one("confirm", {_switch(value) for name, value in parameters if name == "confirm"})
    if confirm and shard is None:
        raise BadParameter("confirm=true needs shard=N: the queue has to know which shard confirms")
    return shard, bool(confirm)


def shard_in(query: bytes) -> int | None:
    """Return the shard of a raw query string, or None.

    Raises:
      BadParameter: ``shard`` is not one whole number from 0 to ``SHARD_MAX``.
    """
    return _shard(_parameters(query))


def bots_in(query: bytes) -> set[str]:
    """Read the names of bots in a raw query string."""
    if b"bot" not in query and b"%" not in query:
        return set()
    return {value for name, value in _parameters(query) if name == "bot"}


def _parameters(query: bytes) -> list[tuple[str, str]]:
    try:
        return parse_qsl(
            query.decode("latin-1"), keep_blank_values=True, max_num_fields=PARAMETERS_MAX
        )
    except ValueError:
        raise BadParameter(f"there are more than {PARAMETERS_MAX} parameters") from None


def _shard(parameters: list[tuple[str, str]]) -> int | None:
    return _one("shard", {shard_number(value) for name, value in parameters if name == "shard"})


def _one(name: str, values: set[int]) -> int | None:
    if len(values) > 1:
        raise BadParameter(f"{name} is given twice, with different values")
    return values.pop() if values else None


def _switch(text: str) -> bool:
    if text not in {"true", "false"}:
        raise BadParameter(f"confirm must be true or false, not {text[:50]!r}")
    return text == "true"


def shard_number(text: str) -> int:
    """Read a shard.

    Raises:
      BadParameter: it is not a whole number from 0 to ``SHARD_MAX``.
    """
    # int() also accepts other characters than digits, and fails for thousands of digits.
    if not re.fullmatch("[0-9]{1,100}", text, re.ASCII) or int(text) > SHARD_MAX:
        raise BadParameter(f"shard must be a whole number from 0 to {SHARD_MAX}, not {text[:50]!r}")
    return int(text)
