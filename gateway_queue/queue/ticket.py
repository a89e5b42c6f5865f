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
    """A client has left, or is let go, before the first byte of its answer."""


@dataclass(frozen=True, slots=True)
class Slot:
    """The right to answer one client, once."""

    claim: Claim
    """The claimed key, and until when the claim is good."""
    outcome: trio.MemorySendChannel[float]
    """Receives the time of the answer (:func:`trio.current_time`). It is closed without one if the
    client was not answered; then the next ticket gets the slot. A confirmed ticket's receives the
    time of the confirmation too, or is closed without one."""


class Turn(Protocol):
    """What the caller needs to answer a client whose turn it is."""

    @property
    def answer_by(self) -> float:
        """When the answer has to be out (:func:`trio.current_time`)."""

    @property
    def confirm_seconds(self) -> float:
        """How long a confirmed ticket may take from its answer to its confirmation."""

    def answered(self) -> None:
        """Note that the answer of a confirmed ticket is out.

        From then on, the end of its client's connection confirms it.
        """


class Ticket:
    """A connected client, and the channel on which its slot comes.

    As a context it waits for the slot; see :meth:`Queue.turn`. All of it runs in the task of the
    client's request, except :meth:`offer`.

    Args:
      queue: where it waits.
      shard: the shard that it asks for; None if the client named none.
      confirm: whether the client will say when it has identified.
    """

    # A context made by a generator takes 0.8 kB more for each client.
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
        # Room for one slot: a channel without any refuses a slot while its receiver is not waiting.
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
        """Tell the dispatcher what became of the slot."""
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
        """Until when an answer may begin."""
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
        """Let the client go without an answer."""
        self._send.close()

    @property
    def is_dismissed(self) -> bool:
        """Whether the client was let go; the ticket is still in its place for a moment."""
        return not self._send.statistics().open_send_channels

    def _leave(self) -> None:
        """Leave the queue. A slot may have come in the moment in which the client left."""
        self._queue.leave(self)
        with suppress(trio.WouldBlock, trio.EndOfChannel):
            self._receive.receive_nowait().outcome.close()


class UnpacedTicket:
    """A ticket where ``max_concurrency`` is 0: it waits for nothing.

    Args:
      queue: which counts it.
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
