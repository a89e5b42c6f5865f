"""One process of the server with all its bots, which can be frozen, stopped and killed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import trio
from coredis.connection import TCPLocation
from trio._core._run import CancelStatus

from gateway_queue.discord.api import Discord, SessionStartLimit
from gateway_queue.discord.limits import Limits
from gateway_queue.observing.event_log import EventLog
from gateway_queue.queue import Queue
from gateway_queue.service import rules_of
from gateway_queue.settings import Settings
from gateway_queue.store import WindowStore
from gateway_queue.store.memory import MemoryStore
from gateway_queue.store.redis import Link, RedisStore
from tests.exploration.discord import SimulatedDiscord
from tests.exploration.primaries import Primaries, SentinelPool, first_primary, process_of
from tests.exploration.record import Call, History, ProcessRecord, Record
from tests.exploration.redis_server import SimulatedPool
from tests.exploration.scenario import Scenario

STOP_SECONDS = 3.0
"""Seconds that a process may take to stop: 2 s, and 1 s for answers under way."""


@dataclass(frozen=True)
class Bot:
    """A bot in a run."""

    record: Record
    discord: SimulatedDiscord

    @property
    def scenario(self) -> Scenario:
        return self.record.scenario


class Process:
    """One process: its connection to Redis, and its parts of all bots."""

    def __init__(
        self,
        number: int,
        replica: int,
        history: History,
        primaries: Primaries,
        bots: Iterable[Bot],
        *,
        hold_on_start: bool,
    ) -> None:
        self.number = number
        self.replica = replica
        self.parts = [Part(self, bot, hold_on_start=hold_on_start) for bot in bots]
        self.sends = trio.lowlevel.ParkingLot()
        self.way_latency = 0.0
        self.accepts = False
        self.is_alive = True
        self.ended = trio.Event()
        self.nursery: trio.Nursery
        self._history = history
        self._primaries = primaries
        self._pools: list[SimulatedPool | SentinelPool] = []
        self._ice: trio.Event | None = None
        self._way_back: trio.Event | None = None

    def __str__(self) -> str:
        return f"replica {self.replica}, process {self.number}"

    @property
    def is_frozen(self) -> bool:
        return self._ice is not None

    async def thawed(self) -> None:
        """Wait while it is frozen."""
        while self._ice is not None:
            await self._ice.wait()

    def freeze(self) -> None:
        if self._ice is None:
            self._ice = trio.Event()
            self._history.note(f"{self} frozen")

    def thaw(self) -> None:
        if self._ice is not None:
            self._ice.set()
            self._ice = None
            self._history.note(f"{self} thawed")

    async def reachable(self) -> None:
        """Wait while the process is cut off from Redis."""
        while self._way_back is not None:
            await self._way_back.wait()

    def cut_off(self) -> None:
        if self._way_back is None:
            self._way_back = trio.Event()
            self._history.note(f"{self} is cut off from Redis")

    def reconnect(self) -> None:
        if self._way_back is not None:
            self._way_back.set()
            self._way_back = None
            self._history.note(f"{self} reaches Redis again")

    async def kill(self) -> None:
        """End it as SIGKILL does."""
        for part in self.parts:
            part.record.was_killed = True
        await self._end("killed")

    async def stop(self) -> None:
        """End it as SIGTERM does."""
        self.accepts = False
        self._history.note(f"{self} is stopping")
        with trio.move_on_after(STOP_SECONDS) as scope:
            async with trio.open_nursery() as nursery:
                for part in self.parts:
                    nursery.start_soon(part.queue.close)
        if scope.cancelled_caught and self.is_alive:
            why = f"{self} has not stopped within {STOP_SECONDS} s, see its last calls"
            self._report("stops", why)
        await self._end("stopped")

    async def _end(self, how: str) -> None:
        """Cancel all tasks at once, also shielded ones. The process sends nothing more."""
        if not self.is_alive:
            return
        self.accepts = self.is_alive = False
        for part in self.parts:
            part.record.ended_at = trio.current_time()
        self._history.note(f"{self} {how}")
        for pool in self._pools:
            pool.close(how)
        self.nursery.cancel_scope.cancel()
        self.thaw()
        self.reconnect()
        with trio.CancelScope(shield=True):
            while not self.ended.is_set():
                for task in self._tasks():
                    _remove_shields(task)
                await trio.lowlevel.checkpoint()

    def pool(self, location: TCPLocation) -> SimulatedPool | SentinelPool:
        pool = self._primaries.pool(location, self)
        self._pools.append(pool)
        return pool

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        """Run until stopped or killed."""
        try:
            async with trio.open_nursery() as self.nursery:
                link = self._open_link()
                for part in self.parts:
                    await part.start(self.nursery, link)
                self.accepts = True
                self._history.note(f"{self} started")
                task_status.started()
        except Exception as error:  # noqa: BLE001
            self._report("no-crash", f"{self} has crashed: {_texts(error)}")
        finally:
            self.accepts = self.is_alive = False
            self.ended.set()

    def _open_link(self) -> Link | None:
        if self.parts[0].bot.scenario.store == "memory":
            return None
        link = Link(
            self._primaries.url(self.number),
            count_error=lambda: None,
            observe_round_trip=self._note_answer,
        )
        self.nursery.start_soon(link.run)
        return link

    def _note_answer(self, _seconds: float) -> None:
        for part in self.parts:
            part.record.heard_at.append(trio.current_time())

    def _report(self, invariant: str, why: str) -> None:
        self.parts[0].bot.record.wrong.append((invariant, why))

    def tasks(self) -> list[str]:
        """Return the names of all its tasks."""
        return sorted(task.name for task in self._tasks())

    def _tasks(self) -> list[trio.lowlevel.Task]:
        tasks: list[trio.lowlevel.Task] = []
        nurseries = [self.nursery]
        while nurseries:
            for task in nurseries.pop().child_tasks:
                tasks.append(task)
                nurseries += task.child_nurseries
        return tasks


class Part:
    """One bot in one process: its queue, its store, and the task that asks for Discord's limits."""

    queue: Queue

    def __init__(self, process: Process, bot: Bot, *, hold_on_start: bool) -> None:
        now, scenario = trio.current_time(), bot.scenario
        self.process = process
        self.bot = bot
        self.record = ProcessRecord(process.number, process.replica, now, hold_on_start)
        bot.record.processes.append(self.record)
        self.calls: list[Call] = []
        """Calls that have arrived and have not ended."""
        if not scenario.has_token:
            self.record.keys_told.append((now, scenario.keys))

    async def start(self, nursery: trio.Nursery, link: Link | None) -> None:
        """Start what one bot needs, besides the connection to Redis."""
        scenario = self.bot.scenario
        settings = settings_of(scenario, hold_on_start=self.record.hold_on_start)
        self.queue = Queue(
            self._open_store(nursery, link, settings),
            max_concurrency=None if scenario.has_token else scenario.keys,
            observers=[EventLog().observe],
        )
        await nursery.start(self.queue.run)
        if scenario.has_token:
            discord = cast("Discord", _DiscordOf(self))
            nursery.start_soon(Limits(discord, self.queue, settings).run)

    def _open_store(
        self, nursery: trio.Nursery, link: Link | None, settings: Settings
    ) -> WindowStore:
        rules = rules_of(settings)
        if link is None:
            return MemoryStore(rules)
        store = RedisStore(link, settings.redis_prefix, rules, self._send_away)
        nursery.start_soon(store.run)
        return store

    def _send_away(self) -> None:
        self.queue.send_away()

    def leftovers(self) -> list[str]:
        """List what is still in the queue after all clients have left."""
        left = [f"len(queue) is {len(self.queue)}"] if len(self.queue) else []
        lanes = [lane for lane in self.queue.lanes.values() if lane or lane.identifying]
        return [*left, *(f"the queue has lane {lane.rate_limit_key}" for lane in lanes)]


