"""What must hold in every run, each as a function over its record.

Each returns an explanation of what is wrong, or None. Times are true times.
"""

from __future__ import annotations

from bisect import insort
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import itemgetter

from tests.exploration.record import Call, ProcessRecord, Record

TOLERANCE = 1e-6
"""For floating point only: the clock is the simulation's."""

ADOPTION = 4.0
"""Seconds, besides a window, in which a process has adopted what Discord has told it: it finishes
the answers under way, and asks Redis, first."""

CLAIM_SECONDS = 1.1
"""The longest time from the choice of a ticket to its turn: what Redis may take to answer."""

HOUR = 3600.0

DRIFT = 0.001
"""What a clock of Redis may be wrong by, where a rule does not speak of windows."""

Invariant = Callable[[Record], str | None]


def information_lost(record: Record) -> str | None:
    """Say why the past cannot be known any more. This is the one list of exemptions.

    Rules 7 and 8 count what has happened before. They are exempt where every place that knew is
    gone: a process with its own memory has ended, or Redis has lost data (or its clock was set, so
    that its times mean nothing) and a process that could restore them has ended, too.
    """
    ended = [process for process in record.processes if process.ended_at is not None]
    ended = [process for process in ended if (process.ended_at or 0) < record.ended_at]
    if not ended:
        return None
    if record.scenario.store == "memory":
        return f"process {ended[0].number} has ended, with what it had in memory"
    if record.losses:
        return f"process {ended[0].number} has ended, and Redis: {record.losses[0][1]}"
    return None


def never_early(record: Record) -> str | None:
    """Rule 1: answers of one key, by Discord's keys, are a window apart."""
    window = record.scenario.window
    answers = record.answers
    for index, later in enumerate(answers):
        at = later.answered_at or 0
        told = later.process.keys_at(at, at - window - ADOPTION)
        if not told:
            return f"{later} was answered at {at:.6f}, but Discord's limits were not known"
        for earlier in reversed(answers[:index]):
            gap = at - (earlier.answered_at or 0)
            if gap >= window - TOLERANCE:
                break
            if _share_a_key(earlier, later, told):
                return (
                    f"{earlier} was answered at {earlier.answered_at:.6f} and {later} at {at:.6f}, "
                    f"after {gap:.6f} s of a window of {window} s; both have the same key of {told}"
                )
    return None


def within_cap(record: Record) -> str | None:
    """Section 2: at most MAX_CONCURRENCY releases in any one window, over all keys."""
    cap, window, answers = record.scenario.max_concurrency, record.scenario.window, record.answers
    if not record.scenario.has_token or not cap:
        return None
    for first, beyond in zip(answers, answers[cap:], strict=False):
        gap = (beyond.answered_at or 0) - (first.answered_at or 0)
        if gap < window - TOLERANCE:
            return f"{first} to {beyond}: {cap + 1} releases in {gap:.6f} s, MAX_CONCURRENCY={cap}"
    return None


def first_come_first_served(record: Record) -> str | None:
    """Rule 2: within a process and a key, nobody who came later is chosen first."""
    return next((why for why, is_kept in _overtaken(record) if not is_kept), None)


def place_kept(record: Record) -> str | None:
    """Rule 6: a shard that comes back has its old place, before those who came since."""
    return next((why for why, is_kept in _overtaken(record) if is_kept), None)


def oldest_replica_first(record: Record) -> str | None:
    """Section 5: oldest first over all replicas, give or take one window, without faults."""
    window = record.scenario.window
    for call in record.answers:
        if (call.chosen_at or 0) < record.settled_at:
            continue
        first_came = min(
            one.sent_at for one in record.calls if one.shard == call.shard and one.arrived_at
        )
        for other in record.calls:
            if other.process is call.process or other.arrived_at is None:
                continue
            still_waits = (other.ended_at or record.ended_at) > (call.answered_at or 0)
            is_older = other.arrived_at < first_came - window - CLAIM_SECONDS
            told = call.process.keys_told[-1:] + other.process.keys_told[-1:]
            same_key = told and _share_a_key(call, other, {keys for _, keys in told})
            if (
                is_older
                and still_waits
                and same_key
                and other.chosen_at is None
                and not _may_be_held(record, other, call.chosen_at or 0)
            ):
                return f"{call} was chosen at {call.chosen_at:.6f}, before {other}, which is older"
    return None


