"""What the live page shows of a queue, on the mock clock."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from gateway_queue.queue import Queue
from gateway_queue.queue.overview import lanes
from gateway_queue.service import Service
from gateway_queue.settings import Settings
from gateway_queue.web.dashboard.snapshot import KEYS_MAX, TICKETS_MAX, take
from tests.running import TOLERANCE, WINDOW, service_of


async def wait_for_turn(queue: Queue, shard: int) -> None:
    async with queue.turn(shard):
        pass


@asynccontextmanager
async def with_waiters(number: int, keys: int, **options: Any) -> AsyncIterator[Service]:
    """Run a service with ``number`` clients; shard 1 has been released twice and asks again."""
    settings = Settings(
        window_seconds=WINDOW,
        margin_seconds=0,
        hold_on_start=False,
        max_concurrency=keys,
        place_seconds=600,
        **{"session_start_limit": None, "loop_free_starts": 0, **options},
    )
    service = service_of(settings)
    async with trio.open_nursery() as nursery, trio.open_nursery() as us:
        await nursery.start(service.run)
        for _ in range(2):
            await wait_for_turn(service.queue, 1)
        for shard in [1, *range(keys, keys + number - 1)]:
            us.start_soon(wait_for_turn, service.queue, shard)
            await trio.sleep(0.001)
        yield service
        us.cancel_scope.cancel()
        nursery.cancel_scope.cancel()


async def leave(queue: Queue, *shards: int) -> None:
    """Ask for shards, and disconnect after 0.1 s."""
    with trio.move_on_after(0.1):
        async with trio.open_nursery() as nursery:
            for shard in shards:
                nursery.start_soon(wait_for_turn, queue, shard)


@pytest.mark.parametrize("most", [0, 1, 3, 1000])
async def test_a_short_list_has_the_first_tickets_of_the_whole_list(
    autojump_clock: MockClock, most: int
) -> None:
    async with with_waiters(60, keys=4, loop_free_starts=1) as service:
        await leave(service.queue, *range(1000, 1010))
        whole, first = await lanes(service.queue), await lanes(service.queue, most)
        assert {ticket.state for lane in whole for ticket in lane.tickets} == {
            "waiting",
            "held",
            "away",
        }
        for lane in whole:
            waited = [ticket.waited for ticket in lane.tickets]
            assert waited == sorted(waited, reverse=True)
            del lane.tickets[most:]
        assert first == whole


async def test_the_times_of_the_next_and_the_last_release(autojump_clock: MockClock) -> None:
    async with with_waiters(50, keys=3) as service:
        seen = await take(service)
        etas = [ticket.eta for lane in await lanes(service.queue) for ticket in lane.tickets]
        assert seen.next_release == pytest.approx(min(etas), abs=TOLERANCE)
        assert seen.last_release == pytest.approx(max(etas), abs=TOLERANCE)
        await trio.sleep(seen.last_release - WINDOW / 2)
        assert (await take(service)).waiting > 0
        await trio.sleep(WINDOW)
        done = await take(service)
        assert (done.waiting, done.next_release, done.last_release) == (0, math.inf, math.inf)


async def test_the_last_release_may_be_that_of_a_held_ticket(autojump_clock: MockClock) -> None:
    async with with_waiters(1, keys=1, loop_free_starts=2) as service:
        await trio.sleep(0.1)
        seen = await take(service)
        (ticket,) = seen.lanes[0].tickets
        assert (seen.held, ticket.state) == (1, "held")
        assert seen.last_release == seen.next_release > 2 * WINDOW
        assert seen.last_release == pytest.approx(ticket.eta, abs=TOLERANCE)


async def test_without_enough_session_starts_the_last_release_is_not_known(
    autojump_clock: MockClock,
) -> None:
    async with with_waiters(10, keys=1, session_start_limit=11) as service:
        assert (await take(service)).last_release == math.inf


async def test_the_size_of_a_snapshot_is_limited(autojump_clock: MockClock) -> None:
    async with with_waiters(1000, keys=2 * KEYS_MAX) as service:
        seen = await take(service)
        assert seen.waiting == len(service.queue) > 6 * KEYS_MAX
        assert [key.rate_limit_key for key in seen.keys] == list(range(KEYS_MAX))
        assert sum(len(lane.tickets) for lane in seen.lanes) <= 2 * TICKETS_MAX


async def test_the_timeline_shows_30_windows_of_the_past_and_6_of_the_future(
    autojump_clock: MockClock,
) -> None:
    async with with_waiters(50, keys=1) as service:
        await trio.sleep(10 * WINDOW + 1)
        (key,) = (await take(service)).keys
        assert len(key.released) == 12
        assert key.released[-1] == pytest.approx(-1, abs=0.1)
        assert key.expected[0] == pytest.approx(WINDOW - 1, abs=0.1)
        assert len(key.expected) == 6
        await trio.sleep(35 * WINDOW)
        (key,) = (await take(service)).keys
        assert key.released[0] == pytest.approx(-29 * WINDOW - 1, abs=0.1)
        assert len(key.released) == 30


async def test_totals_count_keys_that_are_not_shown(autojump_clock: MockClock) -> None:
    async with with_waiters(1000, keys=2 * KEYS_MAX) as service, trio.open_nursery() as more:
        await trio.sleep(9 * WINDOW)  # so that no ticket waits but those below
        for shard in range(2 * KEYS_MAX - 5, 2 * KEYS_MAX):
            for _ in range(2):
                more.start_soon(wait_for_turn, service.queue, shard)
        await trio.sleep(0.1)
        seen = await take(service)
        more.cancel_scope.cancel()
    assert seen.waiting == 5
    assert seen.next_release == pytest.approx(WINDOW - 0.1, abs=TOLERANCE)
    assert seen.last_release == pytest.approx(WINDOW - 0.1, abs=TOLERANCE)


async def test_all_held_and_away_tickets_are_listed(autojump_clock: MockClock) -> None:
    """Also those with a late place in their lanes."""
    async with with_waiters(900, keys=2 * KEYS_MAX, loop_free_starts=1) as service:
        await leave(service.queue, *range(1000, 1010))
        seen = await take(service)
        held = [ticket.shard for ticket in seen.aside if ticket.is_held]
        away = [ticket.shard for ticket in seen.aside if not ticket.is_held]
        assert (seen.held, seen.away) == (len(held), len(away)) == (1, 10)
        assert {*away} == {*range(1000, 1010)}
        assert [t.ends_in for t in seen.aside if not t.is_held] == pytest.approx([600] * 10)
