"""The clock of the Redis server, compared with the clock of this replica."""

from __future__ import annotations

import math
from collections import deque

import trio

MICROSECONDS = 1_000_000

DRIFT = 0.001
"""By how much, at most, the server's clock runs faster or slower than ours; a time daemon slews a
clock by half of it."""


def longest_there(seconds: float) -> float:
    """Return what the server's clock may advance by in some seconds of ours, at most."""
    return seconds * (1 + DRIFT)


def longest_here(seconds: float) -> float:
    """Return what our clock may advance by in some seconds of the server's, at most."""
    return seconds / (1 - DRIFT)


class ServerClock:
    """Converts between the server's clock and :func:`trio.current_time`.

    The server's is a clock that can be set. Then the windows that it measures are wrong, so each
    answer is held against our own clock. That shows every step that is longer than the way to the
    server and back takes; a shorter one is no longer than :meth:`longest_step`.

    Args:
      memory: seconds that the longest window takes.
    """

    def __init__(self, memory: float) -> None:
        self._memory = memory
        # The server's time less ours is between these two.
        self._least, self._most = -math.inf, math.inf
        self._offset = 0.0
        self._seen_at = trio.current_time()
        # The values of `_least` with the times of the next ones, as far as no later value is lower.
        self._former_least = deque[tuple[float, float]]()

    def agrees(self, now: int, asked_at: float, answered_at: float) -> bool:
        """Learn the clock from an answer, and return whether the clock was not set.

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
        self._remember(answered_at)
        return self._least <= self._most

    def longest_step(self) -> float:
        """Return by how many seconds the clock may have been set forward during one window.

        By the last answer, which has to agree.
        """
        return self._most - self._former_least[0][0]

    def remember(self, memory: float) -> None:
        """Remember earlier comparisons for at least some seconds, see the constructor."""
        self._memory = max(self._memory, memory)

    def at(self, time: float) -> int:
        """Return what the server's clock shows at a time of ours, in microseconds."""
        return round((time + self._offset) * MICROSECONDS)

    def at_latest(self, time: float) -> int:
        """Return the most that the server's clock may show at a time of ours, in microseconds."""
        return round((time + self._most) * MICROSECONDS)

    def when(self, shown: int) -> float:
        """Return when the server's clock shows a time, which is in microseconds."""
        return shown / MICROSECONDS - self._offset

    def _remember(self, now: float) -> None:
        former = self._former_least
        if former:
            former[-1] = former[-1][0], now
        while former and former[-1][0] >= self._least:
            former.pop()
        former.append((self._least, math.inf))
        while former[0][1] + self._memory <= now:
            former.popleft()
