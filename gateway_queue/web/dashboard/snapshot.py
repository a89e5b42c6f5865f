"""The data that the page shows for one moment."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from heapq import merge, nsmallest
from itertools import chain, islice
from statistics import median

import trio

from gateway_queue.faults import Fault
from gateway_queue.queue import Queue
from gateway_queue.queue.events import NotConfirmed, Released
from gateway_queue.queue.lane import Place
from gateway_queue.queue.overview import IdentifyingStatus, LaneStatus, Steps, lanes, next_release
from gateway_queue.service import Service
from gateway_queue.settings import Settings
from gateway_queue.store import DistantPlace, SessionStarts

WINDOWS_BEHIND, WINDOWS_AHEAD = 30, 6
"""Windows of the past and of the future that the timeline shows."""

KEYS_MAX = 64
"""Rate limit keys to show."""

TICKETS_MAX, TICKETS_OF_KEY_MIN, TICKETS_OF_KEY_MAX = 160, 5, 100
"""Tickets to show: of all keys, and of each key at least and at most. They limit the cost of a
snapshot."""

LATEST_MIN, LATEST_MAX = 10, 32
"""Latest releases to show: as many as one window has, between these two."""

ASIDE_MAX, IDENTIFYING_MAX, FREQUENT_MAX = 20, 10, 5
"""Held or away tickets, identifying shards, and shards that start often, to list at most."""


@dataclass(frozen=True)
class Condition:
    """The state of the store, or of Discord's API."""

    name: str
    state: str
    good: bool
    fault_for: float = math.inf
    """Seconds for which it has not worked; infinite if that is not known, or if it works."""
    retry_in: float = math.inf


@dataclass(frozen=True)
class Spread:
    """How long something took, in seconds."""

    median: float
    worst: float


@dataclass(frozen=True)
class KeyStatus:
    """A row of the timeline. Times are in seconds from the snapshot on; past times are negative."""

    rate_limit_key: int
    waiting: int
    next_release: float
    """Infinite if no client waits, or if it is not known."""
    released: list[float]
    expected: list[float]


@dataclass(frozen=True)
class AsideStatus:
    """A held ticket, or the place of a client that is away."""

    rate_limit_key: int
    shard: int | None
    is_held: bool
    waited: float
    ends_in: float
    """Seconds until the hold is over, or the place is given up."""


@dataclass(frozen=True)
class Snapshot:
    """The queue at one moment. Times are in seconds."""

    taken_at: float
    """Since the epoch."""
    not_ready: str | None
    """Why no ticket can be released; None if tickets can be released."""
    conditions: list[Condition]
    window: float
    """Seconds between two releases that are not confirmed: the window and the margin."""
    max_concurrency: int | None
    waiting: int
    held: int
    away: int
    released: int
    abandoned: int
    starts: SessionStarts
    next_release: float
    last_release: float
    """Seconds until all tickets that wait now are released; infinite if not known."""
    lateness: Spread | None
    """How late the releases in the timeline were."""
    identifying: list[tuple[int, IdentifyingStatus]]
    """Shards that have not confirmed yet, with their rate limit keys."""
    identify: Spread | None
    """How long the last shards took to identify."""
    not_confirmed: list[tuple[float, int | None]]
    """The last shards that never confirmed, the newest first, and how long ago that was."""
    frequent: list[tuple[int | None, int]]
    """The shards that start most often, and their starts in 24 hours."""
    counted_for: float
    """For how long starts have been counted, at most 24 hours."""
    up_for: float
    settings: list[str]
    """The rules of the queue, each as a short text."""
    is_shared: bool
    """Whether other replicas may release tickets, too."""
    keys: list[KeyStatus]
    lanes: list[LaneStatus]
    """The lanes that have tickets, with their first tickets."""
    aside: list[AsideStatus]
    """Tickets that are held or away, of all keys; those that end first."""
    latest: list[tuple[float, Released]]
    """The last releases, the newest first, and how long ago they were."""


