"""The invariants: what must hold in every run, each as a function of its record.

Each function returns an explanation of what is wrong, or None. Times are of the simulation's clock,
not of the clock of Redis, which may be wrong.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, pairwise
from operator import itemgetter

from gateway_queue.store.redis.link import LOOK_SECONDS
from gateway_queue.store.redis.servers import ASK_SECONDS, OVERLAP_SECONDS
from gateway_queue.store.redis.store import RESTORE_SECONDS
from tests.exploration.record import Call, History, Loss, ProcessRecord, Record
from tests.exploration.scenario import CUTS, DISCORD_FAULTS, PROCESS_ENDS, SLOW_WAY, UNSTEADY_CLOCK

TOLERANCE = 1e-6
"""For floating point only: the clock is the simulation's."""

NEXT = 1e-9
"""Seconds between the places of two calls that arrive at the same instant."""

ADOPTION = 4.0
"""Seconds, in addition to a window, until a process uses new limits of Discord: first it finishes
the answers under way, and asks Redis."""

CLAIM_SECONDS = 1.1
"""The longest time from the choice of a ticket to its turn: what Redis may take to answer."""

NOTICE_SECONDS = 6.0
"""Seconds until a process notices that Redis answers too late."""

CONNECT_SECONDS = 0.5
"""Seconds to connect or reconnect to Redis and then to claim, on a fast network."""

CONNECT_ROUND_TRIPS = 12

MOMENT = 0.02
"""Seconds that a process needs to choose a ticket, with 1 ms for each key that waits to claim."""

KNOWN_DEAD_SECONDS = 5.0
"""Seconds until every replica knows that another one was killed, and which places are free."""

HOUR = 3600.0

DRIFT = 0.001
"""The relative error of a clock of Redis that is allowed, except for windows: 0.1%."""

Invariant = Callable[[Record], str | None]


def information_lost(record: Record) -> str | None:
    """Explain why earlier session starts cannot be known any more, or return None if they can.

    The invariants ``budget`` and ``crash-loop`` count earlier session starts. They do not apply if
    no process has the counts any more: a process with its own memory has ended, or Redis has lost
    data (or its clock was set, which makes its times meaningless) and a process that could restore
    them has ended, too.
    """
    ended = [process for process in record.processes if process.ended_at is not None]
    ended = [process for process in ended if (process.ended_at or 0) < record.ended_at]
    if not ended:
        return None
    if record.scenario.store == "memory":
        return f"process {ended[0].number} has ended, with what it had in memory"
    if record.losses:
        return f"process {ended[0].number} has ended, and Redis: {record.losses[0].what}"
    return None


def is_claim_lost(record: Record, call: Call) -> bool:
    """Return whether the claim of a confirmed ticket is lost, so that its key may open earlier.

    The process with the claim has ended, and the claim was only in its memory, or Redis has lost
    data. Or Redis has lost data, and the process did not reach it again within a lease.
    """
    scenario, at, process = record.scenario, call.answered_at or 0, call.process
    until = at + scenario.confirm_seconds + scenario.unconfirmed_window
    has_ended = process.ended_at is not None and process.ended_at < until
    if scenario.store == "memory":
        return has_ended
    return any(
        has_ended
        or not any(loss.at < heard <= loss.at + scenario.lease for heard in process.heard_at)
        for loss in record.losses
        if at - CLAIM_SECONDS < loss.at < until
    )


def is_loss_hidden(record: Record, earlier: Call, later: Call) -> bool:
    """Return whether no process could notice that a claim was lost, so that a release may be early.

    Redis has loaded a copy from before the claim, without a restart. The last command of the
    process is in the copy. No process that sent a command after the copy has reached Redis again.
    """
    answered_at = earlier.answered_at or 0
    claimed_at = (later.chosen_at or 0) - _way_to_redis(record)

    def is_in_copy(loss: Loss, process: ProcessRecord) -> bool:
        return not any((loss.copied_at or 0) < heard <= loss.at for heard in process.heard_at)

    def has_noticed(loss: Loss, process: ProcessRecord) -> bool:
        has_reached = any(loss.at < heard < claimed_at for heard in process.heard_at)
        return not is_in_copy(loss, process) and has_reached

    return any(
        is_in_copy(loss, later.process)
        and not any(has_noticed(loss, process) for process in record.processes)
        for loss in record.losses
        if loss.copied_at is not None
        and loss.copied_at < answered_at + CLAIM_SECONDS
        and answered_at - CLAIM_SECONDS < loss.at < (later.answered_at or 0)
    )


