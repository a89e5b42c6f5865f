"""Clients: shards that ask, hang up, ask again, and start again."""

from __future__ import annotations

import math
import random
from typing import Protocol

import trio

from tests.exploration.discord import SimulatedDiscord
from tests.exploration.door import Door, Response
from tests.exploration.process import Part, Process
from tests.exploration.record import Call, Record

MOST_HANG_UPS = 6
"""How often a client hangs up and asks again; after that it waits as long as necessary."""


class Fleet(Protocol):
    """Finds a process for a client to ask."""

    def pick(self, replica: int) -> Process | None:
        """Return a process that accepts requests, of this replica if possible."""


class Client:
    """One client of one shard.

    Args:
      number: with the seed, chooses how the client behaves.
      record: what happens in the run.
    """

    def __init__(
        self, number: int, record: Record, fleet: Fleet, door: Door, discord: SimulatedDiscord
    ) -> None:
        scenario = record.scenario
        self._random = source = random.Random(f"client {number} {scenario.source}")
        self._number = number
        self._record = record
        self._fleet = fleet
        self._door = door
        self._discord = discord
        self._replica = source.randrange(scenario.replicas)
        shards = source.choice((2, 2 * scenario.keys + 1))
        self._shard = None if source.random() < 0.1 else source.randrange(shards)
        self._starts = source.choice((1, 1, 2, 4))
        self._impatience = source.choice((0, 0.5, 0.9)) if scenario.hang_ups else 0
        self._habits = random.Random(f"habits of client {number} {scenario.source}")
        self.is_done = False

    @property
    def _faults_end_at(self) -> float:
        return self._record.scenario.fault_seconds

    async def live(self) -> None:
        """Start, and start again after crashes."""
        source = self._random
        await trio.sleep(source.choice((0, source.uniform(0, self._faults_end_at))))
        for _ in range(self._starts):
            if not await self._start():
                break
            await trio.sleep(source.choice((0.01, source.uniform(0, self._faults_end_at / 3))))
            if trio.current_time() > self._faults_end_at:
                break
        self.is_done = True

    async def _start(self) -> bool:
        """Ask until released. Return False if the client gives up for good."""
        hang_ups = 0
        while True:
            process = self._fleet.pick(self._replica)
            if process is None:
                await trio.sleep(0.1)
                continue
            part = process.parts[self._record.scenario.bot]
            call = self._call(part, hang_ups)
            response = None
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._lose_patience, process, scope, hang_ups)
                    response = await self._door.ask(part, call)
                    nursery.cancel_scope.cancel()
            if response is not None and call.confirm:
                if await self._identify_and_confirm(call, response):
                    return True
            elif call.answered_at is not None and not call.confirm:
                await trio.sleep(self._habits.uniform(0, self._record.scenario.margin))
                self._discord.identify(call)
                return True
            gave_up = (
                scope.cancelled_caught
                or (call.leaves_when_chosen and call.chosen_at)
                or call.leaves_at <= trio.current_time()
            )
            if gave_up:
                self._record.note(f"{call} gave up")
                hang_ups += 1
                if self._random.random() < 0.1:
                    return False
            await self._pause(was_closed=not gave_up)

    async def _identify_and_confirm(self, call: Call, response: Response) -> bool:
        """Identify or crash, and close the response. Return False if the client must ask again."""
        scenario, habits = self._record.scenario, self._habits
        habit = "quick"
        if trio.current_time() < self._faults_end_at:
            habit = habits.choices(("quick", "slow", "crash", "hang"), (6, 2, 1, 1))[0]
        delay = habits.uniform(0, 2 * scenario.window if habit == "slow" else 0.3)
        if habit == "hang" or delay >= scenario.confirm_seconds:
            self._record.note(f"{call} does not identify")
            await response.ended.wait()
            return False
        identifies_at = trio.current_time() + delay
        with trio.move_on_at(identifies_at):
            await response.ended.wait()
        if trio.current_time() < identifies_at:
            # The server has ended. An IDENTIFY that is already on its way still arrives.
            if scenario.store == "memory" or habits.random() < 0.7:
                return False
            await trio.sleep_until(identifies_at)
        if habit == "crash":
            self._record.note(f"{call} crashes")
        else:
            self._discord.identify(call)
            await trio.sleep(habits.choice((0, habits.uniform(0, 0.3))))
        response.close()
        return True

    def _call(self, part: Part, hang_ups: int) -> Call:
        leaves_when_chosen = (
            self._is_impatient(hang_ups) and self._random.random() < 0.2 * self._impatience
        )
        call = Call(
            number=len(self._record.calls),
            shard=self._shard,
            client=self._number,
            confirm=self._habits.random() < self._record.scenario.confirming,
            process=part.record,
            leaves_when_chosen=leaves_when_chosen,
            leaves_at=self._leaves_at(part, hang_ups),
            sent_at=trio.current_time(),
        )
        self._record.calls.append(call)
        return call

    def _leaves_at(self, part: Part, hang_ups: int) -> float:
        """Return when to leave: at the instant in which the key opens, or never."""
        if not self._is_impatient(hang_ups) or self._habits.random() >= 0.3 * self._impatience:
            return math.inf
        scenario, opens = self._record.scenario, part.record.started_at
        for call in self._record.answers:
            if ((call.shard or 0) - (self._shard or 0)) % scenario.keys == 0:
                opens = call.answered_at or 0
        at = opens + self._habits.choice((1, 1, 2)) * scenario.unconfirmed_window
        return at if trio.current_time() < at < self._faults_end_at else math.inf

    def _is_impatient(self, hang_ups: int) -> bool:
        return hang_ups < MOST_HANG_UPS and trio.current_time() < self._faults_end_at

    async def _lose_patience(
        self, process: Process, scope: trio.CancelScope, hang_ups: int
    ) -> None:
        """Hang up at some time before the faults end, or not at all."""
        if not self._is_impatient(hang_ups) or self._random.random() >= self._impatience:
            return
        left = self._faults_end_at - trio.current_time()
        if self._random.random() < 0.6:
            # Hang up while a request of the process, or its answer, is on its way.
            with trio.move_on_after(left):
                for _ in range(self._random.choice((1, 1, 2, 3))):
                    await process.sends.park()
                await trio.sleep(self._random.uniform(0, 2) * self._record.scenario.latency)
                scope.cancel()
        else:
            patience = self._random.uniform(0.01, 3) * self._record.scenario.window
            if patience < left:
                await trio.sleep(patience)
                scope.cancel()

    async def _pause(self, *, was_closed: bool) -> None:
        source = self._random
        if source.random() < 0.3:
            self._replica = source.randrange(self._record.scenario.replicas)
        if was_closed:
            await trio.sleep(source.uniform(0.01, 0.3))
        elif source.random() < 0.5:
            await trio.sleep(source.choice((0, 0.0001, 0.001)))
        else:
            keeps = self._record.scenario.place_seconds or 2
            await trio.sleep(source.choice((0.01, source.uniform(0, 1.3 * keeps))))