async def take(service: Service) -> Snapshot:
    """Take a snapshot, at a cost that does not grow with the number of tickets of a key."""
    queue = service.queue
    now, window = trio.current_time(), queue.store.rules.unconfirmed_window
    number = min(queue.max_concurrency or 1, KEYS_MAX)
    most = min(max(TICKETS_MAX // number, TICKETS_OF_KEY_MIN), TICKETS_OF_KEY_MAX)
    identify = _spread(service.recent.identify_times())
    identify_seconds = identify.median if identify else 0.0
    all_lanes = await lanes(queue, most, identify_seconds=identify_seconds)
    shown = [lane for lane in all_lanes if lane.rate_limit_key < number]
    starts = queue.store.session_starts()
    recent = [one for one in service.recent.releases if one.at > now - WINDOWS_BEHIND * window]
    late = [one.lateness for one in recent]
    latest = min(max(number, LATEST_MIN), LATEST_MAX)
    keys = _keys(number, shown, recent, now, window)
    return Snapshot(
        taken_at=time.time(),
        not_ready=service.not_ready(),
        conditions=[_store(service), _discord(service)],
        window=window,
        max_concurrency=queue.max_concurrency,
        waiting=sum(lane.waiting for lane in all_lanes),
        held=sum(lane.held for lane in all_lanes),
        away=sum(lane.away for lane in all_lanes),
        released=queue.released,
        abandoned=queue.abandoned,
        starts=starts,
        next_release=min(map(next_release, all_lanes), default=math.inf),
        last_release=_last_release(all_lanes, starts, window),
        lateness=_spread(late),
        identifying=[
            (lane.rate_limit_key, lane.identifying) for lane in all_lanes if lane.identifying
        ][:IDENTIFYING_MAX],
        identify=identify,
        not_confirmed=[
            (now - one.at, one.shard)
            for one in reversed(service.recent.identifies)
            if isinstance(one, NotConfirmed)
        ][:IDENTIFYING_MAX],
        frequent=queue.store.starts_by_shard.most(FREQUENT_MAX),
        counted_for=queue.store.starts_by_shard.counted_for,
        up_for=time.time() - service.started_at,
        settings=list(_settings(service.settings)),
        is_shared=service.settings.redis_url is not None,
        keys=keys,
        lanes=shown,
        aside=await _aside(queue, now),
        latest=[(now - one.at, one) for one in recent[: -latest - 1 : -1]],
    )


def _keys(
    number: int, shown: list[LaneStatus], recent: list[Released], now: float, window: float
) -> list[KeyStatus]:
    """Describe each rate limit key, also without waiting clients."""
    released = defaultdict[int, list[float]](list)
    for release in recent:
        released[release.rate_limit_key].append(release.at - now)
    by_key = {lane.rate_limit_key: lane for lane in shown}
    return [
        _key(by_key.get(key, LaneStatus(key, 0, 0, 0, math.inf, None, [])), released[key], window)
        for key in range(number)
    ]


async def _aside(queue: Queue, now: float) -> list[AsideStatus]:
    """List the held places, then the places that are away; those that end first come first."""
    line, steps, lanes = await queue.store.line(), Steps(), queue.lanes.values()
    held = (place for _, place in merge(*(lane.held.items() for lane in lanes)))
    away = (place for _, place in merge(*(lane.away.items() for lane in lanes)))
    if line is None:
        return [_aside_status(queue, place, now) for place in islice(chain(held, away), ASIDE_MAX)]
    aside = [_aside_status(queue, place, now) for place in islice(held, ASIDE_MAX)]
    for place in line.elsewhere:
        await steps.next()
        if place.is_away or place.held_until > now:
            aside.append(_aside_status(queue, place, now))
    return nsmallest(ASIDE_MAX, aside, key=lambda one: (not one.is_held, one.ends_in))


def _aside_status(queue: Queue, place: Place | DistantPlace, now: float) -> AsideStatus:
    return AsideStatus(
        rate_limit_key=queue.key(place.shard),
        shard=place.shard,
        is_held=not place.is_away,
        waited=now - place.joined_at,
        ends_in=(place.expires_at if place.is_away else place.held_until) - now,
    )


def _key(lane: LaneStatus, released: list[float], window: float) -> KeyStatus:
    turns = [ticket.eta for ticket in lane.tickets if ticket.state != "away"]
    return KeyStatus(
        rate_limit_key=lane.rate_limit_key,
        waiting=lane.waiting,
        next_release=next_release(lane),
        released=released,
        expected=[eta for eta in turns if eta < WINDOWS_AHEAD * window],
    )


def _spread(seconds: list[float]) -> Spread | None:
    return Spread(median(seconds), max(seconds)) if seconds else None


def _store(service: Service) -> Condition:
    name, fault = service.settings.store_name, service.queue.store.fault
    if fault is not None:
        return _broken("Store", f"{name}: {fault.reason}", fault)
    return Condition("Store", name, good=True)


def _broken(name: str, state: str, fault: Fault) -> Condition:
    now = trio.current_time()
    retry_in = max(0.0, fault.retry_at - now)
    return Condition(name, state, good=False, fault_for=now - fault.since, retry_in=retry_in)


def _discord(service: Service) -> Condition:
    limits = service.limits
    if limits is None:
        return Condition("Discord", "not asked", good=True)
    if limits.fault is not None:
        return _broken("Discord", limits.fault.reason, limits.fault)
    if service.queue.max_concurrency is None:
        return Condition("Discord", "limits not known yet", good=False)
    return Condition("Discord", "limits known", good=True)


def _settings(settings: Settings) -> Iterator[str]:
    yield f"window {settings.window_seconds:g} s"
    yield f"margin {settings.margin_seconds:g} s"
    yield f"confirmations within {settings.confirm_seconds:g} s"
    places, starts = settings.place_seconds, settings.loop_free_starts
    yield f"places kept for {places:g} s" if places else "no places kept"
    free = "1 free start" if starts == 1 else f"{starts} free starts"
    yield f"{free} per shard and hour" if starts else "crash loops not held"
    yield "AUTH_TOKEN set" if settings.auth_token else "no AUTH_TOKEN"


def _last_release(lanes: list[LaneStatus], starts: SessionStarts, window: float) -> float:
    waiting = sum(lane.waiting for lane in lanes)
    if starts.enforced and starts.remaining is not None and starts.remaining < waiting:
        return math.inf
    return max((_last_turn(lane, window) for lane in lanes if lane.waiting), default=math.inf)


def _last_turn(lane: LaneStatus, window: float) -> float:
    turns = [ticket.eta for ticket in lane.tickets if ticket.state != "away"]
    if len(turns) < lane.waiting:  # the others are not listed
        turns.append(lane.opens_in + (lane.waiting - lane.held - 1) * window)
    return max(turns)
