"""What is wrong with something that the queue depends on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fault:
    """The store or Discord cannot be used. Times are of :func:`trio.current_time`."""

    reason: str
    since: float
    retry_at: float
    """When it is tried again."""

    def __str__(self) -> str:
        return self.reason


def next_fault(former: Fault | None, reason: str, now: float, retry_in: float) -> Fault:
    """Note a failure: the first one of an outage says since when it lasts."""
    return Fault(reason, former.since if former else now, now + retry_in)
