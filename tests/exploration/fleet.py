"""The replicas of a run, each with at most one process."""

from __future__ import annotations

import random
from collections.abc import Sequence

import trio

from tests.exploration.primaries import Primaries
from tests.exploration.process import Bot, Process
from tests.exploration.record import History


class Fleet:
    """Starts processes, and lets clients find them."""

    def __init__(
        self,
        nursery: trio.Nursery,
        history: History,
        primaries: Primaries,
        bots: Sequence[Bot],
    ) -> None:
        self.processes: list[Process] = []
        """All processes of the run, in the order of their numbers, also those that have ended."""
        self._nursery = nursery
        self._history = history
        self._primaries = primaries
        self._bots = bots

    @property
    def alive(self) -> list[Process]:
        return [process for process in self.processes if process.is_alive]

    async def start(self, replica: int) -> None:
        """Start a process, unless this replica has one."""
        if any(process.replica == replica for process in self.alive):
            return
        is_first = not any(process.replica == replica for process in self.processes)
        hold = self._bots[0].scenario.hold_on_start or not is_first
        number = len(self.processes)
        process = Process(
            number, replica, self._history, self._primaries, self._bots, hold_on_start=hold
        )
        self.processes.append(process)
        with trio.CancelScope(shield=True):
            await self._nursery.start(process.run)

    async def mend(self) -> None:
        """Thaw all processes, and start one for each replica that has none."""
        for process in self.alive:
            process.thaw()
        for replica in range(self._bots[0].scenario.replicas):
            await self.start(replica)

    def pick(self, replica: int) -> Process | None:
        """Return a process that accepts requests, of this replica if possible."""
        accepting = [process for process in self.alive if process.accepts]
        of_replica = [one for one in accepting if one.replica == replica]
        return next(iter(of_replica or accepting), None)

    def any(self, random_source: random.Random) -> Process | None:
        """Choose a process that accepts requests."""
        accepting = [process for process in self.alive if process.accepts]
        return random_source.choice(accepting) if accepting else None
