"""Checks the rules of the queue against the bytes on the wire and their exact times."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tests.exploration.wire_clients import WireTicket

if TYPE_CHECKING:
    from tests.exploration.wire_run import WireRecord, WireScenario

TOLERANCE = 1e-9
"""Seconds, for rounding errors only."""

ORDERS = 20_000
"""How many orders of simultaneous events are tried before a ticket counts as overtaken."""

ANSWER_SECONDS = 0.8 + 1e-6
"""Seconds that an answer may take if its client is slow to read."""


def check(record: WireRecord) -> None:
    """Report each broken rule."""
    scenario = record.scenario
    by_key: defaultdict[int, list[WireTicket]] = defaultdict(list)
    for ticket in record.tickets:
        by_key[scenario.key(ticket.shard)].append(ticket)
    for tickets in by_key.values():
        _check_gaps(record, tickets)
        # The server may be waiting for a slow client while its next request arrives.
        if not any(ticket.is_suspect for ticket in tickets):
            _check_order(record, tickets)
    for ticket in record.refused:
        is_there = ticket.arrived_at < min(ticket.left_at, ticket.closed_at)
        if is_there and not ticket.is_suspect and ticket.last_at > ticket.arrived_at + TOLERANCE:
            record.report("refusal", f"{ticket.name} came at {ticket.arrived_at}, refused later")
    for ticket in record.tickets:
        _check_open_response(record, ticket)
        gone_at = min(ticket.left_at, ticket.closed_at)
        if gone_at + TOLERANCE < ticket.first_at < math.inf and not ticket.is_suspect:
            record.report(
                "gone", f"{ticket.name} left at {gone_at} and got a slot at {ticket.first_at}"
            )
        if ticket.is_lost:
            record.report("lost", f"{ticket.name} left at {gone_at}, and then got a slot")
        # A connection may come to the end of its idle time when the next request arrives.
        if ticket.arrived_at < ticket.closed_at < math.inf and not ticket.is_suspect:
            record.report("closed", f"{ticket.name} was closed at {ticket.closed_at}")


def _check_gaps(record: WireRecord, tickets: list[WireTicket]) -> None:
    """Check that no release is early, and that none is late."""
    window = record.scenario.window
    uses = sorted((t for t in tickets if t.first_at < math.inf), key=lambda t: t.first_at)
    # A slow client may cost a slot that is not seen on the wire.
    are_prompt = not any(ticket.is_suspect for ticket in tickets)
    opens_at = due = window + record.scenario.margin if record.scenario.hold_on_start else 0.0
    former = "the start"
    for ticket in uses:
        if ticket.first_at < opens_at - TOLERANCE:
            gap = opens_at - ticket.first_at
            record.report("early", f"{ticket.name} was released {gap:.9f} s early, after {former}")
        lateness = ticket.first_at - max(due, ticket.arrived_at)
        if are_prompt and lateness > TOLERANCE:
            line = f"{ticket.name} was released {lateness:.9f} s late, after {former}"
            record.report("late", line)
        if ticket.first_at + ANSWER_SECONDS < ticket.body_at < math.inf:
            late = ticket.body_at - ticket.first_at
            record.report("late-body", f"{ticket.name} got the body {late:.6f} s after the head")
        opens_at, due = openings(record.scenario, ticket)
        former = ticket.name


def openings(scenario: WireScenario, ticket: WireTicket) -> tuple[float, float]:
    """Return when the key opens at the earliest, and at the latest, after a ticket's answer.

    The two differ if a confirmation comes at the instant in which its time is over.
    """
    unconfirmed = scenario.window + scenario.margin
    # Also an incomplete answer costs a slot. Only its start is known.
    is_whole = ticket.body_at < math.inf
    answered_at = ticket.body_at if is_whole else ticket.first_at
    if not ticket.confirm:
        # Bytes that are sent after the client has left do not count.
        over_at = min(ticket.last_at, max(answered_at, ticket.left_at))
        ended_at = over_at if ticket.is_answered else answered_at
        return (ended_at + unconfirmed,) * 2
    if not is_whole:
        return answered_at + scenario.window, math.inf
    over_at = answered_at + scenario.confirm_seconds
    confirmed_at = max(answered_at, ticket.left_at)
    latest, confirmed = over_at + unconfirmed, confirmed_at + scenario.window
    return (
        confirmed if confirmed_at <= over_at + TOLERANCE else latest,
        confirmed if confirmed_at < over_at - TOLERANCE else latest,
    )


def _check_open_response(record: WireRecord, ticket: WireTicket) -> None:
    """Check that a confirmed ticket's response stays open until its client leaves, or is late."""
    if not ticket.confirm or ticket.is_suspect or not ticket.is_answered:
        return
    # HTTP/1 does not end a response before it has the whole request.
    over_at = max(ticket.body_at + record.scenario.confirm_seconds, ticket.uploaded_at)
    # In HTTP/1.1, the end of an answer to HEAD cannot be seen.
    shows_end = ticket.protocol == "HTTP/2" or ticket.method != "HEAD"
    stayed = ticket.left_at > over_at + record.scenario.latency + TOLERANCE
    if ticket.last_at < over_at - TOLERANCE or (
        shows_end and stayed and ticket.last_at > over_at + TOLERANCE
    ):
        record.report("end", f"{ticket.name} ended at {ticket.last_at} instead of {over_at}")


