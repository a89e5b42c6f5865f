"""A bot's queue, put together: its store, Discord's limits, and what observes it."""

from __future__ import annotations

import time
from functools import partial

import trio

from gateway_queue.discord.api import connect
from gateway_queue.discord.limits import Limits
from gateway_queue.observing.event_log import EventLog
from gateway_queue.observing.gauges import gauges
from gateway_queue.observing.metrics import Metrics
from gateway_queue.observing.recent import Recent
from gateway_queue.observing.starts import Starts
from gateway_queue.queue import Queue
from gateway_queue.settings import Settings
from gateway_queue.store import Rules, WindowStore
from gateway_queue.store.memory import MemoryStore


class Service:
    """Everything that one bot's tickets need.

    Args:
      settings: of the server.
    """

    queue: Queue

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.recent = Recent()
        self.starts = Starts()
        self.started_at = time.time()
        """Seconds since the epoch."""
        self.limits: Limits | None = None
        """None if Discord is not asked."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve tickets until cancelled.

        Raises:
          ExceptionGroup: with :class:`~gateway_queue.discord.api.BadToken` in it if Discord rejects
            the token of the settings.
        """
        settings = self.settings
        event_log = EventLog()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(event_log.run)
            self.queue = Queue(
                self._open_store(nursery),
                max_concurrency=known_max_concurrency(settings),
                place_seconds=settings.place_seconds,
                observers=(
                    self.metrics.observe,
                    self.recent.observe,
                    self.starts.observe,
                    event_log.observe,
                ),
            )
            self.metrics.watch(partial(gauges, self.queue, self.not_ready))
            if settings.discord_token is not None and self.queue.max_concurrency is None:
                nursery.start_soon(self._follow_discord, settings.discord_token)
            await nursery.start(self.queue.run)
            task_status.started()

    def _open_store(self, nursery: trio.Nursery) -> WindowStore:
        settings = self.settings
        rules = rules_of(settings)
        if settings.redis_url is None:
            return MemoryStore(rules)
        # Not at the top, for most servers run alone, and it takes a while.
        from gateway_queue.store.redis import RedisStore  # noqa: PLC0415

        store = RedisStore(
            settings.redis_url,
            settings.redis_prefix,
            rules,
            count_error=self.metrics.store_errors.inc,
            observe_round_trip=self.metrics.observe_redis_round_trip,
        )
        nursery.start_soon(store.run)
        return store

    async def _follow_discord(self, token: str) -> None:
        """Keep within the limits that Discord gives the bot."""
        url, count_request = self.settings.discord_api_url, self.metrics.count_discord_request
        async with connect(token, url, count_request) as discord:
            self.limits = Limits(discord, self.queue, self.settings)
            await self.limits.run()

    def not_ready(self) -> str | None:
        """Tell why no ticket can be released, if so."""
        if self.queue.max_concurrency == 0:
            return None
        if fault := self.queue.store.fault:
            return f"Redis cannot be reached: {fault}"
        if self.queue.max_concurrency is not None:
            return None
        fault = self.limits.fault if self.limits else None
        return "Discord's limits are not known yet" + (f": {fault}" if fault else "")


def in_log(settings: Settings) -> dict[str, object]:
    """Describe what is on and off, for the first line of the log."""
    return {
        "window": settings.window_seconds,
        "margin": settings.margin_seconds,
        "keys": "from Discord" if (keys := known_max_concurrency(settings)) is None else keys,
        "store": settings.store_name,
        "session_start_limit": settings.session_start_limit,
        "hold_on_start": settings.hold_on_start,
        "place_seconds": settings.place_seconds,
        "loop_free_starts": settings.loop_free_starts,
        "confirm_seconds": settings.confirm_seconds,
        "auth_token": settings.auth_token is not None,
    }


def known_max_concurrency(settings: Settings) -> int | None:
    """Return the number of rate limit keys, None if Discord has to be asked."""
    if settings.max_concurrency == 0:
        return 0  # a gateway proxy keeps to Discord's limits
    if settings.discord_token is not None:
        return None
    return 1 if settings.max_concurrency is None else settings.max_concurrency


def rules_of(settings: Settings) -> Rules:
    """Return the rules for a store.

    With a token the rate limit keys are Discord's, and MAX_CONCURRENCY limits the releases of all
    keys: fewer keys would release shards of one of Discord's keys at the same time.
    """
    return Rules(
        window=settings.window_seconds,
        hold=settings.hold_on_start,
        session_start_limit=settings.session_start_limit,
        loop_free_starts=settings.loop_free_starts,
        releases_per_window=settings.max_concurrency or None if settings.discord_token else None,
        margin=settings.margin_seconds,
        confirm_seconds=settings.confirm_seconds,
    )