def next_release(record: Record, call: Call) -> float:
    """Return the earliest time at which the key of an answered call may have its next release."""
    scenario, at = record.scenario, call.answered_at or 0
    if not call.confirm:
        return at + scenario.unconfirmed_window
    latest = at + scenario.confirm_seconds + scenario.unconfirmed_window
    if call.closed_at is not None:
        return min(max(at, call.closed_at) + scenario.window, latest)
    return at + scenario.unconfirmed_window if is_claim_lost(record, call) else latest


def never_early(record: Record) -> str | None:
    """Check that within one of Discord's keys no answer and no IDENTIFY comes too early."""
    scenario, answers = record.scenario, record.answers
    longest = scenario.confirm_seconds + scenario.unconfirmed_window
    for index, later in enumerate(answers):
        at = later.answered_at or 0
        told = later.process.keys_at(at, at - scenario.window - ADOPTION)
        if not told:
            return f"{later} was answered at {at:.6f}, but Discord's limits were not known"
        for earlier in reversed(answers[:index]):
            if at - (earlier.answered_at or 0) >= longest:
                break
            if not _share_a_key(earlier, later, told):
                continue
            if is_loss_hidden(record, earlier, later):
                continue
            both = f"{earlier} and {later} have the same key of {told}"
            if at < next_release(record, earlier) - TOLERANCE:
                return (
                    f"{both}, but were answered at {earlier.answered_at:.6f} and {at:.6f} and not "
                    f"from {next_release(record, earlier):.6f} on"
                )
            if earlier.identified_at is None or later.identified_at is None:
                continue
            gap = later.identified_at - earlier.identified_at
            if gap < scenario.window - TOLERANCE and not is_claim_lost(record, earlier):
                return (
                    f"{both}, but identified at {earlier.identified_at:.6f} and {gap:.6f} s later"
                )
    return None


def within_cap(record: Record) -> str | None:
    """Check that any one window has at most MAX_CONCURRENCY releases, over all keys."""
    cap, answers = record.scenario.max_concurrency, record.answers
    if not record.scenario.has_token or not cap:
        return None
    for index, beyond in enumerate(answers):
        at = beyond.answered_at or 0
        under_way = [
            one
            for one in answers[:index]
            if at < next_release(record, one) - TOLERANCE
            and not is_loss_hidden(record, one, beyond)
        ]
        if len(under_way) >= cap:
            return f"{beyond} was answered at {at:.6f}, within the windows of {under_way}"
    return None


def first_come_first_served(record: Record) -> str | None:
    """Check that within a process and a key no client is chosen before one that came earlier."""
    return next((why for why, is_kept in _overtaken(record) if not is_kept), None)


def place_kept(record: Record) -> str | None:
    """Check that a shard that asks again has its old place, ahead of shards that came since."""
    return next((why for why, is_kept in _overtaken(record) if is_kept), None)


def oldest_first(record: Record) -> str | None:
    """Check that with MAX_CONCURRENCY the oldest ticket whose key is open is released first."""
    scenario = record.scenario
    if scenario.store == "redis" or not scenario.has_token or not scenario.max_concurrency:
        return None
    return _younger_first(
        record, 0.0, MOMENT, _arrival, lambda call, other: call.process is other.process
    )


