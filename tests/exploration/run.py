"""One run: a scenario, from its start until everybody has left."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from unittest.mock import patch

import structlog
import trio
from trio._core import _run
from trio.testing import MockClock, wait_all_tasks_blocked

from gateway_queue.queue.lane import Place
from gateway_queue.store.redis import servers
from tests.exploration.clients import Client
from tests.exploration.discord import SimulatedDiscord
from tests.exploration.door import DirectDoor
from tests.exploration.faults import Faults
from tests.exploration.fleet import Fleet
from tests.exploration.invariants import loop_delay
from tests.exploration.process import connections_to
from tests.exploration.record import Record
from tests.exploration.redis_server import SimulatedRedis
from tests.exploration.scenario import Scenario, draw
from tests.exploration.transitions import WatchedState


def explore(seed: int, *, without: frozenset[str] = frozenset(), full: bool = False) -> Record:
    """Run the scenario of a seed.

    Args:
      seed: chooses everything.
      without: kinds of faults that must not happen.
      full: whether to note each request to Redis and each line of the log.
    """
    record = Record(draw(seed, without), full)
    with _repeatable(seed, record):
        trio.run(_Run(record).run, clock=MockClock(autojump_threshold=0))
    return record


@contextmanager
def _repeatable(seed: int, record: Record) -> Iterator[None]:
    """Let everything that is random come from the seed."""
    source = random.Random(f"system {seed}")
    state = random.getstate()
    random.seed(seed)
    _run._r.seed(seed)  # noqa: SLF001
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(patch.object(_run, "_ALLOW_DETERMINISTIC_SCHEDULING", new=True))
        enter(patch.object(os, "urandom", source.randbytes))  # where uuid4 comes from
        enter(_log_into(record))
        report = partial(_note_transition, record)
        enter(patch.object(Place, "state", WatchedState(report)))
        yield
    random.setstate(state)


def _note_transition(record: Record, why: str) -> None:
    record.wrong.append(("transitions", f"at {trio.current_time():.6f} {why}"))


@contextmanager
def _log_into(record: Record) -> Iterator[None]:
    """Let the log go to the history if that is full, and nowhere if not."""

    def note(_: object, __: str, event: structlog.typing.EventDict) -> str:
        name = event.pop("event")
        record.note("log: " + " ".join([name, *(f"{k}={v}" for k, v in event.items())]))
        raise structlog.DropEvent

    before = structlog.get_config()
    level = "debug" if record.is_full else "critical"
    structlog.configure(
        processors=[note],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=False,
    )
    try:
        yield
    finally:
        structlog.configure(**before)


class _Run:
    def __init__(self, record: Record) -> None:
        self._record = record
        self._scenario: Scenario = record.scenario
        self._clients: list[Client] = []

    async def run(self) -> None:
        scenario = self._scenario
        self._record.note(str(scenario))
        async with trio.open_nursery() as nursery:
            self._redis = SimulatedRedis(nursery, self._record, self._source("redis"))
            self._discord = SimulatedDiscord(self._record, self._source("discord"))
            self._fleet = Fleet(nursery, self._record, self._redis, self._discord)
            connections = connections_to(self._fleet.processes.__getitem__)
            with ExitStack() as stack:
                stack.enter_context(patch.object(servers, "connections", connections))
                await self._play(nursery)
            nursery.cancel_scope.cancel()

    def _source(self, name: str) -> random.Random:
        return random.Random(f"{name} {self._scenario.seed}")

    async def _play(self, nursery: trio.Nursery) -> None:
        record, scenario = self._record, self._scenario
        for replica in range(scenario.replicas):
            await self._fleet.start(replica)
        door = DirectDoor(self._source("door"))
        self._clients = [
            Client(number, record, self._fleet, door, self._discord)
            for number in range(scenario.clients)
        ]
        for client in self._clients:
            nursery.start_soon(client.live)
        nursery.start_soon(self._compare_lengths)
        await Faults(record, self._fleet, self._redis, self._discord).run()
        record.healed_at = trio.current_time()
        record.note("everything works again")
        record.settled_at = record.healed_at + self._time_to_settle()
        await self._wait_for_releases()
        await self._wait_for_nothing_left()
        record.ended_at = trio.current_time()
        for process in self._fleet.alive:
            await process.stop()
        record.note("the end")

    def _time_to_settle(self) -> float:
        """Return for how long the faults of before may still delay the next release."""
        scenario = self._scenario
        lease = scenario.lease
        time = 3 * lease if scenario.store == "memory" else 4 * lease + 6
        time += scenario.confirm_seconds if scenario.confirming else 0
        if scenario.has_token:
            # Discord is asked again at last after twice the time that it was down.
            longest_down = 4 * scenario.window if "discord-down" in scenario.faults else 0
            time += scenario.refresh + 2 * longest_down + 7 * scenario.window + 2
        return time

    def _is_limit_spent(self) -> bool:
        """Tell whether the user's own limit leaves no start for a day, without Discord's."""
        scenario = self._scenario
        if scenario.has_token or not scenario.session_start_limit:
            return False
        if scenario.store == "redis" and any(one.was_killed for one in self._record.processes):
            return True  # what such a process had claimed may be used, and counts
        if any(one.ended_at for one in self._record.processes):
            # A claim of a process that was stopped while Redis was away stays counted.
            return any(one.queue.store.session_starts().spent for one in self._fleet.alive)
        return scenario.session_start_limit <= len(self._record.answers)

    async def _wait_for_releases(self) -> None:
        """Wait until every client was released, or should long have been."""
        scenario, record = self._scenario, self._record
        deadline = record.settled_at
        while not all(client.is_done for client in self._clients):
            await trio.sleep(scenario.window / 2)
            now = trio.current_time()
            if self._is_limit_spent():
                return
            if scenario.has_token and self._discord.is_spent:
                if self._discord.resets_at > now + 600:
                    return
                reset_seen_at = self._discord.resets_at + scenario.refresh
                deadline = max(deadline, reset_seen_at)
            if now > deadline + self._time_for_all():
                alive = [process.record for process in self._fleet.alive]
                record.unreleased = [
                    call
                    for call in record.calls
                    if call.process in alive and call.arrived_at and call.ended_at is None
                ]
                return

    def _time_for_all(self) -> float:
        """Return the longest time until the last one is released, when all are served in turn."""
        scenario = self._scenario
        calls = [call for call in self._record.calls if call.shard is not None]
        released = Counter(call.shard for call in calls if call.answered_at is not None)
        waiting = Counter(call.shard for call in calls if call.ended_at is None)
        held = (
            sum(loop_delay(scenario.loop_free_starts, starts) for starts in range(before + more))
            for shard, more in waiting.items()
            # With Redis, a claim whose reply is lost may count as one more start for a while.
            for before in [released[shard] + (2 if scenario.store == "redis" else 0)]
        )
        return (scenario.lease + 0.6) * (len(self._clients) + 2) + max(held, default=0)

    async def _wait_for_nothing_left(self) -> None:
        """Look for what remains when everybody has left and every place has expired."""
        record, scenario = self._record, self._scenario
        for process in self._fleet.alive:
            if any(not client.is_done for client in self._clients):
                return
            del process
        await trio.sleep(scenario.place_seconds + 4 * scenario.window + 5)
        await wait_all_tasks_blocked()
        for process in self._fleet.alive:
            for leftover in process.leftovers():
                record.wrong.append(("nothing-left", f"{process}: {leftover}"))
        if keys := self._redis.data.keys_without_expiry():
            record.wrong.append(("nothing-left", f"Redis keys that never expire: {keys}"))
        await self._compare_tasks()

    async def _compare_tasks(self) -> None:
        """Compare the tasks of each process with those of one that never had a client."""
        record = self._record
        old = {process: process.tasks() for process in self._fleet.alive}
        replica = self._scenario.replicas
        await self._fleet.start(replica)
        await trio.sleep(4 * self._scenario.window + 5)
        await wait_all_tasks_blocked()
        fresh = self._fleet.alive[-1].tasks()
        for process, tasks in old.items():
            if tasks != fresh:
                why = f"{process} has the tasks {tasks}, a new process {fresh}"
                record.wrong.append(("nothing-left", why))

    async def _compare_lengths(self) -> None:
        """Compare what each queue thinks of its length with who waits there."""
        source = self._source("samples")
        while True:
            await trio.sleep(source.uniform(0.2, 1.5) * self._scenario.window)
            await wait_all_tasks_blocked()
            for process in self._fleet.alive:
                waiting = [call for call in process.calls if call.waits]
                if len(process.queue) != len(waiting) and process.accepts:
                    why = (
                        f"{process}: len(queue) is {len(process.queue)}, but {len(waiting)} wait "
                        f"at {trio.current_time():.6f}: {', '.join(map(str, waiting))}"
                    )
                    self._record.wrong.append(("length", why))
