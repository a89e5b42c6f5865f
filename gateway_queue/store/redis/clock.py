"""The clock of the Redis server, compared with the clock of this replica."""

from __future__ import annotations

import math
from collections import deque

import trio

MICROSECONDS = 1_000_000

DRIFT = 0.001
"""The fraction by which, at most, the server's clock runs faster or slower than ours. A time daemon
slews a clock by half of it."""


def longest_there(seconds: float) -> float:
    """Return by how many seconds, at most, the server's clock advances in some seconds of ours."""
    return seconds * (1 + DRIFT)


def longest_here(seconds: float) -> float:
    """Return by how many seconds, at most, our clock advances in some seconds of the server's."""
    return seconds / (1 - DRIFT)


class ServerClock:
    """Converts between the server's clock and :func:`trio.current_time`.

    The server's clock can be set. Then the windows that it measures are wrong, so the time in each
    answer is compared with our own clock. That shows every step that is longer than a round trip.
    Time daemons and virtual machines set a clock by a little again and again. So a release waits,
    in addition, for the time by which all steps during one window may have shortened that window,
    see :meth:`longest_step`. After a step of more than ``small_step``, the store trusts no time of
    this clock any more.

    Args:
      memory: seconds of the longest window: for so long, steps are remembered.
      small_step: the longest step, in seconds, after which the clock is still trusted.
    """

    def __init__(self, memory: float, small_step: float) -> None:
        self._memory = memory
        self._small_step = small_step
        # The server's time minus ours is between these two.
        self._least, self._most = -math.inf, math.inf
        self._offset = 0.0
        self._seen_at = trio.current_time()
        # The steps of the last `memory` seconds: when they were seen, and by how many seconds, at
        # least, each has set the clock forward.
        self._steps = deque[tuple[float, float]]()
        self.was_set = False
        """Whether there was a small step, until the store has dealt with it."""
        # The former values of `_least`, each with the time of the next one. A value is dropped if a
        # later one is as low or lower, so the first is the lowest.
        self._former_least = deque[tuple[float, float]]()

    def agrees(self, now: int, asked_at: float, answered_at: float) -> bool:
        """Learn the clock from an answer, and return whether it was set by a small step at most.

        Args:
          now: the time that the server's clock has shown, in microseconds.
          asked_at: when the command was sent, by our clock.
          answered_at: when its answer came, by our clock.
        """
        drift = DRIFT * (answered_at - self._seen_at)
        self._seen_at = answered_at
        least, most = now / MICROSECONDS - answered_at, now / MICROSECONDS - asked_at
        step = max(least - self._most, self._least - most) - drift
        if step > 0:
            self.was_set = True
            self._steps.append((answered_at, least - self._most))
            self._least, self._most = least, most
        else:
            self._least, self._most = max(self._least - drift, least), min(self._most + drift, most)
        # Changed no more than necessary, so that converting a time twice gives the same result.
        self._offset = min(max(self._offset, self._least), self._most)
        self._remember(answered_at)
        return step <= self._small_step

    def longest_step(self) -> float:
        """Return by how many seconds the clock may have been set forward during one window."""
        return self._most - self._former_least[0][0]

    def set_back_by(self) -> float:
        """Return by how many seconds the clock was set back during one window.

        The clock may be set forward again before another replica has noticed that step.
        """
        farthest = passed = 0.0
        for _, step in reversed(self._steps):
            passed -= step
            farthest = max(farthest, passed)
        return farthest

    def change(self, memory: float, small_step: float) -> None:
        """Change the constructor's arguments; a longer ``memory`` stays, for earlier windows."""
        self._memory = max(self._memory, memory)
        self._small_step = small_step

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
        while self._steps and self._steps[0][0] + self._memory <= now:
            self._steps.popleft()
