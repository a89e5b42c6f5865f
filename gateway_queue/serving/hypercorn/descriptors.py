"""Keeps file descriptors free for new connections when the limit of the process is low."""

from __future__ import annotations

import math
import resource
from typing import Protocol

import structlog
from trio.lowlevel import RunVar

log = structlog.stdlib.get_logger(__name__)

OTHERS = 40
"""File descriptors that the process needs for other things than connections."""

RESERVED_PART, RESERVED_MAX = 0.25, 1000
"""The fraction of the other descriptors, and the most of them, for connections without a ticket."""


class Closable(Protocol):
    """A connection."""

    def close(self) -> None:
        """End it at once."""


class Descriptors:
    """All connections of the server: the oldest one without a ticket ends when there are too many.

    Args:
      limit: the most descriptors of the process.
    """

    def __init__(self, limit: float) -> None:
        self._connections_max = max(1.0, limit - OTHERS)
        self._tickets_max = self._connections_max - min(
            RESERVED_MAX, RESERVED_PART * self._connections_max
        )
        self._without_ticket: dict[Closable, None] = {}
        self._with_ticket: set[Closable] = set()

    def add(self, connection: Closable) -> None:
        """Count a new connection, and make room for the next one."""
        self._without_ticket[connection] = None
        if len(self._without_ticket) + len(self._with_ticket) > self._connections_max:
            oldest = next(iter(self._without_ticket))
            self.remove(oldest)
            oldest.close()

    def remove(self, connection: Closable) -> None:
        """Forget a connection that has ended."""
        self._without_ticket.pop(connection, None)
        self._with_ticket.discard(connection)

    def hold(self, connection: Closable) -> bool:
        """Keep a connection because it has a ticket now; return false if too many have one."""
        if connection not in self._with_ticket:
            if len(self._with_ticket) >= self._tickets_max:
                log.warning("too few descriptors for all tickets: raise the limit of open files")
                return False
            self._without_ticket.pop(connection, None)
            self._with_ticket.add(connection)
        return True

    def note_request(self, connection: Closable) -> None:
        """Count a connection without a ticket as the youngest one."""
        if connection in self._without_ticket:
            del self._without_ticket[connection]
            self._without_ticket[connection] = None

    def let_go(self, connection: Closable) -> None:
        """Count a connection as one without a ticket again."""
        if connection in self._with_ticket:
            self._with_ticket.discard(connection)
            self._without_ticket[connection] = None


_descriptors = RunVar[Descriptors]("descriptors")


def descriptors() -> Descriptors:
    """Return the connections of this process."""
    try:
        return _descriptors.get()
    except LookupError:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        _descriptors.set(Descriptors(math.inf if soft == resource.RLIM_INFINITY else soft))
        return _descriptors.get()
