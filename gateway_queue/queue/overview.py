"""What a queue looks like at one moment. Times are in seconds."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import trio

from gateway_queue.queue import Queue
from gateway_queue.queue.lane import Lane, Place
from gateway_queue.store import Rules, SessionStarts


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
class IdentifyingStatus:
    """A shard between the answer to its confirmed ticket and the confirmation."""

    shard: int | None
    seconds: float
    """Since the answer."""


@dataclass
class LaneStatus:
    """A lane that has tickets, or a shard that is identifying."""

    rate_limit_key: int
    waiting: int
    """How many clients are here."""
    opens_in: float
    """Until its next slot; infinite if not known."""
    identifying: IdentifyingStatus | None
    """The shard that has its answer but has not confirmed it yet."""
    tickets: list[TicketStatus]


def lanes(queue: Queue, most: int | None = None) -> list[LaneStatus]:
    """List the lanes that have tickets or a shard that is identifying, by key.

    Args:
      queue: the queue to describe.
      most: how many tickets of a lane to list, from the front; None lists all. Those that are
        not listed are not counted on when the day's session starts run out.
    """
    starts = queue.store.session_starts()
    if queue.max_concurrency is None or queue.store.fault is not None:
        first_slot = math.inf
    else:
        first_slot = starts.resumes_in if starts.spent else 0.0
    statuses = [
        _lane(lane, first_slot, queue.store.rules, most)
        for _, lane in sorted(queue.lanes.items())
        if lane or lane.identifying
    ]
    _delay_to_reset(starts, statuses, queue.store.rules.unconfirmed_window)
    return statuses


def _lane(lane: Lane, first_slot: float, rules: Rules, most: int | None) -> LaneStatus:
    now = trio.current_time()
    opens_in = max(first_slot, lane.opens_at - now)
    identifying = None
    if lane.identifying is not None:
        opens_in = max(opens_in, rules.window)  # if the confirmation comes now
        identifying = IdentifyingStatus(lane.identifying.shard, now - lane.identifying.since)
    turn = opens_in

    def describe(position: int, place: Place) -> TicketStatus:
        nonlocal turn
        state: Literal["waiting", "away", "held"]
        if place.ticket is None:
            state, eta = "away", math.inf
        elif place.held_until > now:
            state, eta = "held", max(opens_in, place.held_until - now)
        else:
            state, eta = "waiting", turn
            turn += rules.window if place.ticket.confirm else rules.unconfirmed_window
        return TicketStatus(place.shard, state, position, now - place.joined_at, eta)

    tickets = [describe(position, place) for position, place in enumerate(islice(lane, most), 1)]
    return LaneStatus(lane.rate_limit_key, len(lane), opens_in, identifying, tickets)


def _delay_to_reset(starts: SessionStarts, statuses: list[LaneStatus], window: float) -> None:
    """Let those for whom the day has no start left go on from its reset, a window apart."""
    if not starts.enforced or starts.remaining is None or starts.spent:
        return
    here = ((t, lane) for lane in statuses for t in lane.tickets if t.state != "away")
    in_order = sorted(here, key=lambda entry: entry[0].eta)
    late = defaultdict[int, int](int)
    for ticket, lane in in_order[starts.remaining :]:
        ticket.eta = max(ticket.eta, starts.resumes_in + late[lane.rate_limit_key] * window)
        late[lane.rate_limit_key] += 1
