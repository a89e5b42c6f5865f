"""A bot's queue, put together: its store, Discord's limits, and what observes it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog
import trio
from structlog.contextvars import bound_contextvars

from gateway_queue.discord.api import Api, BadToken, Discord
from gateway_queue.discord.limits import Limits
from gateway_queue.faults import Fault
from gateway_queue.observing.event_log import EventLog
from gateway_queue.observing.metrics import BotMetrics
from gateway_queue.observing.recent import Recent
from gateway_queue.queue import Queue
from gateway_queue.settings import Settings, hash_tag
from gateway_queue.store import Rules, WindowStore
from gateway_queue.store.memory import MemoryStore

if TYPE_CHECKING:
    from gateway_queue.store.redis import Link


log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True)
class Links:
    """The connections that all bots of a server share."""

    discord: Api
    redis: Link | None
    """None if the windows are in memory."""


class Service:
    """Everything that one bot's tickets need.

    Args:
      settings: of the bot.
      links: of the server.
      metrics: of the bot; its labels are in the lines of the log, too.
      refuse_token: called if Discord rejects the token of the settings.
      phase: see :class:`~gateway_queue.discord.limits.Limits`.
    """

    queue: Queue
    _nursery: trio.Nursery

    def __init__(
        self,
        settings: Settings,
        links: Links,
        metrics: BotMetrics,
        *,
        refuse_token: Callable[[], None],
        phase: float = 1.0,
    ) -> None:
        self.settings = settings
        self.metrics = metrics
        self.labels = metrics.labels
        self.recent = Recent()
        self.started_at = time.time()
        """Seconds since the epoch."""
        self.limits: Limits | None = None
        """None if Discord is not asked."""
        self._links = links
        self._refuse_token = refuse_token
        self._phase = phase
        self._following = trio.CancelScope()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve tickets until stopped or cancelled."""
        settings = self.settings
        with bound_contextvars(**self.labels):
            async with trio.open_nursery() as self._nursery:
                event_log = EventLog()
                self._nursery.start_soon(event_log.run)
                self.queue = Queue(
                    self._open_store(),
                    max_concurrency=known_max_concurrency(settings),
                    observers=(
                        self.metrics.observe,
                        self.recent.observe,
                        event_log.observe,
                    ),
                )
                self._start_following()
                # Not in a task of its own: an idle bot should cost little.
                await self.queue.run(task_status=task_status)

    def change(self, settings: Settings) -> None:
        """Change the settings.

        Tickets keep waiting, and earlier releases stay known. No key opens for one window of the
        new settings nor, with another token, before Discord has answered with its limits.
        """
        former, self.settings = self.settings, settings
        self.queue.change_rules(rules_of(settings))
        known = known_max_concurrency(settings)
        has_other_token = settings.discord_token != former.discord_token
        if known is not None or has_other_token or self.queue.max_concurrency == 0:
            self.queue.set_max_concurrency(known)
        self._following.cancel()
        self._start_following()

    def stop(self) -> None:
        """Close the connections of all waiting clients without an answer, and end."""
        self.queue.dismiss()
        self._nursery.cancel_scope.cancel()

    def _open_store(self) -> WindowStore:
        settings, link = self.settings, self._links.redis
        if link is None:
            return MemoryStore(rules_of(settings))
        # Not at the top: most servers do not use Redis, and the import takes long.
        from gateway_queue.store.redis import RedisStore  # noqa: PLC0415

        prefix = hash_tag(settings.redis_prefix)
        store = RedisStore(link, prefix, rules_of(settings), self._send_away)
        self._nursery.start_soon(store.run)
        return store

    def _send_away(self) -> None:
        """Close the connections of waiting clients, which then ask another replica."""
        if len(self.queue):
            log.warning("waiting clients have to ask other replicas", clients=len(self.queue))
            self.queue.send_away()

    def _start_following(self) -> None:
        token = self.settings.discord_token
        if token is None or known_max_concurrency(self.settings) is not None:
            self.limits = None
            return
        self.metrics.expect_discord_requests()
        url, count_request = self.settings.discord_api_url, self.metrics.count_discord_request
        discord = Discord(self._links.discord, token, url, count_request)
        self.limits = Limits(discord, self.queue, self.settings, phase=self._phase)
        self._following = trio.CancelScope()
        self._nursery.start_soon(self._follow, self.limits, self._following)

    async def _follow(self, limits: Limits, scope: trio.CancelScope) -> None:
        """Follow the limits that Discord gives the bot."""
        with scope:
            try:
                await limits.run()
            except BadToken:
                now = trio.current_time()
                limits.fault = Fault("Discord rejected the token (401 Unauthorized)", now, math.inf)
                self._refuse_token()

    def not_ready(self) -> str | None:
        """Return why no ticket can be released; None if tickets can be released."""
        if self.queue.max_concurrency == 0:
            return None
        if fault := self.queue.store.fault:
            return f"Redis cannot be used: {fault}"
        if self.queue.max_concurrency is not None:
            return None
        fault = self.limits.fault if self.limits else None
        return "Discord's limits are not known yet" + (f": {fault}" if fault else "")


def in_log(settings: Settings) -> dict[str, object]:
    """Return the main settings, for the first line of the log."""
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
        place_seconds=settings.place_seconds,
    )
