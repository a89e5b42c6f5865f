"""The rules of the queue, checked on what was on the wire, by true time."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tests.exploration.wire_clients import WireTicket

if TYPE_CHECKING:
    from tests.exploration.wire_run import WireRecord

TOLERANCE = 1e-9
"""Seconds: for floating point."""

ORDERS = 500
"""How many orders of things of one instant are tried until a ticket counts as overtaken."""

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
            record.report(
                "gone", f"{ticket.name} left at {gone_at} and got a slot at {ticket.first_at}"
            )
        if ticket.is_lost:
            rule = "lost" if ticket.protocol == "HTTP/1" else "lost-stream"
            record.report(rule, f"{ticket.name} left at {gone_at}, and then got a slot")
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
            record.report(
                "late", f"{ticket.name} came {ticket.first_at - due:.9f} s after its time"
            )
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

    Which of several things of one instant the server has seen first is not known. So a ticket
    counts as overtaken if it is in each of many orders of them.
    """
    source = random.Random(record.scenario.seed)
    overtaken = _overtaken(record, tickets, source)
    for _ in range(ORDERS):
        if not overtaken:
            break
        overtaken &= _overtaken(record, tickets, source)
    for used, other in sorted(overtaken):
        record.report("order", f"{used} came before {other}")


def _overtaken(
    record: WireRecord, tickets: list[WireTicket], source: random.Random
) -> set[tuple[str, str]]:
    """Play the places of shards, and return which ticket has overtaken which."""
    line = _Line(record.scenario.place_seconds, source)
    overtaken: set[tuple[str, str]] = set()
    for now, _, kind, ticket in sorted(_events(tickets, source), key=lambda event: event[:2]):
        if kind == "arrive":
            line.arrive(ticket, now)
        elif kind == "leave":
            line.leave(ticket, now)
        else:
            overtaken |= {
                (ticket.name, other.name)
                for other in line.use(ticket)
                if other.arrived_at < now - TOLERANCE and _over_at(other) > now + TOLERANCE
            }
    return overtaken


class _Line:
    """The line of one key: places that are kept, and who has them.

    A place is the time since when it is held.
    """

    def __init__(self, place_seconds: float, source: random.Random) -> None:
        self._source = source
        self.places: dict[WireTicket, float] = {}
        self._place_seconds = place_seconds
        self._empty: defaultdict[int, list[tuple[float, float]]] = defaultdict(list)
        """By shard: places where nobody stands, and when they expire."""

    def arrive(self, ticket: WireTicket, now: float) -> None:
        self.places[ticket] = now
        if ticket.shard is not None:
            empty = sorted(place for place in self._empty[ticket.shard] if place[1] > now)
            if empty:
                foremost = [place for place in empty if place[0] == empty[0][0]]
                empty.remove(chosen := self._source.choice(foremost))
                self.places[ticket] = chosen[0]
            self._empty[ticket.shard] = empty

    def leave(self, ticket: WireTicket, now: float) -> None:
        """Leave the hindmost place of the shard behind."""
        place = self.places.pop(ticket)
        if ticket.shard is None or not self._place_seconds:
            return
        last = max(self._same_shard(ticket), key=lambda other: other[1], default=None)
        if last is not None and last[1] > place:
            self.places[last[0]], place = place, last[1]
        self._empty[ticket.shard].append((place, now + self._place_seconds))

    def use(self, ticket: WireTicket) -> list[WireTicket]:
        """Go, and return those whose places are in front."""
        place = self.places.pop(ticket)
        for twin, its_place in self._same_shard(ticket):
            # Which of two that have come in one instant was first is not known.
            if abs(twin.arrived_at - ticket.arrived_at) < TOLERANCE and its_place < place:
                self.places[twin], place = place, its_place
        return [other for other, since in self.places.items() if since < place - TOLERANCE]

    def _same_shard(self, ticket: WireTicket) -> list[tuple[WireTicket, float]]:
        return [place for place in self.places.items() if place[0].shard == ticket.shard]


def _events(
    tickets: list[WireTicket], source: random.Random
) -> Iterator[tuple[float, float, str, WireTicket]]:
    """Yield what happens, when, and what comes first of one instant."""
    for ticket in tickets:
        gone_at = min(ticket.left_at, ticket.closed_at)
        # The server need not see a request that comes with the end of its connection.
        is_seen = ticket.arrived_at < gone_at or source.random() < 0.5
        if ticket.arrived_at <= gone_at and is_seen:
            rank = source.random()
            yield ticket.arrived_at, rank, "arrive", ticket
            if ticket.first_at < math.inf:
                yield ticket.first_at, rank + source.random(), "use", ticket
            elif gone_at < math.inf:
                yield gone_at, rank + source.random(), "leave", ticket


def _over_at(ticket: WireTicket) -> float:
    return min(ticket.first_at, ticket.left_at, ticket.closed_at)
