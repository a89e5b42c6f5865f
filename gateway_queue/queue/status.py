"""What a queue looks like at one moment. Times are in seconds."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from itertools import count, islice
from typing import Literal

import trio

from gateway_queue.queue import Queue
from gateway_queue.queue.lane import Lane, Place
from gateway_queue.store import SessionStarts


@dataclass
class TicketStatus:
    """A ticket, or the place of one whose client is away."""

    shard: int | None
    state: Literal["waiting", "away", "held"]
    position: int
    """From 1. Those who are away or held keep theirs, but others pass them."""
    waited: float
    eta: float
    """Until its turn, if nobody leaves and nobody comes in between; infinite if not known."""


@dataclass
class LaneStatus:
    """A lane that has tickets."""

    rate_limit_key: int
    waiting: int
    """How many clients are here."""
    opens_in: float
    """Until its next slot; infinite if not known."""
    tickets: list[TicketStatus]


def lanes(queue: Queue, window: float, most: int | None = None) -> list[LaneStatus]:
    """List the lanes that have tickets, by key.

    Args:
      queue: whose.
      window: seconds between two releases of one lane.
      most: how many tickets of a lane to list, from the front; None lists all. Those that are
        not listed are not counted on when the day's session starts run out.
    """
    starts = queue.store.session_starts()
    if queue.max_concurrency is None or queue.store.fault is not None:
        first_slot = math.inf
    else:
        first_slot = starts.resets_in if starts.spent else 0.0
    statuses = [
        _lane(lane, first_slot, window, most) for _, lane in sorted(queue.lanes.items()) if lane
    ]
    _delay_to_reset(starts, statuses, window)
    return statuses


def _lane(lane: Lane, first_slot: float, window: float, most: int | None) -> LaneStatus:
    now = trio.current_time()
    opens_in = max(first_slot, lane.opens_at - now)
    turns = count()

    def describe(position: int, place: Place) -> TicketStatus:
        state: Literal["waiting", "away", "held"]
        if place.ticket is None:
            state, eta = "away", math.inf
        elif place.held_until > now:
            state, eta = "held", max(opens_in, place.held_until - now)
        else:
            state, eta = "waiting", opens_in + next(turns) * window
        return TicketStatus(place.shard, state, position, now - place.joined_at, eta)

    tickets = [describe(position, place) for position, place in enumerate(islice(lane, most), 1)]
    return LaneStatus(lane.rate_limit_key, len(lane), opens_in, tickets)


def _delay_to_reset(starts: SessionStarts, statuses: list[LaneStatus], window: float) -> None:
    """Let those for whom the day has no start left go on from its reset, a window apart."""
    if not starts.enforced or starts.remaining is None or starts.spent:
        return
    here = ((t, lane) for lane in statuses for t in lane.tickets if t.state != "away")
    in_order = sorted(here, key=lambda entry: entry[0].eta)
    late = defaultdict[int, int](int)
    for ticket, lane in in_order[starts.remaining :]:
        ticket.eta = max(ticket.eta, starts.resets_in + late[lane.rate_limit_key] * window)
        late[lane.rate_limit_key] += 1
