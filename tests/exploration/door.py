"""How a client's request reaches a process, and how the answer comes back."""

from __future__ import annotations

import math
import random
from typing import Protocol

import trio

from gateway_queue.queue.ticket import NotAnswered
from tests.exploration.process import Part
from tests.exploration.record import Call


class Response(Protocol):
    """An answer. For a confirmed ticket, it stays open until one side closes it."""

    ended: trio.Event
    """Set when the server has closed it, or has ended."""

    def close(self) -> None:
        """Close it from the client's side."""


class Door(Protocol):
    """Takes the requests of clients to processes."""

    async def ask(self, part: Part, call: Call) -> Response | None:
        """Ask for a shard, and wait. A client that gives up cancels this.

        The door notes in the record of the run what the process sees of the call (``arrived``,
        ``chosen``, ``left``, ``confirmed``), and ``answered`` at the moment when the answer is on
        the wire.

        Returns:
          The answer, or None if the connection was closed without one.
        """


class DirectDoor:
    """Calls :meth:`gateway_queue.queue.Queue.turn`, without HTTP: the fast mode."""

    def __init__(self, random_source: random.Random) -> None:
        self._random = random_source

    async def ask(self, part: Part, call: Call) -> Response | None:
        process = part.process
        await trio.sleep(self._random.uniform(0, 0.001))
        if not process.accepts:
            return None
        visit = _Visit(self._random, part, call)
        process.nursery.start_soon(visit.run)
        try:
            await visit.decided.wait()
        except trio.Cancelled:
            visit.close()
            raise
        return visit if call.answered_at is not None else None


class _Visit:
    """What the server does for one call."""

    def __init__(self, random_source: random.Random, part: Part, call: Call) -> None:
        self.ended = trio.Event()
        self.decided = trio.Event()
        """Set when the answer is on the wire, or when there will be none."""
        self._random = random_source
        self._part = part
        self._process = part.process
        self._call = call
        self._record = part.bot.record
        self._scope = trio.CancelScope()
        self._is_answering = False

    async def run(self) -> None:
        process, call = self._process, self._call
        try:
            with self._scope:
                await process.thawed()
                if self._scope.cancel_called:
                    return  # the client has left while the process was frozen
                self._record.step(call, "arrived")
                self._part.calls.append(call)
                if call.leaves_at < math.inf:
                    process.nursery.start_soon(self._leave_in_time)
                await self._take_turn()
        finally:
            if call.answered_at is not None:
                if call.confirm and process.is_alive:
                    was_closed = self._scope.cancelled_caught
                    self._record.step(call, "confirmed" if was_closed else "unconfirmed")
            elif self._scope.cancelled_caught and call.arrived_at is not None:
                self._record.step(call, "left")
            if call in self._part.calls:
                self._part.calls.remove(call)
            if call.ended_at is None:
                call.ended_at = trio.current_time()
            self.ended.set()
            self.decided.set()

    async def _leave_in_time(self) -> None:
        with trio.move_on_at(self._call.leaves_at) as in_time:
            await self.decided.wait()
        if in_time.cancelled_caught:
            self._call.closed_at = trio.current_time()
            await self._process.thawed()
            self._leave()

    async def _take_turn(self) -> None:
        try:
            call = self._call
            async with self._part.queue.turn(call.shard, confirm=call.confirm) as turn:
                self._record.step(self._call, "chosen")
                if self._call.leaves_when_chosen:
                    self._leave()
                await self._answer(turn.answer_by)
                if call.confirm:
                    turn.answered()
                    await trio.sleep(turn.confirm_seconds)
                    await self._process.thawed()
        except NotAnswered:
            self._record.step(self._call, "left")  # sent to another replica
        except trio.TooSlowError:
            self._record.note(f"{self._call}: too late to answer, closed")
            self._record.step(self._call, "failed")
        except Exception as error:  # noqa: BLE001
            if self._process.is_alive:
                self._call.failure = repr(error)
                self._record.step(self._call, "failed")
                self._record.wrong.append(("no-failure", f"{self._call}: {error!r}"))
                await trio.sleep_forever()  # the server holds the request, too

    async def _answer(self, answer_by: float) -> None:
        """Put the answer on the wire, if it is not too late and the client has not left."""
        await trio.lowlevel.checkpoint_if_cancelled()
        self._is_answering = True
        with trio.CancelScope(shield=True):
            await trio.sleep(self._random.choice((0, 0.0002, 0.005)))
            await self._process.thawed()
        if not self._process.is_alive:
            raise ConnectionAbortedError
        if trio.current_time() > answer_by:
            raise trio.TooSlowError
        self._record.step(self._call, "answered")
        self.decided.set()

    def close(self) -> None:
        """Disconnect; the server notices it a little later."""
        if not self.ended.is_set():
            self._call.closed_at = trio.current_time()
        if not self._process.ended.is_set():
            self._process.nursery.start_soon(self.hang_up)

    async def hang_up(self) -> None:
        await trio.sleep(self._random.choice((0, 0, 0.0005, 0.02)))
        await self._process.thawed()
        self._leave()

    def _leave(self) -> None:
        if self._call.ended_at is None and not self._is_answering:
            self._call.ended_at = trio.current_time()
        self._scope.cancel()
