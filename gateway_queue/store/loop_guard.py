"""Holds shards that start again and again, counted in the memory of this process."""

from __future__ import annotations

from collections import OrderedDict, deque

HOUR = 60 * 60.0
FIRST_DELAY, LONGEST_DELAY = 15.0, 600.0
"""Seconds from a start to the next one of the same shard when its free starts are used up. They
double with each start, up to the longest delay."""


class LoopGuard:
    """Makes a shard wait that starts too often. Times are in seconds, of one clock.

    Args:
      free_starts: starts that a shard has in any hour without waiting; 0 turns the guard off.
    """

    def __init__(self, free_starts: int) -> None:
        self._free_starts = free_starts
        # The starts of each shard in the last hour; first the shard whose last start is the oldest.
        self._starts: OrderedDict[int | None, deque[float]] = OrderedDict()

    def change(self, free_starts: int) -> None:
        """Change the number of free starts. Earlier starts stay counted."""
        self._free_starts = free_starts

    def wait(self, shard: int | None, now: float) -> float:
        """Return how many seconds the shard has to wait; 0 if it may start now."""
        if shard not in self._starts:
            return 0.0
        starts = self._starts[shard]
        while starts[0] + HOUR <= now < starts[-1] + HOUR:
            starts.popleft()
        excess = len(starts) - self._free_starts
        if excess < 0 or not self._free_starts or starts[-1] + HOUR <= now:
            return 0.0
        delay = min(FIRST_DELAY * 2.0**excess, LONGEST_DELAY)
        return max(0.0, min(starts[-1] + delay, starts[0] + HOUR) - now)

    def start(self, shard: int | None, at: float) -> None:
        """Count a start, and forget the shards that have had none for an hour."""
        if not self._free_starts or shard is None:
            return
        self._starts.setdefault(shard, deque()).append(at)
        self._starts.move_to_end(shard)
        while self._starts[first := next(iter(self._starts))][-1] + HOUR <= at:
            del self._starts[first]
