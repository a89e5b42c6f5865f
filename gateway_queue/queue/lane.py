"""A lane: the places of one rate limit key, in the order of their first requests."""

from __future__ import annotations

import math
from collections.abc import Iterator
from heapq import merge
from itertools import chain, takewhile
from operator import attrgetter
from typing import Literal, cast

import trio
from sortedcontainers import SortedDict

from gateway_queue.queue.ticket import Ticket
from gateway_queue.store import Identifying

State = Literal["waiting", "held", "away", "chosen", "released", "gone"]
"""See the table in :mod:`gateway_queue.queue`."""

Order = tuple[float, int]

_order = attrgetter("order")


class Place:
    """A position in a lane, with the client that has it now.

    Times are of :func:`trio.current_time`, except ``since``.

    Args:
      number: orders the places with the same ``since``.
      ticket: the place's first client.
      since: orders the places, see :meth:`~gateway_queue.store.WindowStore.place_time`.
    """

    __slots__ = (
        "expires_at",
        "held_until",
        "joined_at",
        "lane",
        "number",
        "shard",
        "since",
        "state",
        "ticket",
    )

    def __init__(self, number: int, ticket: Ticket, since: float) -> None:
        self.number = number
        self.since = since
        self.shard = ticket.shard
        self.ticket: Ticket | None = None
        self.joined_at = trio.current_time()
        """When the first client of this place connected, at any replica."""
        self.held_until = -math.inf
        self.expires_at = -math.inf
        """When an empty place is given up."""
        self.state: State = "waiting"
        self.lane: Lane | None = None
        """The lane in which it is listed; None in the states chosen, released and gone."""
        self.seat(ticket)

    @property
    def order(self) -> Order:
        """The sort key of places: the oldest place comes first."""
        return self.since, self.number

    @property
    def connected_at(self) -> float | None:
        """When its client connected; None while it has no client."""
        return None if self.ticket is None else self.ticket.connected_at

    @property
    def is_away(self) -> bool:
        """Whether it has no client now."""
        return self.ticket is None

    @property
    def confirm(self) -> bool:
        """Whether its client will confirm that the shard has identified."""
        return self.ticket is not None and self.ticket.confirm

    def seat(self, ticket: Ticket) -> None:
        """Give the place to a client."""
        self.ticket = ticket
        ticket.place = self

    def unlist(self) -> None:
        """Take the place out of its lane, if it is in one."""
        if self.lane is not None:
            self.lane.remove(self)


class Lane:
    """The places of one rate limit key, except the place whose client is being answered.

    Adding a place, removing one and finding the first are O(log n). All methods run in one step of
    the event loop, so a lane is consistent at each checkpoint.
    """

    def __init__(self, rate_limit_key: int) -> None:
        self.rate_limit_key = rate_limit_key
        self.opens_at = -math.inf
        """When the key opens, according to the last answer of the store."""
        self.claim_at = -math.inf
        """When to claim next: when the key opens, or earlier if something has changed."""
        self.identifying: Identifying | None = None
        self.waiting: SortedDict[Order, Place] = SortedDict()
        # Sorted by the time at which the hold, or the empty place, ends.
        self.held: SortedDict[tuple[float, int], Place] = SortedDict()
        self.away: SortedDict[tuple[float, int], Place] = SortedDict()
        self._changed = trio.Event()

    def __bool__(self) -> bool:
        return bool(self.waiting or self.held or self.away)

    def __len__(self) -> int:
        """Count the clients that are connected."""
        return len(self.waiting) + len(self.held)

    def __iter__(self) -> Iterator[Place]:
        """Iterate over all places, the oldest first."""
        aside = sorted(chain(self.held.values(), self.away.values()), key=_order)
        return merge(self.waiting.values(), aside, key=_order)

    def places(self) -> list[Place]:
        """Return all places, the oldest first."""
        # SortedDict.values() would take twice as long, even though this has to sort.
        waiting = dict.values(cast("dict[Order, Place]", self.waiting))
        return sorted(chain(waiting, self.held.values(), self.away.values()), key=_order)

    def add(self, place: Place) -> None:
        """List a place, in the state that fits its client and its hold."""
        if place.ticket is None:
            place.state = "away"
            self.away[place.expires_at, place.number] = place
        elif place.held_until > trio.current_time():
            place.state = "held"
            self.held[place.held_until, place.number] = place
        else:
            place.state = "waiting"
            self.waiting[place.order] = place
        place.lane = self
        if place.state != "waiting":
            self._changed.set()  # the dispatcher may have to wake up earlier
        elif self.first() is place:
            # The store may hold this shard, even if it has not held the former first one.
            self.retry_claim()

    def remove(self, place: Place) -> None:
        """Take a place out of the lane."""
        match place.state:
            case "away":
                del self.away[place.expires_at, place.number]
            case "held":
                del self.held[place.held_until, place.number]
            case _:
                del self.waiting[place.order]
        place.lane = None
        if not self.waiting:
            self._changed.set()

    def first(self) -> Place | None:
        """Return the first place whose client can be released, if there is any."""
        return self.waiting.peekitem(0)[1] if self.waiting else None

    def overdue(self) -> list[Place]:
        """Return the places whose hold is over, and the empty places whose time is over."""
        now = trio.current_time()
        return [
            place
            for places in (self.held, self.away)
            for _, place in takewhile(lambda entry: entry[0][0] <= now, places.items())
        ]

    def retry_claim(self) -> None:
        """Let the dispatcher claim the key again, whatever the store's last answer was."""
        self.claim_at = -math.inf
        self._changed.set()

    async def wait(self, until: float) -> None:
        """Wait until some time, until a hold or an empty place ends, or something changes."""
        ends = (places.peekitem(0)[0][0] for places in (self.held, self.away) if places)
        with trio.move_on_at(min((until, *ends))):
            await self._changed.wait()
        self._changed = trio.Event()
