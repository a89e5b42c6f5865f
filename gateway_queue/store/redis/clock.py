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
    server and back takes. Time daemons and virtual machines set a clock by a little again and
    again, so a release waits for as long as all steps of one window together may have shortened it,
    see :meth:`longest_step`. After a longer step, what the clock has measured is of no use.

    Args:
      memory: seconds that the longest window takes.
      small_step: the most seconds that a clock may be set by without counting as another one.
    """

    def __init__(self, memory: float, small_step: float) -> None:
        self._memory = memory
        self._small_step = small_step
        # The server's time less ours is between these two.
        self._least, self._most = -math.inf, math.inf
        self._offset = 0.0
        self._seen_at = trio.current_time()
        # The steps of the last `memory` seconds: when they were seen, and by how many seconds, at
        # least, each has set the clock forward.
        self._steps = deque[tuple[float, float]]()
        self.was_set = False
        """Whether there was a small step, until the store has dealt with it."""
        # The values of `_least` with the times of the next ones, as far as no later value is lower.
        self._former_least = deque[tuple[float, float]]()

    def agrees(self, now: int, asked_at: float, answered_at: float) -> bool:
        """Learn the clock from an answer, and return whether it was set by a small step at most.

        Args:
          now: what the server's clock has shown, in microseconds.
          asked_at: before that, here.
          answered_at: after it, here.
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
        # No further than it has to, so that what is converted twice gives the same.
        self._offset = min(max(self._offset, self._least), self._most)
        self._remember(answered_at)
        return step <= self._small_step

    def longest_step(self) -> float:
        """Return by how many seconds the clock may have been set forward during one window."""
        return self._most - self._former_least[0][0]

    def set_back_by(self) -> float:
        """Return by how many seconds the clock was set back during one window.

        It may be set forward again before another replica has noticed the first step.
        """
        farthest = passed = 0.0
        for _, step in reversed(self._steps):
            passed -= step
            farthest = max(farthest, passed)
        return farthest

    def change(self, memory: float, small_step: float) -> None:
        """Take over other figures, see the constructor; a window of before may still last."""
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
