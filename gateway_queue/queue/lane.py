"""One lane: the tickets of one rate limit key, first come, first served."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import suppress

import trio

Slot = trio.MemorySendChannel[float]
"""The right to answer one client, once. Its holder sends the time of the answer
(:func:`trio.current_time`), or closes it unused: then the next in line gets it."""


class Ticket:
    """A place in a lane, and the channel on which its slot comes back."""

    __slots__ = ("_receive", "_send", "joined_at", "shard")

    def __init__(self, shard: int | None) -> None:
        self.shard = shard
        self.joined_at = trio.current_time()
        # Room for the slot: a channel without any refuses it while nobody is receiving yet.
        self._send, self._receive = trio.open_memory_channel[Slot](1)

    async def slot(self) -> Slot:
        """Wait for the slot."""
        return await self._receive.receive()

    def give(self, slot: Slot) -> None:
        """Hand over the slot; once."""
        self._send.send_nowait(slot)

    def tear_up(self) -> None:
        """Close the slot, if it came in the very moment in which its receiver left."""
        with suppress(trio.WouldBlock):
            self._receive.receive_nowait().close()


class Lane:
    """The line of one rate limit key. Joining, leaving and choosing the next are O(1)."""

    def __init__(self, rate_limit_key: int) -> None:
        self.rate_limit_key = rate_limit_key
        self._line: OrderedDict[Ticket, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._line)

    def join(self, shard: int | None) -> Ticket:
        """Draw a ticket at the end of the line."""
        ticket = Ticket(shard)
        self._line[ticket] = None
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Give up a ticket whose slot was not received, be it on its way or not."""
        self._line.pop(ticket, None)
        ticket.tear_up()

    async def release(self) -> float | None:
        """Offer one slot along the line until somebody has answered.

        Returns:
          When the answer was out (:func:`trio.current_time`), or None if nobody was there.
        """
        while self._line:
            ticket, _ = self._line.popitem(last=False)
            slot, outcome = trio.open_memory_channel[float](1)
            ticket.give(slot)
            try:
                return await outcome.receive()
            except trio.EndOfChannel:
                continue
        return None
