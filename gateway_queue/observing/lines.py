"""Processes log lines before they are written: drops frequent lines, and cleans the others."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import structlog
from structlog.typing import EventDict, WrappedLogger

SELDOM_SECONDS = 10.0
"""Each line that any client can cause is written at most once in this time."""

SELDOM = frozenset(
    {
        "refused",
        "client too slow to read its answer; connection closed",
        "connection closed after an error",
        "request without ?shard=, treated as shard 0",
        "the store is too slow to release tickets",
        "too few descriptors for all tickets: raise the limit of open files",
    }
)

LONGEST_VALUE, LONGEST_TEXT = 300, 8000
"""Characters of a value, and of a line or a traceback."""


@dataclass
class _Past:
    """The earlier lines with one event."""

    next_at: float = -math.inf
    unlogged: int = 0


class Limiter:
    """Drops lines that come too often. The next one says how many were dropped.

    Args:
      clock: returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # By the event and the bot that it concerns.
        self._past = defaultdict[tuple[str, str | None], _Past](_Past)

    def __call__(self, logger: WrappedLogger, method: str, line: EventDict) -> EventDict:  # noqa: ARG002
        if line["event"] not in SELDOM:
            return line
        past = self._past[line["event"], line.get("bot")]
        now = self._clock()
        if now < past.next_at:
            past.unlogged += 1
            raise structlog.DropEvent
        if past.unlogged:
            line["unlogged"] = past.unlogged
        past.next_at, past.unlogged = now + SELDOM_SECONDS, 0
        return line


def clean(logger: WrappedLogger, method: str, line: EventDict) -> EventDict:  # noqa: ARG001
    """Escape control characters, and cut what is long: clients and servers choose some values."""
    for name, value in line.items():
        if isinstance(value, str):
            longest = LONGEST_TEXT if name in {"event", "exception"} else LONGEST_VALUE
            line[name] = printable(shortened(value, longest), keep="\n" * (name == "exception"))
    return line


def shortened(text: str, longest: int) -> str:
    """Leave out the middle of a long text."""
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]}[{len(text) - 2 * half} characters more]{text[-half:]}"


def printable(text: str, *, keep: str = "") -> str:
    """Escape characters that a terminal takes as a command."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one in keep else ascii(one)[1:-1] for one in text)
