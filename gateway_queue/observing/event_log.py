"""What the queue reports, as lines of the log."""

from __future__ import annotations

import structlog

from gateway_queue.observing.budget_alarm import BudgetAlarm
from gateway_queue.queue.events import (
    Event,
    Held,
    Identified,
    NotConfirmed,
    Released,
    SlotTooLate,
    StartsChanged,
    Unkeyed,
)

log = structlog.stdlib.get_logger(__name__)


class EventLog:
    """Writes a line for each release, and for whatever needs attention."""

    def __init__(self) -> None:
        self._budget_alarm = BudgetAlarm()

    def observe(self, event: Event) -> None:
        """Take in what the queue reports."""
        match event:
            case Released():
                log.info(
                    "released",
                    shard=event.shard,
                    rate_limit_key=event.rate_limit_key,
                    waited=round(event.waited, 3),
                    still_waiting=event.still_waiting,
                )
            case Held():
                wait = round(event.seconds, 3)
                log.warning("held: the shard starts too often", shard=event.shard, wait=wait)
            case Identified():
                seconds = round(event.seconds, 3)
                log.debug("identified", shard=event.shard, identify_seconds=seconds)
            case NotConfirmed():
                seconds = event.confirm_seconds
                log.warning("not confirmed", shard=event.shard, confirm_seconds=seconds)
            case Unkeyed():
                number = event.max_concurrency
                log.warning("request without ?shard=, treated as shard 0", max_concurrency=number)
            case SlotTooLate():
                log.warning("the store is too slow to release tickets")
            case StartsChanged():
                self._budget_alarm.check(event.starts)