def oldest_replica_first(record: Record) -> str | None:
    """Check that without faults the oldest ticket of all replicas is released first.

    Shards with several clients are left out: these can exchange their places when a replica does
    not answer for a while.
    """
    scenario = record.scenario
    if scenario.store == "memory":
        return None
    exchanging = _shards_of_several_clients(record) if scenario.place_seconds else set()
    agreed_at = _agreed_at(record)

    def place_of(call: Call) -> tuple[float, float] | None:
        if call.shard in exchanging or call.arrived_at is None or call.arrived_at <= agreed_at:
            return None
        known_at = _connected(record, call.process, call.arrived_at)
        return call.arrived_at + _give_or_take(record), known_at

    return _younger_first(
        record,
        record.calm_since,
        _way_to_redis(record),
        place_of,
        lambda call, other: call.process is not other.process,
    )


def _agreed_at(record: Record) -> float:
    """Return the time from which on the times of new tickets can be compared.

    If the clock is set and data is lost, and a replica has not told Redis all of its tickets in
    between, the replica moves the tickets that Redis does not know to the time of the new clock.
    """
    changes = [(loss.at, loss.is_of_clock) for loss in record.losses]
    changes += [(at, True) for at in record.history.clock_steps]
    agreed_at = -math.inf
    for (first, was_of_clock), (second, is_of_clock) in pairwise(sorted(changes)):
        if was_of_clock != is_of_clock and not all(
            any(first < heard <= second - RESTORE_SECONDS for heard in process.heard_at)
            for process in record.processes
            if process.started_at < second < (process.ended_at or math.inf)
        ):
            agreed_at = second
    return agreed_at


def shared_place_kept(record: Record) -> str | None:
    """Check that a shard has its old place at any replica, also if the one it asked has ended."""
    scenario = record.scenario
    works = set(scenario.faults) <= {*PROCESS_ENDS, *DISCORD_FAULTS}
    if scenario.store == "memory" or not scenario.place_seconds or not works:
        return None
    kept = _kept_places(record)
    return _younger_first(record, 0.0, _way_to_redis(record), kept.get, lambda *_: True)


def _kept_places(record: Record) -> dict[Call, tuple[float, float]]:
    """Return for each call since when its shard has the place, and when all replicas know it.

    Only for shards with one client: several clients of a shard can exchange their places.
    """
    way = _way_to_redis(record)
    by_shard = defaultdict[int, list[Call]](list)
    for call in record.calls:
        if call.shard is not None and call.arrived_at is not None:
            by_shard[call.shard].append(call)
    kept: dict[Call, tuple[float, float]] = {}
    exchanging = _shards_of_several_clients(record)
    for shard, calls in by_shard.items():
        if shard in exchanging:
            continue
        place, kept_until, known_at = math.inf, -math.inf, 0.0
        for call in calls:
            arrived_at = call.arrived_at or 0
            if arrived_at > kept_until:
                place, known_at = arrived_at, arrived_at
            connected_at = _connected(record, call.process, arrived_at)
            known_at = max(known_at, arrived_at + way, connected_at)
            kept[call] = place + _give_or_take(record), known_at
            kept_until, free_at = _kept_until(record, call)
            known_at = max(known_at, free_at)
    return kept


def _shards_of_several_clients(record: Record) -> set[int]:
    clients = {(call.shard, call.client) for call in record.calls if call.arrived_at is not None}
    number = Counter(shard for shard, _ in clients if shard is not None)
    return {shard for shard, several in number.items() if several > 1}


def _kept_until(record: Record, call: Call) -> tuple[float, float]:
    """Return until when the place of a call is kept at least, and from when on it is free."""
    way, keeps = _way_to_redis(record), record.scenario.place_seconds
    process, ended_at = call.process, call.ended_at or math.inf
    if call.answered_at is not None:
        return -math.inf, 0.0
    if not process.was_killed or ended_at < (process.ended_at or math.inf) - way:
        return ended_at + keeps - way, ended_at + LOOK_SECONDS + way
    if ended_at - max(call.arrived_at or 0, process.started_at) < LOOK_SECONDS + 2 * way:
        return -math.inf, 0.0  # Redis may not have heard of it
    return ended_at - LOOK_SECONDS + keeps - way, ended_at + KNOWN_DEAD_SECONDS + way


