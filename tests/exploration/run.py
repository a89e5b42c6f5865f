"""One run: the scenarios of all bots, from their start until all clients have left."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from unittest.mock import patch

import structlog
import trio
from trio._core import _run
from trio.testing import MockClock, wait_all_tasks_blocked

from gateway_queue.queue.lane import Place
from gateway_queue.store.redis import servers
from gateway_queue.store.redis.servers import OVERLAP_SECONDS
from tests.exploration.clients import Client
from tests.exploration.discord import SimulatedDiscord
from tests.exploration.door import DirectDoor
from tests.exploration.faults import Faults
from tests.exploration.fleet import Fleet
from tests.exploration.invariants import loop_delay
from tests.exploration.primaries import Primaries
from tests.exploration.process import Bot, Part, connections_to, sentinel_connections_to
from tests.exploration.record import History, Record
from tests.exploration.redis_server import SimulatedRedis
from tests.exploration.scenario import Scenario, draw_all
from tests.exploration.transitions import WatchedState


def explore(seed: int, *, without: frozenset[str] = frozenset(), full: bool = False) -> History:
    """Run the scenarios of a seed.

    Args:
      seed: chooses everything.
      without: kinds of faults that must not happen.
      full: whether to note each request to Redis and each line of the log.
    """
    history = History(full)
    history.records = [Record(scenario, history) for scenario in draw_all(seed, without)]
    with _repeatable(seed, history):
        trio.run(_Run(history).run, clock=MockClock(autojump_threshold=0))
    return history


@contextmanager
def _repeatable(seed: int, history: History) -> Iterator[None]:
    """Take everything random from the seed, until the end of the context."""
    source = random.Random(f"system {seed}")
    state = random.getstate()
    random.seed(seed)
    _run._r.seed(seed)  # noqa: SLF001
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(patch.object(_run, "_ALLOW_DETERMINISTIC_SCHEDULING", new=True))
        enter(patch.object(os, "urandom", source.randbytes))  # where uuid4 comes from
        enter(_log_into(history))
        report = partial(_note_transition, history)
        enter(patch.object(Place, "state", WatchedState(report)))
        yield
    random.setstate(state)


def _note_transition(history: History, why: str) -> None:
    history.records[0].wrong.append(("transitions", f"at {trio.current_time():.6f} {why}"))


@contextmanager
def _log_into(history: History) -> Iterator[None]:
    """Write the log to the history if that is full; otherwise drop the log."""

    def note(_: object, __: str, event: structlog.typing.EventDict) -> str:
        name = event.pop("event")
        history.note("log: " + " ".join([name, *(f"{k}={v}" for k, v in event.items())]))
        raise structlog.DropEvent

    before = structlog.get_config()
    level = "debug" if history.is_full else "critical"
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
    def __init__(self, history: History) -> None:
        self._history = history
        self._scenario: Scenario = history.records[0].scenario

    async def run(self) -> None:
        history, scenario = self._history, self._scenario
        for record in history.records:
            record.note(str(record.scenario))
        async with trio.open_nursery() as nursery:
            source = _source("redis", scenario)
            make_server = partial(SimulatedRedis, nursery, history, scenario, source)
            self._primaries = Primaries(make_server, scenario, source)
            bots = [
                Bot(record, SimulatedDiscord(record, _source("discord", record.scenario)))
                for record in history.records
            ]
            self._fleet = Fleet(nursery, history, self._primaries, bots)
            process = self._fleet.processes.__getitem__
            with ExitStack() as stack:
                enter = stack.enter_context
                enter(patch.object(servers, "connections", connections_to(process)))
                enter(patch.object(servers, "ConnectionPool", sentinel_connections_to(process)))
                await self._play(bots)
            nursery.cancel_scope.cancel()

    async def _play(self, bots: Sequence[Bot]) -> None:
        for replica in range(self._scenario.replicas):
            await self._fleet.start(replica)
        runs = [_BotRun(bot, self._fleet, self._primaries) for bot in bots]
        async with trio.open_nursery() as nursery:
            for run in runs:
                nursery.start_soon(run.play)
        if all(run.is_over for run in runs):
            await self._check_that_nothing_is_left(runs)
        for record in self._history.records:
            record.ended_at = trio.current_time()
        for process in self._fleet.alive:
            await process.stop()
        self._history.note("the end")

    async def _check_that_nothing_is_left(self, runs: Sequence[_BotRun]) -> None:
        """Wait until every place has expired, and report everything that remains."""
        scenarios = [record.scenario for record in self._history.records]
        await trio.sleep(max(one.place_seconds + 4 * one.window + 5 for one in scenarios))
        await wait_all_tasks_blocked()
        for run in runs:
            run.look_for_leftovers()
        if keys := self._primaries.current.data.keys_without_expiry():
            self._report_left(f"Redis keys that never expire: {keys}")
        await self._compare_tasks()

    async def _compare_tasks(self) -> None:
        """Compare the tasks of each process with those of a process that never had a client."""
        old = {process: process.tasks() for process in self._fleet.alive}
        await self._fleet.start(self._scenario.replicas)
        longest = max(record.scenario.window for record in self._history.records)
        await trio.sleep(4 * longest + 5)
        await wait_all_tasks_blocked()
        fresh = self._fleet.alive[-1].tasks()
        for process, tasks in old.items():
            if tasks != fresh:
                self._report_left(f"{process} has the tasks {tasks}, a new process {fresh}")

    def _report_left(self, why: str) -> None:
        self._history.records[0].wrong.append(("nothing-left", why))


class _BotRun:
    """One bot of a run: its clients, and the faults of its scenario."""

    def __init__(self, bot: Bot, fleet: Fleet, primaries: Primaries) -> None:
        self._record, self._discord = bot.record, bot.discord
        self._scenario = scenario = bot.scenario
        self._fleet = fleet
        self._faults = Faults(bot.record, fleet, primaries, bot.discord)
        door = DirectDoor(_source("door", scenario))
        self._clients = [
            Client(number, bot.record, fleet, door, bot.discord)
            for number in range(scenario.clients)
        ]

    @property
    def is_over(self) -> bool:
        """Whether all clients are done: their shards have started, or they have given up."""
        return all(client.is_done for client in self._clients)

    def _parts(self) -> list[Part]:
        """Return what each process that is alive has for this bot."""
        return [process.parts[self._scenario.bot] for process in self._fleet.alive]

    async def play(self) -> None:
        record = self._record
        async with trio.open_nursery() as nursery:
            for client in self._clients:
                nursery.start_soon(client.live)
            nursery.start_soon(self._compare_lengths)
            await self._faults.run()
            record.healed_at = trio.current_time()
            record.note("everything works again")
            record.settled_at = record.healed_at + self._time_to_settle()
            await self._wait_for_releases()
            nursery.cancel_scope.cancel()

    def look_for_leftovers(self) -> None:
        for part in self._parts():
            for leftover in part.leftovers():
                self._record.wrong.append(("nothing-left", f"{part.process}: {leftover}"))

    def _time_to_settle(self) -> float:
        """Return for how many seconds past faults may still delay the next release."""
        scenario = self._scenario
        lease = scenario.lease
        time = 3 * lease if scenario.store == "memory" else 4 * lease + 6
        time += 2 * OVERLAP_SECONDS if scenario.has_standbys else 0
        time += scenario.confirm_seconds if scenario.confirming else 0
        if scenario.has_token:
            # The next request to Discord comes after at most twice the time that it was down.
            longest_down = 4 * scenario.window if "discord-down" in scenario.faults else 0
            time += scenario.refresh + 2 * longest_down + 7 * scenario.window + 2
        return time

    def _is_limit_spent(self) -> bool:
        """Return whether the configured limit is spent for a day, if it is the only limit."""
        scenario = self._scenario
        if scenario.has_token or not scenario.session_start_limit:
            return False
        if scenario.store == "redis" and any(one.was_killed for one in self._record.processes):
            return True  # its last claim may have been used, so it counts
        if any(one.ended_at for one in self._record.processes):
            # A claim of a process that was stopped while Redis was unreachable stays counted.
            return any(part.queue.store.session_starts().spent for part in self._parts())
        return scenario.session_start_limit <= len(self._record.answers)

    async def _wait_for_releases(self) -> None:
        """Wait until every client is released, or until the time for that is over."""
        scenario, record = self._scenario, self._record
        deadline = record.settled_at
        while not self.is_over:
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
                alive = [part.record for part in self._parts()]
                record.unreleased = [
                    call
                    for call in record.calls
                    if call.process in alive and call.arrived_at and call.ended_at is None
                ]
                return

    def _time_for_all(self) -> float:
        """Return the longest time until the last client is released."""
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

    async def _compare_lengths(self) -> None:
        """Compare the length of each queue with the number of calls that wait there."""
        source = _source("samples", self._scenario)
        while True:
            await trio.sleep(source.uniform(0.2, 1.5) * self._scenario.window)
            await wait_all_tasks_blocked()
            for part in self._parts():
                waiting = [call for call in part.calls if call.waits]
                if len(part.queue) != len(waiting) and part.process.accepts:
                    why = (
                        f"{part.process}: len(queue) is {len(part.queue)}, but {len(waiting)} wait "
                        f"at {trio.current_time():.6f}: {', '.join(map(str, waiting))}"
                    )
                    self._record.wrong.append(("length", why))


def _source(name: str, scenario: Scenario) -> random.Random:
    return random.Random(f"{name} {scenario.source}")
