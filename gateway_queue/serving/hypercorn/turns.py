"""Handles what clients send in small steps, a few per turn of the event loop."""

from __future__ import annotations

from itertools import islice

import trio
from trio.lowlevel import Abort, RaiseCancelT, RunVar, Task

STEPS_MAX, SHORT_SECONDS = 4, 0.0004
"""How many connections take a step in a turn if the last one took less than this; otherwise one."""


class Turns:
    """Gives all connections their turns, one after the other.

    A release takes about ten turns of the event loop, from the end of its window to its answer. So
    it comes late by ten such turns at most, however many clients send something meanwhile.
    """

    def __init__(self) -> None:
        self._waiting: dict[Task, None] = {}
        """The tasks that wait, in their order."""
        self._given = 0
        """How many tasks may take a step now."""
        self._given_at = 0.0

    async def wait(self) -> None:
        """Wait until this task may do one more step."""
        if self._given:
            await self._park()
            self._begin_step()
        else:
            self._given = 1
            try:
                await trio.lowlevel.checkpoint()
            finally:
                self._begin_step()

    def skip(self, task: Task) -> None:
        """Let a task take its step now, if it waits."""
        if task in self._waiting:
            self._let_go(task)
            self._given += 1

    def _let_go(self, task: Task) -> None:
        del self._waiting[task]
        trio.lowlevel.reschedule(task)

    async def _park(self) -> None:
        task = trio.lowlevel.current_task()
        self._waiting[task] = None

        def leave(_: RaiseCancelT) -> Abort:
            del self._waiting[task]
            return Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(leave)

    def _begin_step(self) -> None:
        """Begin a step; if it is the last of this turn, let the next tasks take theirs."""
        self._given -= 1
        if self._given:
            return
        now = trio.current_time()
        is_short = now - self._given_at < SHORT_SECONDS
        self._given_at = now
        self._given = min(len(self._waiting), STEPS_MAX if is_short else 1)
        for task in list(islice(self._waiting, self._given)):
            self._let_go(task)


_turns = RunVar[Turns]("turns")


def turns() -> Turns:
    """Return the turns of this event loop."""
    try:
        return _turns.get()
    except LookupError:
        _turns.set(Turns())
        return _turns.get()