def _give_or_take(record: Record) -> float:
    """Return how many seconds younger a ticket of another replica may be that is released first.

    With MAX_CONCURRENCY, Redis knows of one waiting ticket for each replica, not for each key.
    """
    return record.scenario.window if _is_capped(record) else 0.0


def _is_capped(record: Record) -> bool:
    return record.scenario.has_token and record.scenario.max_concurrency is not None


def _arrival(call: Call) -> tuple[float, float] | None:
    return None if call.arrived_at is None else (call.arrived_at, call.arrived_at)


def _way_to_redis(record: Record) -> float:
    """Return by how many seconds a ticket has to be older, so that Redis knows of it in time."""
    return 10 * record.scenario.latency + MOMENT + _clock_range(record)


def _clock_range(record: Record) -> float:
    """Return by how many seconds small steps of the clock may falsify a time that Redis measures.

    Even so, no window may be too short.
    """
    least, _, most = record.history.clock_offsets
    return most - least


def _may_be_forgotten(record: Record, call: Call) -> bool:
    """Return whether Redis did not hear of the process of a call for longer than it keeps places.

    If the client has come again meanwhile, it then has a new place.
    """
    if record.scenario.store == "memory" or call.shard is None or not record.scenario.place_seconds:
        return False
    heard = [at for at in call.process.heard_at if at >= _place_since(record, call)]
    until = call.ended_at or record.ended_at
    return any(
        later - former > record.scenario.place_seconds
        for former, later in pairwise(heard)
        if former < until
    )


def _place_since(record: Record, call: Call) -> float:
    """Return since when a call has had its place, at the earliest.

    Its place may be that of an earlier call, which may have got it from another one in turn.
    """
    since = call.arrived_at or 0
    if call.shard is None or not record.scenario.place_seconds:
        return since
    own = [one for one in record.calls if one.shard == call.shard and one.arrived_at is not None]
    while True:
        earliest = min(
            one.arrived_at or 0
            for one in own
            if one.answered_at is None or one.answered_at >= since
        )
        if earliest >= since:
            return since
        since = earliest


def _younger_first(
    record: Record,
    since: float,
    slack: float,
    place_of: Callable[[Call], tuple[float, float] | None],
    is_compared: Callable[[Call, Call], bool],
) -> str | None:
    """Find a ticket that was chosen though an older one was free to start, too.

    Args:
      record: of the run.
      since: check only calls that were chosen after this time.
      slack: seconds by which the other ticket must be older, and for which its key must have been
        open, if the keys differ.
      place_of: returns since when a call has its place, and from when on this counts.
      is_compared: chooses the pairs of calls to look at.
    """
    if _budget_may_be_spent(record):
        return None
    is_capped = _is_capped(record)

    def compete(call: Call, other: Call, at: float) -> bool:
        adopted = at - record.scenario.window - ADOPTION
        told = call.process.keys_at(at, adopted) | other.process.keys_at(at, adopted)
        if _share_a_key(call, other, told):
            return True
        # Until others know that a process has ended, its tickets may still be ahead of the other.
        opens = max(_key_opens(record, other, at, but=call), _late_process_forgotten(record, at))
        return is_capped and opens < at - slack

    for call in record.calls:
        at = call.chosen_at
        if at is None or at < since:
            continue
        first_came = _place_since(record, call)
        for other in record.calls:
            place = place_of(other)
            if (
                place is not None
                and place[0] < first_came - slack
                and place[1] < at - slack
                and (other.chosen_at is None or other.chosen_at > at)
                and (other.ended_at is None or other.ended_at > at)
                and (other.shard is None or other.shard != call.shard)
                and is_compared(call, other)
                and not _may_be_held(record, other, at)
                and compete(call, other, at)
            ):
                return f"{call} was chosen at {at:.6f}, before {other}, which is older"
    return None


