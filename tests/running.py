"""A running queue on the mock clock."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import trio
from trio.testing import MockClock

from gateway_queue.bots_file import DEFAULT_BOT
from gateway_queue.discord.api import Api
from gateway_queue.observing.event_log import EventLog
from gateway_queue.observing.metrics import Metrics
from gateway_queue.queue import Queue
from gateway_queue.service import Links, Service
from gateway_queue.settings import Settings
from gateway_queue.store import Claim, Refusal, Rules
from gateway_queue.store.memory import MemoryStore

WINDOW = 5.0
TOLERANCE = 1e-6
"""Seconds, for rounding errors only: the clock is simulated."""


def on_mock_clock(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run on a clock that jumps ahead whenever nothing is left to do.

    hypothesis calls a test many times, and pytest-trio has only one clock for all calls.
    """
    trio.run(main, clock=MockClock(autojump_threshold=0))


class SlowStore(MemoryStore):
    """A store that answers after 10 ms, as a store over a network does."""

    DELAY = 0.01

    async def claim(
        self, key: int, shard: int | None, came_at: float, *, confirm: bool = False
    ) -> Claim | Refusal:
        outcome = await super().claim(key, shard, came_at, confirm=confirm)
        await trio.sleep(self.DELAY)
        return outcome

    async def start_window(self, claim: Claim, at: float, *, confirmed: bool = False) -> None:
        await trio.sleep(self.DELAY)
        await super().start_window(claim, at, confirmed=confirmed)

    async def give_back(self, claim: Claim) -> None:
        await trio.sleep(self.DELAY)
        await super().give_back(claim)

    async def withdraw(self, key: int) -> None:
        await trio.sleep(self.DELAY)
        await super().withdraw(key)


@asynccontextmanager
async def running(
    *,
    store_type: type[MemoryStore] = MemoryStore,
    hold: bool = False,
    keys: int | None = 1,
    session_start_limit: int | None = None,
    loop_free_starts: int = 0,
    place_seconds: float = 0,
    releases_per_window: int | None = None,
) -> AsyncIterator[Queue]:
    """Run a queue until the end of the context, and close it then."""
    rules = Rules(
        WINDOW,
        hold,
        session_start_limit,
        loop_free_starts,
        place_seconds=place_seconds,
        releases_per_window=releases_per_window,
    )
    queue = Queue(store_type(rules), max_concurrency=keys, observers=[EventLog().observe])
    async with trio.open_nursery() as nursery:
        await nursery.start(queue.run)
        yield queue
        await queue.close()


def stopwatch() -> Callable[[], float]:
    """Return a function that returns the seconds since now."""
    start = trio.current_time()
    return lambda: trio.current_time() - start


def service_of(settings: Settings) -> Service:
    """Return the service of the only bot of a server."""
    metrics = Metrics().of(DEFAULT_BOT)
    return Service(settings, Links(Api(), None), metrics, refuse_token=_no_bad_token)


def _no_bad_token() -> None:
    raise AssertionError
