"""One process of the server, which can be frozen, stopped and killed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import trio
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
from tests.exploration.record import Call, ProcessRecord, Record
from tests.exploration.redis_server import SimulatedPool, SimulatedRedis
from tests.exploration.scenario import Scenario

STOP_SECONDS = 3.0
"""The longest that a process may take to stop: 2 s by the contract, and the answers under way."""


class Process:
    """The queue, its store, and what keeps Discord's limits up to date in it."""

    def __init__(
        self,
        record: Record,
        replica: int,
        redis: SimulatedRedis,
        discord: SimulatedDiscord,
        *,
        hold_on_start: bool,
    ) -> None:
        now = trio.current_time()
        self.record = ProcessRecord(len(record.processes), replica, now, hold_on_start)
        record.processes.append(self.record)
        self.run_record = record
        self.calls: list[Call] = []
        """Those that its door has let in and that have not ended."""
        self.sends = trio.lowlevel.ParkingLot()
        self.way_latency = 0.0
        self.accepts = False
        self.is_alive = True
        self.ended = trio.Event()
        self.queue: Queue
        self.nursery: trio.Nursery
        self._discord = discord
        self._redis = redis
        self._pools: list[SimulatedPool] = []
        self._ice: trio.Event | None = None
        if not record.scenario.has_token:
            self.record.keys_told.append((now, record.scenario.keys))

    def __str__(self) -> str:
        return f"replica {self.record.replica}, process {self.record.number}"

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
            self.run_record.note(f"{self} frozen")

    def thaw(self) -> None:
        if self._ice is not None:
            self._ice.set()
            self._ice = None
            self.run_record.note(f"{self} thawed")

    async def kill(self) -> None:
        """End it as SIGKILL does."""
        self.record.was_killed = True
        await self._end("killed")

    async def stop(self) -> None:
        """End it as SIGTERM does."""
        self.accepts = False
        self.run_record.note(f"{self} is stopping")
        with trio.move_on_after(STOP_SECONDS) as scope:
            await self.queue.close()
        if scope.cancelled_caught and self.is_alive:
            why = f"{self} has not stopped within {STOP_SECONDS} s, see its last calls"
            self.run_record.wrong.append(("stops", why))
        await self._end("stopped")

    async def _end(self, how: str) -> None:
        """Cancel all of it at once, also what is shielded; nothing gets out any more."""
        if not self.is_alive:
            return
        self.accepts = self.is_alive = False
        self.record.ended_at = trio.current_time()
        self.run_record.note(f"{self} {how}")
        for pool in self._pools:
            pool.close(how)
        self.nursery.cancel_scope.cancel()
        self.thaw()
        with trio.CancelScope(shield=True):
            while not self.ended.is_set():
                for task in self._tasks():
                    _remove_shields(task)
                await trio.lowlevel.checkpoint()

    def pool(self) -> SimulatedPool:
        pool = SimulatedPool(self._redis, self)
        self._pools.append(pool)
        return pool

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        """Live until stopped or killed."""
        try:
            async with trio.open_nursery() as self.nursery:
                scenario = self.run_record.scenario
                settings = settings_of(scenario, hold_on_start=self.record.hold_on_start)
                store = self._open_store(settings)
                keys = None if scenario.has_token else scenario.keys
                self.queue = Queue(
                    store,
                    max_concurrency=keys,
                    observers=[EventLog().observe],
                )
                await self.nursery.start(self.queue.run)
                if scenario.has_token:
                    discord = cast("Discord", _DiscordOf(self, self._discord))
                    self.nursery.start_soon(Limits(discord, self.queue, settings).run)
                self.accepts = True
                self.run_record.note(f"{self} started")
                task_status.started()
        except Exception as error:  # noqa: BLE001
            self.run_record.wrong.append(("no-crash", f"{self} has crashed: {_texts(error)}"))
        finally:
            self.accepts = self.is_alive = False
            self.ended.set()

    def _open_store(self, settings: Settings) -> WindowStore:
        rules = rules_of(settings)
        if self.run_record.scenario.store == "memory":
            return MemoryStore(rules)
        url = f"redis://{self.record.number}"
        link = Link(url, count_error=lambda: None)
        store = RedisStore(link, settings.redis_prefix, rules, self._send_away)
        self.nursery.start_soon(link.run)
        self.nursery.start_soon(store.run)
        return store

    def _send_away(self) -> None:
        self.queue.send_away()

    def leftovers(self) -> list[str]:
        """List what is still in the queue, when all have left."""
        left = [f"len(queue) is {len(self.queue)}"] if len(self.queue) else []
        lanes = [lane for lane in self.queue.lanes.values() if lane or lane.identifying]
        return [*left, *(f"the queue has lane {lane.rate_limit_key}" for lane in lanes)]

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


class _DiscordOf:
    """Discord, as one process reaches it."""

    def __init__(self, process: Process, discord: SimulatedDiscord) -> None:
        self._process = process
        self._discord = discord

    async def session_start_limit(self) -> SessionStartLimit:
        await self._process.thawed()
        limit = await self._discord.session_start_limit()
        await self._process.thawed()
        told = (trio.current_time(), limit.max_concurrency)
        self._process.record.keys_told.append(told)
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
        loop_free_starts=scenario.loop_free_starts,
    )


def connections_to(processes: Callable[[int], Process]) -> Callable[[str, None], Any]:
    """Return what stands in for :func:`gateway_queue.store.redis.servers.connections`."""
    return lambda url, _: processes(int(url.removeprefix("redis://"))).pool()


def _remove_shields(task: trio.lowlevel.Task) -> None:
    status: CancelStatus | None = task._cancel_status  # noqa: SLF001
    while status is not None:
        status._scope.shield = False  # noqa: SLF001
        status = status._parent  # noqa: SLF001


def _texts(error: BaseException) -> str:
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(map(_texts, error.exceptions))
    return repr(error)