def _check_order(record: WireRecord, tickets: list[WireTicket]) -> None:
    """Check that no ticket is overtaken by a ticket with a later place.

    The order in which the server has seen simultaneous events is not known. So a ticket counts as
    overtaken only if it is overtaken in each of many orders of these events.
    """
    source = random.Random(record.scenario.seed)
    overtaken = _overtaken(record, tickets, source)
    for _ in range(ORDERS):
        if not overtaken:
            break
        overtaken &= _overtaken(record, tickets, source)
    for used, other in sorted(overtaken):
        record.report("order", f"{used} was released before {other}")


def _overtaken(
    record: WireRecord, tickets: list[WireTicket], source: random.Random
) -> set[tuple[str, str]]:
    """Replay the events in one order. Return pairs: a ticket, and one that it has overtaken."""
    lane = _Lane(record.scenario.place_seconds, source)
    overtaken: set[tuple[str, str]] = set()
    for now, _, kind, ticket in sorted(_events(tickets, source), key=lambda event: event[:2]):
        if kind == "arrive":
            lane.arrive(ticket, now)
        elif kind == "leave":
            lane.leave(ticket, now)
        else:
            overtaken |= {
                (ticket.name, other.name)
                for other in lane.use(ticket)
                if other.arrived_at < now - TOLERANCE and _over_at(other) > now + TOLERANCE
            }
    return overtaken


class _Lane:
    """The places of one rate limit key: those of tickets, and those kept for shards.

    A place is the time since when a shard has it.
    """

    def __init__(self, place_seconds: float, source: random.Random) -> None:
        self._source = source
        self.places: dict[WireTicket, float] = {}
        self._place_seconds = place_seconds
        self._empty: defaultdict[int, list[tuple[float, float]]] = defaultdict(list)
        """By shard: places without a ticket, and when they expire."""

    def arrive(self, ticket: WireTicket, now: float) -> None:
        self.places[ticket] = now
        if ticket.shard is not None:
            empty = sorted(place for place in self._empty[ticket.shard] if place[1] > now)
            if empty:
                oldest = [place for place in empty if place[0] == empty[0][0]]
                empty.remove(chosen := self._source.choice(oldest))
                self.places[ticket] = chosen[0]
            self._empty[ticket.shard] = empty

    def leave(self, ticket: WireTicket, now: float) -> None:
        """Remove a ticket, and keep the latest place of its shard."""
        place = self.places.pop(ticket)
        if ticket.shard is None or not self._place_seconds:
            return
        others = self._same_shard(ticket)
        latest = max((its_place for _, its_place in others), default=place)
        if latest > place:
            last = self._source.choice([twin for twin, its_place in others if its_place == latest])
            self.places[last], place = place, latest
        self._empty[ticket.shard].append((place, now + self._place_seconds))

    def use(self, ticket: WireTicket) -> list[WireTicket]:
        """Release a ticket, and return the tickets with earlier places."""
        place = self.places.pop(ticket)
        for twin, its_place in self._same_shard(ticket):
            # If two arrive at the same instant, it is not known which of them was first.
            if abs(twin.arrived_at - ticket.arrived_at) < TOLERANCE and its_place < place:
                self.places[twin], place = place, its_place
        return [other for other, since in self.places.items() if since < place - TOLERANCE]

    def _same_shard(self, ticket: WireTicket) -> list[tuple[WireTicket, float]]:
        return [place for place in self.places.items() if place[0].shard == ticket.shard]


def _events(
    tickets: list[WireTicket], source: random.Random
) -> Iterator[tuple[float, float, str, WireTicket]]:
    """Yield events: time, random rank among simultaneous events, kind, ticket."""
    for ticket in tickets:
        gone_at = min(ticket.left_at, ticket.closed_at)
        # The server may miss a request that arrives at the instant when its connection ends.
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
