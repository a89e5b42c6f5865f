"""A fault of the store or of Discord's API."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fault:
    """The store or Discord cannot be used. Times are of :func:`trio.current_time`."""

    reason: str
    since: float
    retry_at: float
    """When the next try is."""

    def __str__(self) -> str:
        return self.reason


def next_fault(former: Fault | None, reason: str, now: float, retry_in: float) -> Fault:
    """Return the fault after one more failure; the outage began with the first one."""
    return Fault(reason, former.since if former else now, now + retry_in)
