"""Which shards start most often, to find out which ones use up the day's session starts."""

from __future__ import annotations

from collections import Counter, deque

import trio

from gateway_queue.queue.events import Event, Released
from gateway_queue.store.budget import DAY

STARTS_MAX = 20_000
"""Session starts to remember, the latest ones."""


class Starts:
    """Counts the releases of each shard in the last 24 hours."""

    def __init__(self) -> None:
        self._releases = deque[tuple[float, int | None]]()
        self._of_shard = Counter[int | None]()

    def observe(self, event: Event) -> None:
        """Take in what the queue reports."""
        if isinstance(event, Released):
            self._releases.append((event.at, event.shard))
            self._of_shard[event.shard] += 1
            self._forget_old()

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

    def _forget_old(self) -> None:
        oldest = trio.current_time() - DAY
        releases = self._releases
        while releases and (len(releases) > STARTS_MAX or releases[0][0] <= oldest):
            _, shard = releases.popleft()
            self._of_shard[shard] -= 1
            if not self._of_shard[shard]:
                del self._of_shard[shard]