def budget_kept(record: Record) -> str | None:
    """Check that Discord's day has no more session starts than Discord and the user allow."""
    scenario = record.scenario
    if scenario.session_start_limit == 0 or information_lost(record):
        return None
    if scenario.has_token:
        for over in record.overspent:
            return f"session start {over.used} of {over.limit} at {over.at:.6f}"
    elif scenario.session_start_limit:
        starts = len(record.answers)
        if starts > scenario.session_start_limit:
            return f"{starts} session starts, SESSION_START_LIMIT={scenario.session_start_limit}"
    return None


def crash_loops_slowed(record: Record) -> str | None:
    """Check that a shard that starts too often in an hour waits 15, 30, 60, … 600 s."""
    free = record.scenario.loop_free_starts
    if not free or information_lost(record):
        return None
    starts = defaultdict[int, list[Call]](list)
    for call in record.answers:
        if call.shard is None:
            continue
        at = call.answered_at or 0
        recent = [one for one in starts[call.shard] if at - (one.answered_at or 0) < HOUR]
        if recent:
            delay = loop_delay(free, len(recent))
            gap = at - max(map(_counts_from, recent))
            # A start that Redis has lost is restored with the error of a round trip.
            error = TOLERANCE + (4 * record.scenario.latency if record.losses else 0)
            error += _clock_range(record)
            if gap < delay * (1 - DRIFT) - error:
                return f"{call}: start {len(recent) + 1} after {gap:.6f} s instead of {delay} s"
        starts[call.shard].append(call)
    return None


def _counts_from(call: Call) -> float:
    """Return when a start counts at the earliest."""
    if call.confirmed_at is not None and call.identified_at is not None:
        return call.identified_at
    return call.answered_at or 0


def nobody_forgotten(record: Record) -> str | None:
    """Check that after all faults every connected client is released in its turn."""
    if record.unreleased:
        calls = ", ".join(f"{call} since {call.arrived_at:.3f}" for call in record.unreleased)
        waited = f"{record.ended_at - record.settled_at:.1f} s"
        return f"{calls}: not released within {waited} after all faults were over"
    return None


def sent_away(record: Record) -> str | None:
    """Check that no client stays with a process that cannot release, while another one can."""
    if record.scenario.faults != SLOW_WAY:
        return None
    for slow, since, until in record.slow_ways:
        others = [(one, a, b) for one, a, b in record.slow_ways if one is not slow]
        if record.scenario.replicas == 1 or any(a < until and since < b for _, a, b in others):
            continue
        for call in record.calls:
            began = max(since + NOTICE_SECONDS, call.arrived_at or 0)
            ended = min(until, call.ended_at or until)
            if call.process is slow and call.arrived_at is not None and ended - began > 3:
                return f"{call} waits from {began:.3f} to {ended:.3f} where none is released"
    return None


def slots_used(record: Record) -> str | None:
    """Check that a key is used as soon as it opens, while a client waits that can be released."""
    scenario = record.scenario
    if _budget_may_be_spent(record):
        return None
    slack = MOMENT if scenario.store == "memory" else _delay_of_redis(record)
    # On a slower network, a process may not have caught up before the next cut.
    possible = {*PROCESS_ENDS, *UNSTEADY_CLOCK, *(CUTS if scenario.latency < 0.01 else ())}
    calm_since = 0.0 if set(scenario.faults) <= possible else record.calm_since
    for call in record.calls:
        at = call.chosen_at
        if at is None or at <= calm_since:
            continue
        free_at = _shard_is_free(record, call, at)
        if free_at is None:
            continue
        due = max(
            calm_since,
            call.arrived_at or 0,
            _late_process_forgotten(record, at),
            _connected(record, call.process, at),
            _key_opens(record, call, at),
            _queue_opens(record, call, at),
            free_at,
        )
        if at > due + slack:
            return f"{call} was chosen at {at:.6f}, but could have been at {due:.6f}"
    return None


