"""Summaries of bots, for the list of all bots."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from gateway_queue.queue.overview import lanes, next_release
from gateway_queue.service import Service
from gateway_queue.store import SessionStarts

TICKETS_OF_KEY = 20
"""Tickets to look at for the next release. Tickets behind these are seldom the next."""


@dataclass(frozen=True)
class BotSummary:
    """A bot at one moment."""

    name: str
    waiting: int
    next_release: float
    """In seconds; infinite if no ticket waits, or if it is not known."""
    starts: SessionStarts
    not_ready: str | None
    """Why no ticket can be released; None if tickets can be released."""

    @property
    def trouble(self) -> str | None:
        """Why tickets of the bot are not released; None if they are."""
        if self.not_ready:
            return self.not_ready
        return "the day's session starts are spent" if self.starts.spent else None


async def summaries(services: Mapping[str, Service]) -> list[BotSummary]:
    """Describe bots, in the given order."""
    return [await _summary(name, service) for name, service in services.items()]


async def _summary(name: str, service: Service) -> BotSummary:
    queue = service.queue
    shown = await lanes(queue, TICKETS_OF_KEY, everywhere=False) if queue.lanes else []
    return BotSummary(
        name=name,
        waiting=len(queue),
        next_release=min(map(next_release, shown), default=math.inf),
        starts=queue.store.session_starts(),
        not_ready=service.not_ready(),
    )
