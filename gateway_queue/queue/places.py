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
      seconds: how long an empty place is kept; 0 keeps none. It may be changed.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._numbers = count()
        # In their order: first those of connected clients, then the empty ones.
        self._of_shard: dict[int | None, list[Place]] = {}

    def take(self, ticket: Ticket) -> Place:
        """Give a ticket the first empty place of its shard, or a new place at the end."""
        places = self._of_shard.get(ticket.shard, [])
        for place in places[_occupied(places) :]:
            if place.expires_at > trio.current_time():
                place.seat(ticket)
                return place
            self.end(place, "gone")
        place = Place(next(self._numbers), ticket)
        if ticket.shard is not None and self.seconds:
            self._of_shard.setdefault(ticket.shard, []).append(place)
        return place

    def leave(self, ticket: Ticket) -> Place:
        """Empty the last place that a client of the ticket's shard has, and return it.

        The client that had that place gets the ticket's.
        """
        place = last = ticket.place
        places = self._of_shard.get(ticket.shard, [])
        if _index(places, place) is not None:
            last = places[_occupied(places) - 1]
            last.expires_at = trio.current_time() + self.seconds
            if last is not place and last.ticket is not None:
                place.seat(last.ticket)
        last.ticket = None
        return last

    def end(self, place: Place, state: Literal["released", "gone"]) -> None:
        """Forget a place."""
        place.unlist()
        place.state = state
        places = self._of_shard.get(place.shard, [])
        if (index := _index(places, place)) is not None:
            del places[index]
            if not places:
                del self._of_shard[place.shard]


def _index(places: list[Place], place: Place) -> int | None:
    """Find a place; one that came while none was kept is not there."""
    index = bisect_left(places, place.number, key=lambda one: one.number)
    return index if index < len(places) and places[index] is place else None


def _occupied(places: list[Place]) -> int:
    """Count the places of a shard that clients have."""
    return bisect_left(places, True, key=lambda place: place.ticket is None)
