"""Keeps Discord's limits for a bot up to date in its queue."""

from __future__ import annotations

from dataclasses import replace

import structlog
import trio

from gateway_queue.discord.api import BadToken, Discord, SessionStartLimit, Unavailable
from gateway_queue.faults import Fault, next_fault
from gateway_queue.queue import Queue
from gateway_queue.settings import Settings
from gateway_queue.store import IN_FLIGHT_WINDOWS, DiscordBudget

FIRST_RETRY, LONGEST_RETRY = 1.0, 60.0
"""Seconds between two tries; they double after each try, unless Discord asks for more."""

NEAREST_RESET = 1.0
"""Seconds after which Discord is asked again at the earliest, however near the reset is."""

log = structlog.stdlib.get_logger(__name__)


class Limits:
    """Asks Discord at the start, at intervals and at each reset.

    Args:
      discord: the API to ask.
      queue: the queue to keep up to date.
      settings: the interval, and the user's own limits, which hold where they are lower.
      phase: the part of the first interval after which Discord is asked again. With a phase for
        each bot, the requests of many bots that start together are spread over the interval.
    """

    def __init__(
        self, discord: Discord, queue: Queue, settings: Settings, *, phase: float = 1.0
    ) -> None:
        self._discord = discord
        self._queue = queue
        self._settings = settings
        self._refresh = phase * settings.discord_refresh_seconds
        self.fault: Fault | None = None
        """Why Discord's figures are not known; None if they are."""
        self._is_announced = False

    async def run(self) -> None:
        """Keep the queue up to date until cancelled.

        Raises:
          BadToken: Discord rejects the token, and has not accepted it before.
        """
        in_flight_until = trio.current_time() + IN_FLIGHT_WINDOWS * self._settings.window_seconds
        while True:
            asked_at, discords = await self._ask_until_answered()
            limit = self._within_own_limit(discords)
            if asked_at < in_flight_until and self._may_be_spent(limit):
                self.fault = Fault(
                    "few session starts are left, and Discord may not have counted the latest ones",
                    asked_at,
                    in_flight_until,
                )
                await trio.sleep_until(in_flight_until)
                continue
            log.debug("Discord session limits", **_in_log(limit))
            await self._adopt(limit, asked_at)
            wait = min(self._refresh, max(NEAREST_RESET, limit.reset_after))
            if asked_at < in_flight_until:  # the figure may not include starts in flight
                wait = min(wait, max(0.0, in_flight_until - trio.current_time()))
            else:
                self._refresh = self._settings.discord_refresh_seconds
            await trio.sleep(wait)

    def _may_be_spent(self, limit: SessionStartLimit) -> bool:
        """Return whether starts in flight may use up the limit before Discord's figure has them.

        In this time, an earlier process may have released as many tickets as this one may release.
        """
        if not self._settings.hold_on_start or self._settings.session_start_limit == 0:
            return False
        return limit.remaining <= 2 * IN_FLIGHT_WINDOWS * limit.max_concurrency

    async def _ask_until_answered(self) -> tuple[float, SessionStartLimit]:
        delay = FIRST_RETRY
        while True:
            asked_at = trio.current_time()
            try:
                limit = await self._discord.session_start_limit()
            except BadToken:
                if self._queue.max_concurrency is None:
                    raise
                fault = self._note_failure("401 Unauthorized", retry_in=delay)
            except Unavailable as error:
                retry_in = max(delay, error.retry_after)
                fault = self._note_failure(str(error), retry_in=retry_in)
            else:
                self._note_answer()
                return asked_at, limit
            await trio.sleep_until(fault.retry_at)
            delay = min(2 * delay, LONGEST_RETRY)

    def _note_failure(self, reason: str, *, retry_in: float) -> Fault:
        """Warn once per outage, and log at debug level when Discord is asked again."""
        warn = log.debug if self._is_announced else log.warning
        warn("cannot ask Discord for its limits", reason=reason, retry_in=round(retry_in, 3))
        self._is_announced = True
        self.fault = fault = next_fault(self.fault, reason, trio.current_time(), retry_in)
        return fault

    def _note_answer(self) -> None:
        if self._is_announced and self.fault is not None:
            after = round(trio.current_time() - self.fault.since, 3)
            log.info("Discord answers again", after=after)
        self.fault, self._is_announced = None, False

    async def _adopt(self, limit: SessionStartLimit, asked_at: float) -> None:
        resets_at = trio.current_time() + limit.reset_after
        await self._queue.update_budget(
            DiscordBudget(limit.total, limit.remaining, resets_at, asked_at)
        )
        if limit.max_concurrency == self._queue.max_concurrency:
            return
        log.info("Discord session limits", **_in_log(limit))
        own = self._settings.max_concurrency
        if own is not None and own > limit.max_concurrency:
            log.warning(
                "MAX_CONCURRENCY is higher than Discord's value and has no effect",
                configured=own,
                max_concurrency=limit.max_concurrency,
            )
        self._queue.set_max_concurrency(limit.max_concurrency)

    def _within_own_limit(self, limit: SessionStartLimit) -> SessionStartLimit:
        """Subtract from Discord's session starts what the user's own lower limit does not allow."""
        own = self._settings.session_start_limit or limit.total
        held_back = max(0, limit.total - own)
        return replace(
            limit, total=limit.total - held_back, remaining=max(0, limit.remaining - held_back)
        )


def _in_log(limit: SessionStartLimit) -> dict[str, float]:
    """Name the figures as the rest of the log does."""
    return {
        "total": limit.total,
        "remaining": limit.remaining,
        "resets_in": limit.reset_after,
        "max_concurrency": limit.max_concurrency,
    }