def _delay_of_redis(record: Record) -> float:
    """Return the most that Redis, its clock and other replicas may delay a release by."""
    scenario = record.scenario
    glances = 2 * min(scenario.window / 20, 0.05)
    longest = scenario.confirm_seconds + scenario.lease
    waits = glances + scenario.window / 10 + 12 * scenario.latency
    # A step of the clock back makes a window longer; after a step forward the next release waits.
    return waits + 4 * DRIFT * longest + 2 * _clock_range(record) + MOMENT


def _closed_until(record: Record, call: Call) -> float:
    """Return until when a chosen call keeps its key closed at most, if nothing fails."""
    scenario = record.scenario
    if call.answered_at is None:
        return call.ended_at or 0
    if not call.confirm:
        return call.answered_at + scenario.unconfirmed_window
    if call.confirmed_at is not None:
        return call.confirmed_at + scenario.window
    return call.answered_at + scenario.confirm_seconds + scenario.unconfirmed_window


def _key_opens(record: Record, call: Call, at: float, *, but: Call | None = None) -> float:
    """Return when the key of a call opens at the latest, by what was released before a time."""
    scenario, process = record.scenario, call.process
    opens = _holds_on_start_until(record, process)
    if scenario.has_token:
        opens = max(opens, process.keys_told[0][0] if process.keys_told else at)
    told = process.keys_at(at, at - ADOPTION)
    for one in record.calls:
        if one is not call and one is not but and one.chosen_at is not None and one.chosen_at <= at:
            told_then = one.process.keys_at(one.chosen_at, one.chosen_at - ADOPTION)
            # A key of the former number of keys and a key of this one have a shard in common if
            # they are equal modulo the greatest common divisor of both numbers.
            shared = {math.gcd(then, now) for then in told_then for now in told}
            if any(_share_a_key(one, call, {keys}) for keys in shared):
                opens = max(opens, _closed_until(record, one))
    return opens


def _late_process_forgotten(record: Record, at: float) -> float:
    """Return until when a process that has ended may delay the other replicas."""
    scenario = record.scenario
    delay = 2 * scenario.window + scenario.margin
    return max(
        (
            process.ended_at + delay + (scenario.confirm_seconds if scenario.confirming else 0)
            for process in record.processes
            if scenario.store == "redis" and process.ended_at is not None and process.ended_at < at
        ),
        default=0.0,
    )


def _connected(record: Record, process: ProcessRecord, at: float) -> float:
    """Return until when the start of a process, or the last cut, may delay its releases."""
    if record.scenario.store == "memory":
        return 0.0
    latest = max((cut for cut in record.cuts if cut < at), default=-math.inf)
    began = max(latest, process.started_at)
    asking = ASK_SECONDS if record.scenario.sentinels else 0
    return began + asking + CONNECT_SECONDS + _handshake(record)


def _handshake(record: Record) -> float:
    """Return how long the round trips of a new connection take at most."""
    return CONNECT_ROUND_TRIPS * 4 * record.scenario.latency


def _queue_opens(record: Record, call: Call, at: float) -> float:
    """Return when fewer than MAX_CONCURRENCY windows are under way, at the latest."""
    scenario = record.scenario
    if not scenario.has_token or not scenario.max_concurrency:
        return 0.0
    ends = sorted(
        _closed_until(record, one)
        for one in record.calls
        if one is not call and one.chosen_at is not None and one.chosen_at <= at
    )
    cap = scenario.max_concurrency
    opens = ends[-cap] if len(ends) >= cap else 0.0
    if scenario.store == "redis" and cap < scenario.keys:
        # An older ticket goes first, also one of another replica that has just started.
        latest = (call.arrived_at or 0) + _way_to_redis(record)
        for one in record.calls:
            if one.process is call.process or one.chosen_at is None or one.chosen_at > at:
                continue
            until = min(one.chosen_at, _holds_on_start_until(record, one.process))
            if until > opens and _place_since(record, one) < latest:
                opens = until
    return opens


