"""A ticket: one client that waits for its slot, and the context in which it is answered."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

import trio

from gateway_queue.queue.events import ReleasedAtOnce, SlotTooLate
from gateway_queue.store import Claim

if TYPE_CHECKING:
    from gateway_queue.queue.lane import Place
    from gateway_queue.queue.queue import Queue


class NotAnswered(Exception):
    """A client has left, or was dismissed, before the first byte of its answer."""


@dataclass(frozen=True, slots=True)
class Slot:
    """The right to answer one client, once."""

    claim: Claim
    """The claim of the key, with the times until which it can be used."""
    outcome: trio.MemorySendChannel[float]
    """Receives the time of the answer (:func:`trio.current_time`). If the client was not answered,
    it is closed without a time, and the next ticket gets the slot. If the ticket is confirmed, it
    also receives the time of the confirmation, or is closed without it."""


class Turn(Protocol):
    """The interface by which the caller answers a client whose turn it is."""

    @property
    def answer_by(self) -> float:
        """The latest time at which the answer may be written (:func:`trio.current_time`)."""

    @property
    def confirm_seconds(self) -> float:
        """How long a confirmed ticket may take from its answer to its confirmation."""

    def answered(self) -> None:
        """Note that the answer of a confirmed ticket is written.

        From then on, the client confirms the ticket by closing its response.
        """


class Ticket:
    """A connected client, and the channel on which its slot comes.

    As a context it waits for the slot; see :meth:`Queue.turn`. The context runs in the task of the
    client's request; :meth:`offer` and :meth:`dismiss` are called from other tasks.

    Args:
      queue: where it waits.
      shard: the shard that it asks for; None if the client named none.
      confirm: whether the client will confirm that the shard has identified.
    """

    # A class, because a context made by a generator takes 0.8 kB more for each client.
    __slots__ = (
        "_has_answer",
        "_queue",
        "_receive",
        "_send",
        "_slot",
        "confirm",
        "connected_at",
        "place",
        "shard",
    )

    place: Place
    """The ticket's place. When another client of the same shard leaves, it can change to a place
    further in front."""
    _slot: Slot

    def __init__(self, queue: Queue, shard: int | None, *, confirm: bool) -> None:
        self.shard = shard
        self.confirm = confirm
        self.connected_at = trio.current_time()
        self._queue = queue
        self._has_answer = False
        # A buffer for one slot: without it, a slot could be sent only while its receiver waits.
        self._send, self._receive = trio.open_memory_channel[Slot](1)

    async def __aenter__(self) -> Turn:
        """Join the queue, and wait for a slot that comes in time to be used."""
        self._queue.join(self)
        try:
            while True:
                self._slot = await self._receive.receive()
                if trio.current_time() <= self.answer_begins_by:
                    return self
                self._queue.report(SlotTooLate())
                self._slot.outcome.close()
        except trio.EndOfChannel:
            self._leave()
            raise NotAnswered from None
        except BaseException:
            self._leave()
            raise

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Tell the dispatcher whether the slot was used."""
        with self._slot.outcome as outcome:
            if error is None or (
                isinstance(error, Exception) and not isinstance(error, NotAnswered)
            ):
                self.answered()
            elif isinstance(error, trio.Cancelled) and self._has_answer and self._queue.is_open:
                outcome.send_nowait(trio.current_time())  # the client has closed its response
        if not self._has_answer:
            self._leave()

    @property
    def answer_begins_by(self) -> float:
        """The latest time at which an answer may begin (:func:`trio.current_time`)."""
        return self._slot.claim.begin_by

    @property
    def answer_by(self) -> float:
        return self._slot.claim.answer_by

    @property
    def confirm_seconds(self) -> float:
        return self._queue.store.rules.confirm_seconds

    def answered(self) -> None:
        """Tell the dispatcher, once, that the client has its answer."""
        if not self._has_answer:
            self._has_answer = True
            self._queue.release(self)
            self._slot.outcome.send_nowait(trio.current_time())

    def offer(self, slot: Slot) -> None:
        """Send the slot to the client."""
        self._send.send_nowait(slot)

    def dismiss(self) -> None:
        """End the request of the client without an answer."""
        self._send.close()

    @property
    def is_dismissed(self) -> bool:
        """Whether :meth:`dismiss` was called; the ticket may keep its place for a moment."""
        return not self._send.statistics().open_send_channels

    def _leave(self) -> None:
        """Leave the queue, and give back a slot that came in the same moment."""
        self._queue.leave(self)
        with suppress(trio.WouldBlock, trio.EndOfChannel):
            self._receive.receive_nowait().outcome.close()


class UnpacedTicket:
    """A ticket while ``max_concurrency`` is 0: it is answered at once.

    Args:
      queue: counts the ticket.
    """

    answer_by = math.inf

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._has_answer = False

    async def __aenter__(self) -> Turn:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.answered()

    @property
    def confirm_seconds(self) -> float:
        return self._queue.store.rules.confirm_seconds

    def answered(self) -> None:
        """Count the ticket, once; no window starts."""
        if not self._has_answer:
            self._has_answer = True
            self._queue.released += 1
            self._queue.report(ReleasedAtOnce())
