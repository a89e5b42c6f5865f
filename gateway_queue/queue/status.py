"""What a queue looks like at one moment. Times are in seconds."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal

import trio

from gateway_queue.queue import Queue
from gateway_queue.queue.lane import Lane, Ticket


@dataclass
class TicketStatus:
    """A ticket."""

    shard: int | None
    state: Literal["waiting", "held"]
    position: int
    """From 1; those who are held come last."""
    waited: float
    eta: float
    """Until its turn, if nobody leaves and nobody comes in between; infinite if not known."""


@dataclass
class LaneStatus:
    """A lane that has tickets."""

    rate_limit_key: int
    waiting: int
    opens_in: float
    """Until its next slot; infinite if not known."""
    tickets: list[TicketStatus]


def lanes(queue: Queue, window: float) -> list[LaneStatus]:
    """List the lanes that have tickets, by key.

    Args:
      queue: whose.
      window: seconds between two releases of one lane.
    """
    held = defaultdict[int, list[Ticket]](list)
    for ticket in sorted(queue.held, key=attrgetter("held_until")):
        held[queue.key(ticket.shard)].append(ticket)
    keys = {key for key, lane in queue.lanes.items() if lane} | set(held)
    first_slot = _first_slot(queue)
    statuses = [
        _lane(queue.lanes.get(key, Lane(key)), held[key], first_slot, window)
        for key in sorted(keys)
    ]
    _delay_to_reset(queue, statuses, window)
    return statuses


def _first_slot(queue: Queue) -> float:
    """Return when the first slot of any lane can come."""
    if queue.max_concurrency is None:
        return math.inf
    starts = queue.store.session_starts()
    return starts.resets_in if starts.spent else 0.0


def _lane(lane: Lane, held: list[Ticket], first_slot: float, window: float) -> LaneStatus:
    now = trio.current_time()
    opens_in = max(first_slot, lane.opens_at - now)
    etas = [opens_in + place * window for place in range(len(lane))]
    etas += [max(opens_in, ticket.held_until - now) for ticket in held]
    tickets = [
        TicketStatus(
            shard=ticket.shard,
            state="held" if place > len(lane) else "waiting",
            position=place,
            waited=now - ticket.joined_at,
            eta=eta,
        )
        for place, (ticket, eta) in enumerate(zip([*lane, *held], etas, strict=True), 1)
    ]
    return LaneStatus(lane.rate_limit_key, len(tickets), opens_in, tickets)


def _delay_to_reset(queue: Queue, statuses: list[LaneStatus], window: float) -> None:
    """Let those for whom the day has no start left go on from its reset, a window apart."""
    starts = queue.store.session_starts()
    if not starts.enforced or starts.remaining is None or starts.spent:
        return
    in_order = sorted(
        ((ticket, lane) for lane in statuses for ticket in lane.tickets),
        key=lambda entry: entry[0].eta,
    )
    late = defaultdict[int, int](int)
    for ticket, lane in in_order[starts.remaining :]:
        ticket.eta = max(ticket.eta, starts.resets_in + late[lane.rate_limit_key] * window)
        late[lane.rate_limit_key] += 1