def _holds_on_start_until(record: Record, process: ProcessRecord) -> float:
    """Return until when a process releases nothing after its start, at the latest."""
    scenario, until = record.scenario, process.started_at
    if process.hold_on_start:
        is_local = scenario.store == "memory"
        until += scenario.unconfirmed_window if is_local else scenario.lease + _handshake(record)
        until += OVERLAP_SECONDS if scenario.has_standbys else 0
    return until


def _shard_is_free(record: Record, call: Call, at: float) -> float | None:
    """Return until when the loop guard holds a call; None if that is not certain."""
    scenario = record.scenario
    if not _may_be_held(record, call, at):
        return 0.0
    if scenario.faults:
        return None
    own = [one for one in record.calls if one.shard == call.shard and one is not call]
    chosen = [one for one in own if one.chosen_at is not None and one.chosen_at <= at]
    if any(one.answered_at is None for one in chosen):
        return None
    starts = [_started_at(record, one) for one in chosen]
    delay = loop_delay(scenario.loop_free_starts, len(starts))
    return max(starts, default=0.0) + delay * (1 if scenario.store == "memory" else 1 + DRIFT)


def _started_at(record: Record, call: Call) -> float:
    """Return when a start counts, at the latest."""
    if not call.confirm:
        return call.answered_at or 0
    return call.confirmed_at or (call.answered_at or 0) + record.scenario.confirm_seconds


def loop_delay(free: int, starts: int) -> float:
    """Return how long after its last start a shard has to wait, by its starts in an hour."""
    return min(15.0 * 2 ** (starts - free), 600.0) if 0 < free <= starts else 0.0


def seen_during_the_run(name: str) -> Invariant:
    """Return an invariant that is checked while the run goes on."""

    def invariant(record: Record) -> str | None:
        return next((why for kind, why in record.wrong if kind == name), None)

    return invariant


INVARIANTS: dict[str, Invariant] = {
    "never-early": never_early,
    "within-cap": within_cap,
    "first-come": first_come_first_served,
    "place-kept": place_kept,
    "oldest-first": oldest_first,
    "oldest-replica-first": oldest_replica_first,
    "shared-place": shared_place_kept,
    "budget": budget_kept,
    "crash-loop": crash_loops_slowed,
    "nobody-forgotten": nobody_forgotten,
    "slots-used": slots_used,
    "sent-away": sent_away,
    # The states of a place change as the table in gateway_queue.queue says.
    "transitions": seen_during_the_run("transitions"),
    # A ticket never fails by itself.
    "no-failure": seen_during_the_run("no-failure"),
    "no-crash": seen_during_the_run("no-crash"),
    # len(queue) is the number of clients that wait; two requests of one shard are two tickets.
    "length": seen_during_the_run("length"),
    # When all clients have left: no ticket, no place, no task, no Redis key without an expiry.
    "nothing-left": seen_during_the_run("nothing-left"),
    # A process that gets SIGTERM ends within STOP_SECONDS.
    "stops": seen_during_the_run("stops"),
}


def broken(history: History, ignore: frozenset[str] = frozenset()) -> dict[str, str]:
    """Return the invariants that do not hold for each bot, with an explanation each."""
    found: dict[str, str] = {}
    for record in history.records:
        for name, check in INVARIANTS.items():
            why = check(record) if name not in ignore else None
            if why is not None:
                found.setdefault(name, record.of_bot(why))
    return found


def _share_a_key(one: Call, other: Call, numbers: set[int]) -> bool:
    """Return whether two shards have the same key with each of some numbers of keys."""
    return all(((one.shard or 0) - (other.shard or 0)) % keys == 0 for keys in numbers)


def _may_be_held(record: Record, call: Call, at: float) -> bool:
    """Tell whether the loop guard may hold a call.

    With Redis, a claim whose reply was lost counts as a start for a while; so each call counts.
    """
    scenario = record.scenario
    if not scenario.loop_free_starts or call.shard is None:
        return False
    earlier = [
        one
        for one in record.calls
        if one.shard == call.shard
        and (one.sent_at if scenario.store == "redis" else one.answered_at or at) < at
    ]
    return len(earlier) >= scenario.loop_free_starts


