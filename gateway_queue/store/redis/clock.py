"""The clock of the Redis server, as seen from here."""

from __future__ import annotations

import math

import trio

MICROSECONDS = 1_000_000

DRIFT = 0.001
"""By how much, at most, the server's clock runs faster or slower than ours; a time daemon slews a
clock by half of it."""


class ServerClock:
    """Converts between the server's clock and :func:`trio.current_time`.

    The server's is a clock that can be set. Then the windows that it measures are wrong, so each
    answer is held against our own clock.
    """

    def __init__(self) -> None:
        # The server's time less ours is between these two.
        self._least, self._most = -math.inf, math.inf
        self._offset = 0.0
        self._seen_at = trio.current_time()

    def agrees(self, now: int, asked_at: float, answered_at: float) -> bool:
        """Take over what an answer shows of the clock, and tell whether it was not set.

        Args:
          now: what the server's clock has shown, in microseconds.
          asked_at: before that, here.
          answered_at: after it, here.
        """
        drift = DRIFT * (answered_at - self._seen_at)
        self._seen_at = answered_at
        self._least = max(self._least - drift, now / MICROSECONDS - answered_at)
        self._most = min(self._most + drift, now / MICROSECONDS - asked_at)
        # No further than it has to, so that what is converted twice gives the same.
        self._offset = min(max(self._offset, self._least), self._most)
        return self._least <= self._most

    def at(self, time: float) -> int:
        """Return what the server's clock shows at a time of ours, in microseconds."""
        return round((time + self._offset) * MICROSECONDS)
