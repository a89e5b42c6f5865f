"""The last releases, for the dashboard."""

from __future__ import annotations

from collections import deque
from statistics import median

from gateway_queue.queue.events import Event, Identified, NotConfirmed, Released

RECENT_MAX = 2_000
"""Releases to remember: the last 3 minutes of 55 keys."""


class Recent:
    """Remembers the last releases, except those with ``max_concurrency`` 0."""

    def __init__(self) -> None:
        self.releases = deque[Released](maxlen=RECENT_MAX)
        self.identifies = deque[Identified | NotConfirmed](maxlen=RECENT_MAX)

    def observe(self, event: Event) -> None:
        """Remember a release, a confirmation, or a missing confirmation."""
        match event:
            case Released():
                self.releases.append(event)
            case Identified() | NotConfirmed():
                self.identifies.append(event)

    def identify_times(self) -> list[float]:
        """Return how many seconds shards took from their answers to their confirmations."""
        return [one.seconds for one in self.identifies if isinstance(one, Identified)]

    def usual_identify_seconds(self) -> float:
        """Return the median of :meth:`identify_times`, or 0 if there are none."""
        times = self.identify_times()
        return median(times) if times else 0.0

    def last_release(self, shard: int) -> Released | None:
        """Return the last release of a shard, if it is remembered."""
        return next((one for one in reversed(self.releases) if one.shard == shard), None)
