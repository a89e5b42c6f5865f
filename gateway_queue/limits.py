"""What Discord allows the bot, kept up to date in the queue."""

from __future__ import annotations

from dataclasses import replace

import structlog
import trio

from gateway_queue.discord import BadToken, Discord, SessionStartLimit, Unavailable
from gateway_queue.queue import Queue
from gateway_queue.store import Allowance

FIRST_RETRY, LONGEST_RETRY = 1.0, 60.0
"""Seconds between two tries, each time twice as many, unless Discord asks for more."""

NEAREST_RESET = 1.0
"""Seconds after which Discord is asked again at the earliest, however near the reset is."""

log = structlog.stdlib.get_logger(__name__)


class Limits:
    """Asks Discord at the start, at intervals and at each reset.

    Args:
      discord: whom to ask.
      queue: who has to know.
      max_concurrency: rate limit keys to use at most; None for as many as Discord allows.
      session_start_limit: session starts a day to use at most; None for as many.
      refresh_seconds: the interval.
    """

    def __init__(
        self,
        discord: Discord,
        queue: Queue,
        *,
        max_concurrency: int | None,
        session_start_limit: int | None,
        refresh_seconds: float,
    ) -> None:
        self._discord = discord
        self._queue = queue
        self._max_concurrency = max_concurrency
        self._session_start_limit = session_start_limit
        self._refresh_seconds = refresh_seconds
        self.fault: str | None = None
        """Why Discord did not answer last, if it did not."""

    async def run(self) -> None:
        """Keep the queue up to date until cancelled.

        Raises:
          BadToken: Discord does not know the token, and has not known it before.
        """
        while True:
            asked_at, limit = await self._ask_until_answered()
            now = trio.current_time()
            log.debug("Discord's limits", **vars(limit))
            await self._adopt(limit, asked_at, now)
            await trio.sleep(min(self._refresh_seconds, max(NEAREST_RESET, limit.reset_after)))

    async def _ask_until_answered(self) -> tuple[float, SessionStartLimit]:
        delay = FIRST_RETRY
        while True:
            asked_at = trio.current_time()
            try:
                limit = await self._discord.session_start_limit()
            except BadToken:
                if self._queue.max_concurrency is None:
                    raise
                self.fault, wait = "401 Unauthorized", delay
            except Unavailable as error:
                self.fault, wait = str(error), max(delay, error.retry_after)
            else:
                self.fault = None
                return asked_at, limit
            log.warning("cannot ask Discord for its limits", reason=self.fault, retry_in=wait)
            await trio.sleep(wait)
            delay = min(2 * delay, LONGEST_RETRY)

    async def _adopt(self, limit: SessionStartLimit, asked_at: float, now: float) -> None:
        limit = self._within_own_limit(limit)
        resets_at = now + limit.reset_after
        await self._queue.allow(Allowance(limit.total, limit.remaining, resets_at, asked_at))
        number = min(limit.max_concurrency, self._max_concurrency or limit.max_concurrency)
        if number == self._queue.max_concurrency:
            return
        log.info("Discord allows", **vars(limit))
        if (self._max_concurrency or 0) > number:
            log.warning(
                "MAX_CONCURRENCY is more than Discord allows, so the smaller one counts",
                configured=self._max_concurrency,
                max_concurrency=number,
            )
        await self._queue.set_max_concurrency(number)

    def _within_own_limit(self, limit: SessionStartLimit) -> SessionStartLimit:
        """Hold back as many of Discord's session starts as the user's own limit is lower."""
        held_back = max(0, limit.total - (self._session_start_limit or limit.total))
        return replace(
            limit, total=limit.total - held_back, remaining=max(0, limit.remaining - held_back)
        )
