"""The places of shards whose clients have gone away while they waited."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter

import trio

from gateway_queue.queue.lane import Ticket

_number = attrgetter("number")


@dataclass(frozen=True, slots=True)
class Place:
    """What a ticket has left behind. Times are of :func:`trio.current_time`."""

    number: int
    shard: int
    joined_at: float
    expires_at: float


class Places:
    """Keeps a place for a while after its client has gone away.

    A client that gives up and asks again may be here before it is seen to have left. So it does
    not matter which client of a shard leaves: those that stay have the foremost of its places.

    Args:
      seconds: how long a place is kept.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        # The one that expires next in front, for all are kept equally long.
        self._empty: dict[int, Place] = {}
        # By shard, the foremost first.
        self._empty_of: dict[int, list[Place]] = {}
        self._taken_of: dict[int, list[Ticket]] = {}
        self._news = trio.lowlevel.ParkingLot()

    def __iter__(self) -> Iterator[Place]:
        """Go over the places where nobody stands."""
        return iter(self._empty.values())

    def take(self, ticket: Ticket) -> None:
        """Let a new ticket have the foremost empty place of its shard, if there is one."""
        if (shard := self._shard(ticket)) is None:
            return
        if empty := self._empty_of.get(shard):
            ticket.number, ticket.joined_at = empty[0].number, empty[0].joined_at
            self._forget(empty[0])
        insort(self._taken_of.setdefault(shard, []), ticket, key=_number)

    def last_taken(self, ticket: Ticket) -> Ticket:
        """Return the ticket that has the hindmost place of the same shard."""
        shard = self._shard(ticket)
        return ticket if shard is None else self._taken_of[shard][-1]

    def leave(self, ticket: Ticket) -> None:
        """Keep a place of a shard one of whose clients has gone away.

        It is the hindmost one: who had that gets the place of the ticket.
        """
        if (shard := self._shard(ticket)) is None:
            return
        taken = self._taken_of[shard]
        last = taken[-1]
        taken[self._index(taken, ticket)], taken[-1] = last, ticket
        ticket.number, last.number = last.number, ticket.number
        ticket.joined_at, last.joined_at = last.joined_at, ticket.joined_at
        expires_at = trio.current_time() + self._seconds
        place = Place(ticket.number, shard, ticket.joined_at, expires_at)
        self._empty[place.number] = place
        insort(self._empty_of.setdefault(shard, []), place, key=_number)
        self._news.unpark_all()

    def give_up(self, ticket: Ticket) -> None:
        """Have nothing more to do with a ticket."""
        if (shard := self._shard(ticket)) is None:
            return
        taken = self._taken_of[shard]
        del taken[self._index(taken, ticket)]
        if not taken:
            del self._taken_of[shard]

    async def forget_expired(self) -> None:
        """Forget each place when its time is over, until cancelled."""
        while True:
            while not self._empty:
                await self._news.park()
            oldest = next(iter(self))
            await trio.sleep_until(oldest.expires_at)
            if self._empty.get(oldest.number) is oldest:
                self._forget(oldest)

    def _shard(self, ticket: Ticket) -> int | None:
        """Return whose places to look after, if anybody's."""
        return ticket.shard if self._seconds else None

    def _forget(self, place: Place) -> None:
        del self._empty[place.number]
        empty = self._empty_of[place.shard]
        del empty[self._index(empty, place)]
        if not empty:
            del self._empty_of[place.shard]
        if not self._empty:  # a dict that has been large stays so until it is cleared
            self._empty.clear()
            self._empty_of.clear()

    def _index(self, places: list[Place] | list[Ticket], wanted: Place | Ticket) -> int:
        return bisect_left(places, wanted.number, key=_number)
