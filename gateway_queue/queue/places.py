"""The places of each shard, including those whose client is away."""

from __future__ import annotations

from bisect import bisect_left, insort
from itertools import count
from operator import attrgetter
from typing import Literal

import trio

from gateway_queue.queue.lane import Place
from gateway_queue.queue.ticket import Ticket
from gateway_queue.store import WindowStore

_order = attrgetter("order")


class Places:
    """Gives a place to each ticket, and keeps it for a while when the client leaves.

    The connected clients of a shard always have its first places, whichever client leaves: a client
    that times out and asks again can arrive before the server sees that its first connection is
    closed.

    Args:
      store: shares the places with other replicas. Its rule ``place_seconds`` is how long an empty
        place is kept; 0 keeps none.
    """

    def __init__(self, store: WindowStore) -> None:
        self._store = store
        self._numbers = count()
        # The oldest first. The places of connected clients come before the empty places.
        self._of_shard: dict[int | None, list[Place]] = {}

    def take(self, ticket: Ticket) -> Place:
        """Give a ticket the first empty place of its shard, or a new place at the end."""
        places = self._of_shard.get(ticket.shard, [])
        for place in places[_occupied(places) :]:
            if place.expires_at > trio.current_time():
                place.seat(ticket)
                self._store.share(place)
                return place
            self.end(place, "gone")
        place = Place(next(self._numbers), ticket, self._store.place_time())
        if ticket.shard is not None and self._store.rules.place_seconds:
            insort(self._of_shard.setdefault(ticket.shard, []), place, key=_order)
        self._store.share(place)
        return place

    def leave(self, ticket: Ticket) -> Place:
        """Empty the last place that a client of the ticket's shard has, and return it.

        The client that had that place gets the ticket's place.
        """
        place = last = ticket.place
        places = self._of_shard.get(ticket.shard, [])
        if _index(places, place) is not None:
            last = places[_occupied(places) - 1]
            last.expires_at = trio.current_time() + self._store.rules.place_seconds
            if last is not place and last.ticket is not None:
                place.seat(last.ticket)
                self._store.share(place)
        last.ticket = None
        if last.expires_at > trio.current_time():
            self._store.share(last)
        return last

    def move(self, place: Place, since: float, joined_at: float) -> list[Place]:
        """Change the time of a place that is in no lane, and return the places to end.

        If the place has a client, these are the older places of its shard that have none: other
        replicas have taken them over.
        """
        places = self._of_shard.get(place.shard, [])
        index = _index(places, place)
        place.since, place.joined_at = since, joined_at
        if index is None:
            return []
        del places[index]
        insort(places, place, key=_order)
        if place.ticket is None:
            return []
        return [one for one in places[: _index(places, place)] if one.ticket is None]

    def end(self, place: Place, state: Literal["released", "gone"]) -> None:
        """Forget a place."""
        place.unlist()
        place.state = state
        self._store.unshare(place)
        places = self._of_shard.get(place.shard, [])
        if (index := _index(places, place)) is not None:
            del places[index]
            if not places:
                del self._of_shard[place.shard]


def _index(places: list[Place], place: Place) -> int | None:
    """Return the index of a place; None without a shard, or if ``place_seconds`` was 0."""
    index = bisect_left(places, place.order, key=_order)
    return index if index < len(places) and places[index] is place else None


def _occupied(places: list[Place]) -> int:
    """Count the places of a shard that have a client."""
    return bisect_left(places, True, key=lambda place: place.ticket is None)
