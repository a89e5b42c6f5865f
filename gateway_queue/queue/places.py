"""The places of each shard, also while its client is away."""

from __future__ import annotations

from bisect import bisect_left
from itertools import count
from typing import Literal

import trio

from gateway_queue.queue.lane import Place
from gateway_queue.queue.ticket import Ticket


class Places:
    """Gives a place to each ticket, and keeps it for a while when the client leaves.

    The connected clients of a shard always have the first of its places. A client that times out
    and asks again can arrive before the server sees that its first connection is closed. So it does
    not matter which of a shard's clients leaves.

    Args:
      seconds: how long an empty place is kept; 0 keeps none.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._numbers = count()
        # In their order: first those of connected clients, then the empty ones.
        self._of_shard: dict[int, list[Place]] = {}

    def take(self, ticket: Ticket) -> Place:
        """Give a ticket the first empty place of its shard, or a new place at the end."""
        places = self._of_shard.get(self._key(ticket.shard), [])
        for place in places[_occupied(places) :]:
            if place.expires_at > trio.current_time():
                place.seat(ticket)
                return place
            self.end(place, "gone")
        place = Place(next(self._numbers), ticket)
        if (shard := self._key(ticket.shard)) >= 0:
            self._of_shard.setdefault(shard, []).append(place)
        return place

    def leave(self, ticket: Ticket) -> Place:
        """Empty the last place that a client of the ticket's shard has, and return it.

        The client that had that place gets the ticket's.
        """
        place = last = ticket.place
        if places := self._of_shard.get(self._key(ticket.shard)):
            last = places[_occupied(places) - 1]
            last.expires_at = trio.current_time() + self._seconds
            if last is not place and last.ticket is not None:
                place.seat(last.ticket)
        last.ticket = None
        return last

    def end(self, place: Place, state: Literal["released", "gone"]) -> None:
        """Forget a place."""
        place.unlist()
        place.state = state
        if places := self._of_shard.get(shard := self._key(place.shard)):
            del places[bisect_left(places, place.number, key=lambda one: one.number)]
            if not places:
                del self._of_shard[shard]

    def _key(self, shard: int | None) -> int:
        """Return the shard whose places are kept, or -1 if they are not."""
        return -1 if shard is None or not self._seconds else shard


def _occupied(places: list[Place]) -> int:
    """Count the places of a shard that clients have."""
    return bisect_left(places, True, key=lambda place: place.ticket is None)
