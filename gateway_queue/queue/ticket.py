"""One client that waits, and what it waits for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from gateway_queue.store import Claim

if TYPE_CHECKING:
    from gateway_queue.queue.lane import Place


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


@dataclass(frozen=True, slots=True)
class Turn:
    """A ticket's turn: what the caller has to know to answer its client."""

    answer_by: float
    """When the answer has to be out (:func:`trio.current_time`)."""
    confirm_seconds: float
    """How long a confirmed ticket may take from its answer to its confirmation."""
    answered: Callable[[], None]
    """For a confirmed ticket: to be called when the answer is out. From then on, the end of its
    client's connection confirms it."""


class Ticket:
    """A connected client, and the channel on which its slot comes.

    Args:
      shard: the shard that it asks for; None if the client named none.
      confirm: whether the client will say when it has identified.
    """

    __slots__ = ("_receive", "_send", "confirm", "here_since", "place", "shard")

    place: Place
    """The ticket's place. When another client of the same shard leaves, it can change to a place
    further in front."""

    def __init__(self, shard: int | None, *, confirm: bool) -> None:
        self.shard = shard
        self.confirm = confirm
        self.here_since = trio.current_time()
        # Room for one slot: a channel without any refuses a slot while its receiver is not waiting.
        self._send, self._receive = trio.open_memory_channel[Slot](1)

    async def slot(self) -> Slot:
        """Wait for the slot.

        Raises:
          NotAnswered: there will be none.
        """
        try:
            return await self._receive.receive()
        except trio.EndOfChannel:
            raise NotAnswered from None

    def offer(self, slot: Slot) -> None:
        """Send the slot to the client."""
        self._send.send_nowait(slot)

    def dismiss(self) -> None:
        """Let the client go without an answer."""
        self._send.close()

    def refuse_unread_slot(self) -> None:
        """Close a slot that came in the moment in which the client left."""
        with suppress(trio.WouldBlock, trio.EndOfChannel):
            self._receive.receive_nowait().outcome.close()