class _DiscordOf:
    """Discord, as one bot of one process reaches it."""

    def __init__(self, part: Part) -> None:
        self._part = part

    async def session_start_limit(self) -> SessionStartLimit:
        process = self._part.process
        await process.thawed()
        limit = await self._part.bot.discord.session_start_limit()
        await process.thawed()
        told = (trio.current_time(), limit.max_concurrency)
        self._part.record.keys_told.append(told)
        return limit


def settings_of(scenario: Scenario, *, hold_on_start: bool) -> Settings:
    """Return the settings of a process."""
    return Settings(
        window_seconds=scenario.window,
        margin_seconds=scenario.margin,
        confirm_seconds=scenario.confirm_seconds,
        hold_on_start=hold_on_start,
        place_seconds=scenario.place_seconds,
        max_concurrency=scenario.max_concurrency if scenario.has_token else scenario.keys,
        discord_token="token" if scenario.has_token else None,
        discord_refresh_seconds=scenario.refresh,
        session_start_limit=scenario.session_start_limit,
        redis_prefix=scenario.redis_prefix,
        loop_free_starts=scenario.loop_free_starts,
    )


def connections_to(
    processes: Callable[[int], Process],
) -> Callable[[str, TCPLocation | None], Any]:
    """Return a replacement of :func:`gateway_queue.store.redis.servers.connections`."""
    return lambda url, node: processes(int(url.removeprefix("redis://"))).pool(
        node or first_primary()
    )


def sentinel_connections_to(processes: Callable[[int], Process]) -> Callable[..., Any]:
    """Return a replacement of the pools of ``gateway_queue.store.redis.servers.Sentinels``."""
    return lambda location, db, **_: processes(process_of(location, db)).pool(location)


def _remove_shields(task: trio.lowlevel.Task) -> None:
    status: CancelStatus | None = task._cancel_status  # noqa: SLF001
    while status is not None:
        status._scope.shield = False  # noqa: SLF001
        status = status._parent  # noqa: SLF001


def _texts(error: BaseException) -> str:
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(map(_texts, error.exceptions))
    return repr(error)
