"""The interface of ``decisions.lua``: the arguments of its commands, and its answers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

from gateway_queue.store import IN_FLIGHT_WINDOWS, USUAL_TOTAL, Claim, Rules
from gateway_queue.store.budget import DAY
from gateway_queue.store.redis.clock import MICROSECONDS, ServerClock, longest_there

LONGEST_ANSWER = 1.0
"""Seconds for which a claim is good, at most. If a replica dies with a claim, the others wait for
this time and a window."""

GRANTED = 0

CONCERNS: dict[int, Literal["shard", "key", "queue"]] = {1: "key", 2: "shard", 3: "queue"}
"""What has to wait after a refusal, by its verdict."""


class ScriptReply(NamedTuple):
    """What the script returns; times are in microseconds."""

    verdict: int
    wait: int
    """For a grant: how long the key, and the queue, has been open."""
    now: int
    since: int
    used: int
    total: int
    resets_in: int
    is_discords: int


def answer_seconds(rules: Rules) -> float:
    """Return for how many seconds a claim is good for an answer."""
    return min(rules.window, LONGEST_ANSWER)


def usable_seconds(rules: Rules) -> float:
    """Return how many seconds Redis may take for a claim, so that its client is still in time."""
    return answer_seconds(rules) / 2 - glance_seconds(rules)


def glance_seconds(rules: Rules) -> float:
    """Return after how many seconds, at most, a replica that waits for another one claims again.

    The other replica answers a client, or is late with the claim for an older ticket.
    """
    return min(rules.window / 20, 0.05)


def lease_seconds(rules: Rules) -> float:
    """Return for how many seconds a claim closes a key if it is neither used nor given back."""
    return rules.unconfirmed_window + answer_seconds(rules)


def script_settings(rules: Rules) -> tuple[int, ...]:
    """Return the settings that each command of the script begins with."""
    window, limit = rules.window, rules.session_start_limit
    return (
        # These are long enough also if the clock of the server runs faster than ours.
        microseconds(longest_there(window)),
        microseconds(longest_there(lease_seconds(rules))),
        microseconds(longest_there(DAY)),
        microseconds(longest_there(IN_FLIGHT_WINDOWS * window)),
        # How late a replica may claim, and still go first with its older ticket.
        microseconds(window / 10),
        microseconds(glance_seconds(rules)),
        -1 if limit is None else limit,
        USUAL_TOTAL,
        rules.loop_free_starts,
        rules.releases_per_window or 0,
        microseconds(longest_there(rules.place_seconds)),
    )


class Lease(NamedTuple):
    """A confirmed claim whose shard is identifying."""

    max_concurrency: int
    key: int
    token: str
    until: float
    """When the lease ends (:func:`trio.current_time`)."""


def words(claim: Claim | Lease) -> tuple[int, int, str]:
    """Return the arguments by which the script identifies a claim."""
    return claim.max_concurrency, claim.key, claim.token


def leases_in(listed: str, clock: ServerClock) -> Iterator[Lease]:
    """Read the script's list of confirmed claims."""
    for entry in listed.split():
        token, value = entry.split("=")
        number, key, until = map(int, value.split(":"))
        yield Lease(number, key, token, clock.when(until))


def shard_of(token: str) -> int | None:
    """Return the shard that a token names."""
    shard = token.rpartition(":")[2]
    return int(shard) if shard else None


def microseconds(seconds: float) -> int:
    """Convert to microseconds, rounded up, so that no release is early."""
    return math.ceil(seconds * MICROSECONDS)
