"""What the queue reports, as lines of the log."""

from __future__ import annotations

from typing import NoReturn

import structlog
import trio

from gateway_queue.observing.budget_alarm import BudgetAlarm
from gateway_queue.queue.events import (
    Abandoned,
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


DEPARTURES_SECONDS = 60.0
"""Clients that leave within this time are counted in one line."""


class EventLog:
    """Writes a line for each release, and for each event that needs attention."""

    def __init__(self) -> None:
        self._budget_alarm = BudgetAlarm()
        self._store_is_slow = False
        self._departures = 0
        self._departed = trio.Event()

    async def run(self) -> NoReturn:
        """Count the clients that leave, until cancelled."""
        while True:
            await self._departed.wait()
            await trio.sleep(DEPARTURES_SECONDS)
            log.info("clients disconnected before their turn", count=self._departures)
            self._departures, self._departed = 0, trio.Event()

    def observe(self, event: Event) -> None:
        """Log an event of the queue."""
        match event:
            case Released():
                self._note_fast_store()
                log.info(
                    "released",
                    shard=event.shard,
                    rate_limit_key=event.rate_limit_key,
                    waited=round(event.waited, 3),
                    still_waiting=event.still_waiting,
                )
            case Held():
                seconds = round(event.seconds, 3)
                log.warning("held: the shard starts too often", shard=event.shard, held_for=seconds)
            case Abandoned():
                self._departures += 1
                self._departed.set()
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
                self._store_is_slow = True
                log.warning("the store is too slow to release tickets")
            case StartsChanged():
                self._budget_alarm.check(event.starts)

    def _note_fast_store(self) -> None:
        if self._store_is_slow:
            log.info("the store is fast enough again")
            self._store_is_slow = False
