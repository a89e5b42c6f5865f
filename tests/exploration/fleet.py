"""The replicas of a run, each with at most one process."""

from __future__ import annotations

import random

import trio

from tests.exploration.discord import SimulatedDiscord
from tests.exploration.process import Process
from tests.exploration.record import Record
from tests.exploration.redis_server import SimulatedRedis


class Fleet:
    """Starts processes, and lets clients find them."""

    def __init__(
        self,
        nursery: trio.Nursery,
        record: Record,
        redis: SimulatedRedis,
        discord: SimulatedDiscord,
    ) -> None:
        self.processes: list[Process] = []
        """All that there have been, by number."""
        self._nursery = nursery
        self._record = record
        self._redis = redis
        self._discord = discord

    @property
    def alive(self) -> list[Process]:
        return [process for process in self.processes if process.is_alive]

    async def start(self, replica: int) -> None:
        """Start a process, unless this replica has one."""
        if any(process.record.replica == replica for process in self.alive):
            return
        is_first = not any(process.record.replica == replica for process in self.processes)
        hold = self._record.scenario.hold_on_start or not is_first
        process = Process(self._record, replica, self._redis, self._discord, hold_on_start=hold)
        self.processes.append(process)
        with trio.CancelScope(shield=True):
            await self._nursery.start(process.run)

    async def mend(self) -> None:
        """Let every replica have a process that runs."""
        for process in self.alive:
            process.thaw()
        for replica in range(self._record.scenario.replicas):
            await self.start(replica)

    def pick(self, replica: int) -> Process | None:
        """Return a process that accepts requests, of this replica if possible."""
        accepting = [process for process in self.alive if process.accepts]
        of_replica = [one for one in accepting if one.record.replica == replica]
        return next(iter(of_replica or accepting), None)

    def any(self, random_source: random.Random) -> Process | None:
        """Choose a process that accepts requests."""
        accepting = [process for process in self.alive if process.accepts]
        return random_source.choice(accepting) if accepting else None
