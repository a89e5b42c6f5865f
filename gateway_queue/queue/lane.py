"""One lane: the tickets of one rate limit key, first come, first served."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import trio
from sortedcontainers import SortedDict

from gateway_queue.store import Claim


@dataclass(frozen=True, slots=True)
class Slot:
    """The right to answer one client, once."""

    claim: Claim
    """What was claimed for it, and until when it is good."""
    outcome: trio.MemorySendChannel[float]
    """Takes the time of the answer (:func:`trio.current_time`), or is closed if there was none:
    then the next in line gets the slot."""


@dataclass(frozen=True, slots=True)
class Release:
    """A ticket that had its turn. Times are in seconds."""

    shard: int | None
    rate_limit_key: int
    at: float
    """When the answer was out, on :func:`trio.current_time`."""
    waited: float
    lateness: float
    """Since the window was open, the client here, and the shard free to start."""


class Ticket:
    """A place in the line, and the channel on which its slot comes back.

    Args:
      number: its place; lower ones go first.
      shard: whose it is; None if the client did not say.
    """

    __slots__ = ("_receive", "_send", "held_until", "here_since", "joined_at", "number", "shard")

    def __init__(self, number: int, shard: int | None) -> None:
        self.number = number
        self.shard = shard
        self.here_since = trio.current_time()
        self.joined_at = self.here_since
        """Since when it has had this place, be it with other clients before this one."""
        self.held_until = -math.inf
        # Room for the slot: a channel without any refuses it while nobody is receiving yet.
        self._send, self._receive = trio.open_memory_channel[Slot | None](1)

    def offer(self) -> Awaitable[Slot | None]:
        """Wait for the slot, or None: then it has to stand aside until ``held_until``."""
        return self._receive.receive()

    def give(self, slot: Slot | None) -> None:
        """Hand over what :meth:`offer` waits for."""
        self._send.send_nowait(slot)

    def tear_up(self) -> None:
        """Close the slot, if it came in the very moment in which its receiver left."""
        with suppress(trio.WouldBlock):
            if slot := self._receive.receive_nowait():
                slot.outcome.close()


class Lane:
    """The line of one rate limit key. Joining, leaving and choosing the next are O(log n)."""

    def __init__(self, rate_limit_key: int) -> None:
        self.rate_limit_key = rate_limit_key
        self.opens_at = -math.inf
        """When the next slot can come, as far as its dispatcher knows."""
        self.news = trio.lowlevel.ParkingLot()
        """Where its dispatcher waits until then."""
        self._line: SortedDict[int, Ticket] = SortedDict()

    def __len__(self) -> int:
        return len(self._line)

    def __iter__(self) -> Iterator[Ticket]:
        return iter(self._line.values())

    def join(self, ticket: Ticket) -> None:
        """Stand in line, at the place that the ticket's number gives."""
        self._line[ticket.number] = ticket

    def leave(self, ticket: Ticket) -> bool:
        """Step out of the line, and tell whether the ticket stood in it."""
        return self._line.pop(ticket.number, None) is not None

    def first(self) -> Ticket:
        """Return who is next, while anybody is."""
        return self._line.peekitem(0)[1]

    async def release(self, ticket: Ticket, claim: Claim) -> float | None:
        """Offer the slot to a ticket, unless it has left in the meantime.

        Returns:
          When the answer was out (:func:`trio.current_time`), or None if nobody was there.
        """
        if not self.leave(ticket):
            return None
        send, outcome = trio.open_memory_channel[float](1)
        ticket.give(Slot(claim, send))
        try:
            return await outcome.receive()
        except trio.EndOfChannel:
            return None