def _budget_may_be_spent(record: Record) -> bool:
    scenario = record.scenario
    return scenario.budget < 1000 or bool(scenario.session_start_limit)


@dataclass(eq=False)
class _Standing:
    """A call that waits, its place as a time (``rank``), and since when it has this place."""

    call: Call
    rank: float
    since: float


def _overtaken(record: Record) -> Iterator[tuple[str, bool]]:
    """Yield why each call was chosen out of turn, and whether it overtook a kept place."""
    for process in record.processes:
        yield from _overtaken_at(record, process)


def _overtaken_at(record: Record, process: ProcessRecord) -> Iterator[tuple[str, bool]]:
    scenario = record.scenario
    standing: dict[Call, _Standing] = {}
    # By shard, the first arrival and the expiry of each place without a client.
    empty = defaultdict[int, list[tuple[float, float]]](list)
    places = count()
    steps = (one for one in process.steps if one[1] not in {"confirmed", "unconfirmed"})
    for now, step, call in steps:
        if step == "arrived":
            standing[call] = _Standing(call, now + NEXT * next(places), now)
            if call.shard is not None:
                kept = [place for place in empty[call.shard] if place[1] > now]
                if kept:
                    standing[call].rank = kept.pop(0)[0]
                empty[call.shard] = kept
            continue
        if step == "chosen":
            mine = standing[call]
            told = process.keys_at(now, now - scenario.window - ADOPTION)
            for other in standing.values():
                if _is_before(record, other, mine, told, now):
                    yield (
                        (
                            f"{call} was chosen at {now:.6f}, before {other.call}, which had its "
                            f"place since {other.rank:.6f} (here since {other.since:.6f})"
                        ),
                        other.rank < (other.call.arrived_at or 0),
                    )
            continue
        mine = standing.pop(call)
        if step == "left" and call.shard is not None and scenario.place_seconds:
            siblings = [one for one in standing.values() if one.call.shard == call.shard]
            if siblings and (last := max(siblings, key=lambda one: one.rank)).rank > mine.rank:
                last.rank, mine.rank, last.since = mine.rank, last.rank, now
            insort(empty[call.shard], (mine.rank, now + scenario.place_seconds), key=itemgetter(0))


def _is_before(
    record: Record, other: _Standing, mine: _Standing, told: set[int], now: float
) -> bool:
    """Return whether another call should have been chosen instead.

    Calls of the same shard do not count: they exchange places when one of them leaves.
    """
    flight = CLAIM_SECONDS if record.scenario.store == "redis" else 0.0
    chosen_at = other.call.chosen_at
    rank, other_rank = mine.rank, other.rank
    if _was_elsewhere(record, mine.call):
        # Each replica knows the time of Redis with the error of a round trip.
        rank = min(rank, _place_since(record, mine.call) - _way_to_redis(record))
    if _was_elsewhere(record, other.call) or _may_be_forgotten(record, other.call):
        # If its replica did not answer for a while, another client of its shard may have its place.
        is_sole = all(
            one.client == other.call.client for one in record.calls if one.shard == other.call.shard
        )
        other_rank = (other.call.arrived_at or now) if is_sole else math.inf
    return (
        (chosen_at is None or chosen_at > now)
        and (other.call.shard is None or other.call.shard != mine.call.shard)
        and other_rank < rank - TOLERANCE
        and other.since < now - flight - TOLERANCE
        and _share_a_key(other.call, mine.call, told)
        and not _may_be_held(record, other.call, now)
        and mine.rank > _agreed_at(record)
    )


def _was_elsewhere(record: Record, call: Call) -> bool:
    """Tell whether the shard of a call has asked another process, too, which shares its place."""
    return call.shard is not None and any(
        one.shard == call.shard and one.process is not call.process for one in record.calls
    )