def budget_kept(record: Record) -> str | None:
    """Rule 7: no more session starts in Discord's day than it and the user allow."""
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
    """Rule 8: a shard that starts too often in an hour waits 15, 30, 60, … 600 s."""
    free = record.scenario.loop_free_starts
    if not free or information_lost(record):
        return None
    starts = defaultdict[int, list[Call]](list)
    for call in record.answers:
        if call.shard is None:
            continue
        at = call.answered_at or 0
        recent = [one for one in starts[call.shard] if at - (one.answered_at or 0) < HOUR]
        excess = len(recent) - free
        if excess >= 0:
            delay = min(15 * 2**excess, 600)
            gap = at - (recent[-1].answered_at or 0)
            if gap < delay * (1 - DRIFT) - TOLERANCE:
                return f"{call}: start {len(recent) + 1} after {gap:.6f} s instead of {delay} s"
        starts[call.shard].append(call)
    return None


def nobody_forgotten(record: Record) -> str | None:
    """Rule 10: when faults end, every connected client is released in its turn."""
    if record.unreleased:
        calls = ", ".join(f"{call} since {call.arrived_at:.3f}" for call in record.unreleased)
        waited = f"{record.ended_at - record.settled_at:.1f} s"
        return f"{calls}: not released within {waited} after all faults were over"
    return None


def slots_used(record: Record) -> str | None:
    """Rule 10: no key stays unused for windows while somebody waits who could be released."""
    scenario = record.scenario
    lease = scenario.window + min(scenario.window, 1) + 0.5
    cap = scenario.max_concurrency if scenario.has_token else None
    for call in record.answers:
        since = max(call.arrived_at or 0, record.settled_at)
        waited = (call.answered_at or 0) - since
        if waited <= 0 or _may_be_held(record, call, call.answered_at or 0):
            continue
        if call.process.ended_at is not None and call.process.ended_at < record.ended_at:
            continue
        told = {keys for _, keys in call.process.keys_told[-1:]}
        between = [
            one
            for one in record.answers
            if since - lease <= (one.answered_at or 0) < (call.answered_at or 0)
        ]
        ahead = sum(_share_a_key(one, call, told) for one in between)
        needed = (ahead + 1) * lease + (len(between) // cap + 1 if cap else 0) * lease
        unused = (waited - needed) / lease
        if unused > 1 and not _budget_may_be_spent(record):
            return f"{call}: {unused:.1f} windows unused while it waited for {waited:.3f} s"
    return None


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
    "oldest-replica-first": oldest_replica_first,
    "budget": budget_kept,
    "crash-loop": crash_loops_slowed,
    "nobody-forgotten": nobody_forgotten,
    "slots-used": slots_used,
    # A ticket never fails by itself.
    "no-failure": seen_during_the_run("no-failure"),
    "no-crash": seen_during_the_run("no-crash"),
    # len(queue) is the number of clients that wait; two requests of one shard are two tickets.
    "length": seen_during_the_run("length"),
    # When all have left: no ticket, no place, no task, no key of Redis without an end.
    "nothing-left": seen_during_the_run("nothing-left"),
    # Rule 9.
    "stops": seen_during_the_run("stops"),
}


def broken(record: Record, ignore: frozenset[str] = frozenset()) -> dict[str, str]:
    """Return the invariants that do not hold, with an explanation each."""
    found = ((name, check(record)) for name, check in INVARIANTS.items() if name not in ignore)
    return {name: why for name, why in found if why is not None}


def _share_a_key(one: Call, other: Call, numbers: set[int]) -> bool:
    """Tell whether two shards have the same key, whichever number of keys counts."""
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
    """A call, and the place that it has had for some time."""

    call: Call
    rank: float
    since: float


def _overtaken(record: Record) -> Iterator[tuple[str, bool]]:
    """Go over the calls that were chosen out of turn; tell whether a kept place was ignored."""
    for process in record.processes:
        yield from _overtaken_at(record, process)


def _overtaken_at(record: Record, process: ProcessRecord) -> Iterator[tuple[str, bool]]:
    scenario = record.scenario
    standing: dict[Call, _Standing] = {}
    # By shard, the first arrival and the expiry of each place that nobody has.
    empty = defaultdict[int, list[tuple[float, float]]](list)
    for now, step, call in process.steps:
        if step == "arrived":
            standing[call] = _Standing(call, now, now)
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
    """Tell whether another call should have been chosen now.

    Not one of the same shard: they exchange their places when one of them leaves.
    """
    flight = CLAIM_SECONDS if record.scenario.store == "redis" else 0.0
    chosen_at = other.call.chosen_at
    return (
        (chosen_at is None or chosen_at > now)
        and (other.call.shard is None or other.call.shard != mine.call.shard)
        and other.rank < mine.rank - TOLERANCE
        and other.since < now - flight - TOLERANCE
        and _share_a_key(other.call, mine.call, told)
        and not _may_be_held(record, other.call, now)
    )
