"""Describes the lanes and tickets of a queue at one moment. Times are in seconds."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from heapq import merge
from itertools import islice
from operator import attrgetter, itemgetter
from typing import Literal

import trio

from gateway_queue.queue import Queue
from gateway_queue.queue.lane import Lane, Place
from gateway_queue.store import DistantPlace, Identifying, Line, Rules, SessionStarts

ITEMS_PER_STEP = 100
"""Lanes or tickets to describe in one step of the event loop, in a quarter of a millisecond."""


@dataclass(slots=True)
class TicketStatus:
    """A ticket, or a place whose client is away."""

    shard: int | None
    state: Literal["waiting", "away", "held"]
    position: int
    """Counted from 1. Tickets that are away or held keep their position, though later tickets are
    released before them."""
    waited: float
    eta: float
    """Seconds until its turn, if the queue does not change; infinite if not known."""
    replica: str | None
    """The replica where it waits; None without Redis."""


@dataclass
class IdentifyingStatus:
    """A shard between the answer to its confirmed ticket and the confirmation."""

    shard: int | None
    seconds: float
    """Seconds since the answer."""


@dataclass
class LaneStatus:
    """A lane that has tickets, or a shard that is identifying."""

    rate_limit_key: int
    waiting: int
    """Clients that wait, at this and at other replicas."""
    held: int
    away: int
    opens_in: float
    """Seconds until the key opens; infinite if not known."""
    identifying: IdentifyingStatus | None
    """The shard that has its answer but has not confirmed it yet."""
    tickets: list[TicketStatus]


async def lanes(
    queue: Queue,
    most: int | None = None,
    *,
    everywhere: bool = True,
    identify_seconds: float = 0.0,
) -> list[LaneStatus]:
    """List the lanes that have tickets or a shard that is identifying, by key.

    It works in steps of ``ITEMS_PER_STEP`` items and lets other tasks run between them, so that a
    release that is due does not wait for the whole list. A place that leaves its lane meanwhile is
    not listed.

    Args:
      queue: the queue to describe.
      most: how many tickets of a lane to list, from the front; None lists all. Only listed
        tickets count when too few session starts are left for all of them.
      everywhere: whether to list the tickets of other replicas, too.
      identify_seconds: how long a shard usually takes from its answer to its confirmation.
    """
    starts = queue.store.session_starts()
    if queue.max_concurrency is None or queue.store.fault is not None:
        first_slot = math.inf
    else:
        first_slot = starts.resumes_in if starts.spent else 0.0
    turns = _Turns(first_slot, queue.store.rules, identify_seconds)
    statuses: list[LaneStatus] = []
    steps = Steps()
    line = await queue.store.line() if everywhere else None
    distant = defaultdict[int, list[DistantPlace]](list)
    for place in line.elsewhere if line else ():
        await steps.next()
        distant[queue.key(place.shard)].append(place)
    here = {key: lane for key, lane in queue.lanes.items() if lane or lane.identifying}
    identifying = line.identifying if line else {}
    for key in sorted({*here, *distant, *identifying}):
        await steps.next()
        lane = here.get(key)
        if lane is None:
            lane = Lane(key)
            if line is not None and key not in identifying:
                lane.opens_at = line.opens_at.get(key, -math.inf)
        listed = _Listed(lane, distant[key], line)
        statuses.append(await _lane(listed, turns, most, steps))
    await _delay_to_reset(starts, statuses, queue.store.rules.unconfirmed_window, steps)
    return statuses


def next_release(lane: LaneStatus) -> float:
    """Return in how many seconds a lane releases its next ticket; infinite if not known."""
    turns = [ticket.eta for ticket in lane.tickets if ticket.state != "away"]
    return min(turns, default=lane.opens_in if lane.waiting else math.inf)


class Steps:
    """Lets other tasks run from time to time during a long description."""

    def __init__(self) -> None:
        self._number = 0

    async def next(self) -> None:
        """Count one item, and yield to the event loop after ``ITEMS_PER_STEP`` of them."""
        self._number += 1
        if self._number % ITEMS_PER_STEP == 0:
            await trio.lowlevel.checkpoint()


@dataclass(frozen=True)
class _Turns:
    """Estimates when keys open. Times are in seconds from now."""

    first_slot: float
    """No key opens before this."""
    rules: Rules
    identify_seconds: float

    def after(self, place: Place | DistantPlace) -> float:
        """Return for how long the release of a place closes its key."""
        if place.confirm:
            return self.identify_seconds + self.rules.window
        return self.rules.unconfirmed_window

    def after_identifying(self, seconds: float) -> float:
        """Return when a key opens whose shard has been identifying for ``seconds``."""
        return max(0.0, self.identify_seconds - seconds) + self.rules.window


@dataclass(frozen=True)
class _Listed:
    """A lane, with its places at other replicas."""

    lane: Lane
    distant: list[DistantPlace]
    line: Line | None

    def places(self, most: int | None) -> list[Place | DistantPlace]:
        """Return the first places, the oldest first."""
        lane = self.lane
        here = lane.places() if most is None else list(islice(lane, most))
        if self.line is None:
            return [*here]
        # Another replica may have taken over a place that is away here.
        connected = [place for place in here if place.ticket is not None]
        places: list[Place | DistantPlace] = [*connected, *self.distant]
        places.sort(key=attrgetter("since"))
        return places[:most]

    def identifying(self) -> Identifying | None:
        """Return the shard that is identifying, whichever replica has answered it."""
        if self.lane.identifying is not None or self.line is None:
            return self.lane.identifying
        return self.line.identifying.get(self.lane.rate_limit_key)

    def status(self) -> LaneStatus:
        """Count the places."""
        lane, now = self.lane, trio.current_time()
        away = sum(place.is_away for place in self.distant)
        return LaneStatus(
            rate_limit_key=lane.rate_limit_key,
            waiting=len(lane) + len(self.distant) - away,
            held=len(lane.held)
            + sum(place.held_until > now and not place.is_away for place in self.distant),
            away=len(lane.away) if self.line is None else away,
            opens_in=max(0.0, lane.opens_at - now),
            identifying=None,
            tickets=[],
        )


async def _lane(listed: _Listed, turns: _Turns, most: int | None, steps: Steps) -> LaneStatus:
    lane, line = listed.lane, listed.line
    now = trio.current_time()
    opens_in = max(turns.first_slot, lane.opens_at - now)
    identifying, shard = None, listed.identifying()
    if shard is not None:
        identifying = IdentifyingStatus(shard.shard, max(0.0, now - shard.since))
        opens_in = max(opens_in, turns.after_identifying(identifying.seconds))
    turn = opens_in
    status = listed.status()
    status.opens_in, status.identifying = opens_in, identifying
    for place in listed.places(most):
        await steps.next()
        if isinstance(place, Place) and place.lane is not lane:
            continue
        state: Literal["waiting", "away", "held"]
        if place.is_away:
            state, eta = "away", math.inf
        elif place.held_until > now:
            state, eta = "held", max(opens_in, place.held_until - now)
        else:
            state, eta = "waiting", turn
            turn += turns.after(place)
        position = len(status.tickets) + 1
        replica = line.replica if line and isinstance(place, Place) else None
        if isinstance(place, DistantPlace):
            replica = place.replica
        status.tickets.append(
            TicketStatus(place.shard, state, position, now - place.joined_at, eta, replica)
        )
    return status


async def _delay_to_reset(
    starts: SessionStarts, statuses: list[LaneStatus], window: float, steps: Steps
) -> None:
    """Move the ETAs for which no session start is left to after the reset, one window apart."""
    if not starts.enforced or starts.remaining is None or starts.spent:
        return
    if sum(lane.waiting for lane in statuses) <= starts.remaining:
        return
    late = defaultdict[int, int](int)
    in_order = merge(*map(_by_turn, statuses), key=itemgetter(0))
    for number, (_, key, ticket) in enumerate(in_order):
        await steps.next()
        if number >= starts.remaining:
            ticket.eta = max(ticket.eta, starts.resumes_in + late[key] * window)
            late[key] += 1


def _by_turn(lane: LaneStatus) -> Iterator[tuple[float, int, TicketStatus]]:
    """Iterate over the connected tickets of a lane, the earliest ETA first."""
    held = sorted((t for t in lane.tickets if t.state == "held"), key=attrgetter("eta"))
    waiting = (ticket for ticket in lane.tickets if ticket.state == "waiting")
    in_order = merge(waiting, held, key=attrgetter("eta"))
    return ((ticket.eta, lane.rate_limit_key, ticket) for ticket in in_order)
