"""The rules of the queue, checked on what was on the wire, by true time."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from itertools import permutations
from typing import TYPE_CHECKING

from tests.exploration.wire_clients import WireTicket

if TYPE_CHECKING:
    from tests.exploration.wire_run import WireRecord

TOLERANCE = 1e-9
"""Seconds: for floating point."""

ANSWER_SECONDS = 0.9
"""How long an answer may take that its client is slow to read."""


def check(record: WireRecord) -> None:
    """Report what is against the rules."""
    scenario = record.scenario
    by_key: defaultdict[int, list[WireTicket]] = defaultdict(list)
    for ticket in record.tickets:
        by_key[scenario.key(ticket.shard)].append(ticket)
    for tickets in by_key.values():
        _check_gaps(record, tickets)
        # The server may be waiting for a slow client while its next request arrives.
        if not any(ticket.is_suspect for ticket in tickets):
            _check_order(record, tickets)
    for ticket in record.tickets:
        gone_at = min(ticket.left_at, ticket.closed_at)
        if gone_at + TOLERANCE < ticket.first_at < math.inf and not ticket.is_suspect:
            record.report("gone", f"{ticket.name} left at {gone_at} and got a slot at {ticket.first_at}")
        # A connection may come to the end of its idle time when the next request arrives.
        if ticket.arrived_at < ticket.closed_at < math.inf and not ticket.is_suspect:
            record.report("closed", f"{ticket.name} was closed at {ticket.closed_at}")


def _check_gaps(record: WireRecord, tickets: list[WireTicket]) -> None:
    """Check that no release is early, and that none is late."""
    window = record.scenario.window
    uses = sorted((t for t in tickets if t.first_at < math.inf), key=lambda t: t.first_at)
    # A slow client may cost a slot that is not seen on the wire.
    are_prompt = not any(ticket.is_suspect for ticket in tickets)
    opens_at = window if record.scenario.hold_on_start else 0.0
    slack = 0.0
    body_at = end_at = opens_at - window
    former = "the start"
    for ticket in uses:
        for rule, at in (("early", body_at), ("early-end", end_at)):
            if ticket.first_at - at < window - TOLERANCE:
                gap = ticket.first_at - at
                record.report(rule, f"{ticket.name} came {gap:.9f} s after {former}")
                break
        due = max(opens_at, ticket.arrived_at)
        if are_prompt and ticket.first_at > due + slack + TOLERANCE:
            record.report("late", f"{ticket.name} came {ticket.first_at - due:.9f} s after its time")
        is_whole = ticket.last_at <= ticket.first_at + ANSWER_SECONDS
        slack = 0.0 if is_whole else ANSWER_SECONDS
        end_at = ticket.last_at if is_whole else ticket.first_at
        body_at = ticket.body_at if is_whole else ticket.first_at
        if ticket.first_at + ANSWER_SECONDS < ticket.body_at < math.inf:
            late = ticket.body_at - ticket.first_at
            record.report("late-body", f"{ticket.name} got the body {late:.6f} s after the head")
        opens_at = end_at + window
        former = ticket.name


def _check_order(record: WireRecord, tickets: list[WireTicket]) -> None:
    """Check that nobody is overtaken by a ticket whose place is behind.

    Which of two things of one instant the server has seen first is not known. So a ticket counts
    as overtaken if it is in any order of them.
    """
    orders = (_overtaken(record, tickets, order) for order in permutations(("arrive", "leave", "use")))
    for used, other in set.intersection(*orders):
        record.report("order", f"{used} came before {other}")


def _overtaken(
    record: WireRecord, tickets: list[WireTicket], order: tuple[str, ...]
) -> set[tuple[str, str]]:
    """Play the places of shards, and return which ticket has overtaken which."""
    events = sorted(_events(tickets), key=lambda event: (event[0], order.index(event[1])))
    waiting: dict[WireTicket, float] = {}
    """Who waits, with the time since when its place is held."""
    empty: defaultdict[int, list[tuple[float, float]]] = defaultdict(list)
    """Places where nobody stands, and when they expire."""
    overtaken: set[tuple[str, str]] = set()
    for now, kind, ticket in events:
        shard = ticket.shard if record.scenario.place_seconds else None
        if kind == "arrive":
            waiting[ticket] = now
            if shard is not None:
                empty[shard] = sorted(place for place in empty[shard] if place[1] > now)
                if empty[shard]:
                    waiting[ticket] = empty[shard].pop(0)[0]
        elif ticket in waiting:
            place = waiting.pop(ticket)
            if kind == "use":
                for twin in waiting:  # which of the two was first is not known either
                    is_twin = abs(twin.arrived_at - ticket.arrived_at) < TOLERANCE
                    if is_twin and twin.shard == shard and waiting[twin] < place:
                        place, waiting[twin] = waiting[twin], place
                overtaken |= {
                    (ticket.name, other.name)
                    for other, since in waiting.items()
                    if since < place - TOLERANCE
                    and other.arrived_at < now - TOLERANCE
                    and _over_at(other) > now + TOLERANCE
                }
            elif shard is not None:
                same = [other for other in waiting if other.shard == shard]
                last = max(same, key=lambda other: waiting[other], default=None)
                if last is not None and waiting[last] > place:
                    place, waiting[last] = waiting[last], place
                empty[shard].append((place, now + record.scenario.place_seconds))
    return overtaken


def _events(tickets: list[WireTicket]) -> Iterator[tuple[float, str, WireTicket]]:
    for ticket in tickets:
        gone_at = min(ticket.left_at, ticket.closed_at)
        if ticket.arrived_at <= gone_at:
            yield ticket.arrived_at, "arrive", ticket
            if ticket.first_at < math.inf:
                yield ticket.first_at, "use", ticket
            elif gone_at < math.inf:
                yield gone_at, "leave", ticket


def _over_at(ticket: WireTicket) -> float:
    return min(ticket.first_at, ticket.left_at, ticket.closed_at)
