"""Which shards start most often, to find out which ones use up the day's session starts."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable

import trio

from gateway_queue.store.budget import DAY

STARTS_MAX = 20_000
"""Session starts to remember, the latest ones."""


class StartsByShard:
    """Counts the session starts of each shard in the last 24 hours.

    Times are of :func:`trio.current_time`.
    """

    def __init__(self) -> None:
        self._began_at = trio.current_time()
        self._starts = OrderedDict[Hashable, tuple[float, int | None]]()
        self._of_shard = Counter[int | None]()

    def add(self, token: Hashable, shard: int | None, at: float) -> None:
        """Count a start, if it is not counted yet.

        Args:
          token: identifies the start.
          shard: the shard that started; None if its client named none.
          at: when it started.
        """
        if token in self._starts:
            return
        self._began_at = min(self._began_at, at)
        self._starts[token] = at, shard
        self._of_shard[shard] += 1
        self._forget_old()

    def remove(self, token: Hashable) -> None:
        """Uncount a start that was not used."""
        if token in self._starts:
            _, shard = self._starts.pop(token)
            self._uncount(shard)

    def of(self, shard: int) -> int:
        """Return how often a shard has started."""
        self._forget_old()
        return self._of_shard[shard]

    def most(self, count: int) -> list[tuple[int | None, int]]:
        """Return the shards that have started more than once, the most frequent first.

        Args:
          count: how many shards to return at most.
        """
        self._forget_old()
        return [(shard, times) for shard, times in self._of_shard.most_common(count) if times > 1]

    @property
    def counted_for(self) -> float:
        """Return for how many seconds starts have been counted, at most 24 hours."""
        return min(trio.current_time() - self._began_at, DAY)

    def _forget_old(self) -> None:
        oldest = trio.current_time() - DAY
        starts = self._starts
        while starts and (len(starts) > STARTS_MAX or next(iter(starts.values()))[0] <= oldest):
            _, (_, shard) = starts.popitem(last=False)
            self._uncount(shard)

    def _uncount(self, shard: int | None) -> None:
        self._of_shard[shard] -= 1
        if not self._of_shard[shard]:
            del self._of_shard[shard]
