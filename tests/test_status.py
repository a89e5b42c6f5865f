"""What ``/status`` says, on the mock clock."""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from gateway_queue.faults import next_fault
from gateway_queue.queue import Queue
from gateway_queue.service import Service
from gateway_queue.settings import Settings
from gateway_queue.store.budget import DAY
from gateway_queue.store.starts_by_shard import STARTS_MAX, StartsByShard
from gateway_queue.web.status import TICKETS_PER_STEP, status_document
from tests.fake_discord import TOKEN, answer, playing
from tests.harness import eventually, free_port, serving
from tests.running import WINDOW, service_of


@asynccontextmanager
async def served(**options: Any) -> AsyncIterator[Service]:
    settings = Settings(window_seconds=WINDOW, margin_seconds=0, hold_on_start=False, **options)
    service = service_of(settings)
    async with trio.open_nursery() as nursery:
        await nursery.start(service.run)
        yield service
        nursery.cancel_scope.cancel()


async def wait_for_turn(queue: Queue, shard: int) -> None:
    async with queue.turn(shard):
        pass


async def ask(service: Service, nursery: trio.Nursery, *shards: int) -> None:
    for shard in shards:
        nursery.start_soon(wait_for_turn, service.queue, shard)
        await wait_all_tasks_blocked()


async def status(service: Service, shard: int | None = None) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(await status_document(service, shard))
    return document


async def test_long_lists_are_written_in_steps(autojump_clock: MockClock) -> None:
    """Releases that are due in the meantime do not wait."""
    steps = 0

    async def count_steps() -> None:
        nonlocal steps
        while True:
            await trio.lowlevel.checkpoint()
            steps += 1

    async with served(max_concurrency=3) as service, trio.open_nursery() as nursery:
        for shard in range(40 * TICKETS_PER_STEP):
            nursery.start_soon(wait_for_turn, service.queue, shard)
        await wait_all_tasks_blocked()
        nursery.start_soon(count_steps)
        document = await status(service)
        nursery.cancel_scope.cancel()
    assert sum(len(lane["tickets"]) for lane in document["lanes"]) == 40 * TICKETS_PER_STEP - 3
    assert steps >= 75


async def test_tickets_that_leave_while_the_list_is_written_are_left_out(
    autojump_clock: MockClock,
) -> None:
    async with served(place_seconds=0) as service, trio.open_nursery() as nursery:
        await ask(service, nursery, 1)
        async with trio.open_nursery() as leavers:
            for shard in range(10 * TICKETS_PER_STEP):
                leavers.start_soon(wait_for_turn, service.queue, shard)
            await wait_all_tasks_blocked()
            written: list[dict[str, Any]] = []

            async def write() -> None:
                written.append(await status(service))

            nursery.start_soon(write)
            await trio.lowlevel.checkpoint()
            await trio.lowlevel.checkpoint()
            leavers.cancel_scope.cancel()
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    positions = [ticket["position"] for ticket in written[0]["lanes"][0]["tickets"]]
    assert positions == [*range(1, len(positions) + 1)]
    assert 0 < len(positions) < 10 * TICKETS_PER_STEP


async def test_one_shard(autojump_clock: MockClock) -> None:
    async with served(max_concurrency=2) as service, trio.open_nursery() as nursery:
        await ask(service, nursery, 1, 3, 5, 7, 5)
        await trio.sleep(1)
        five = await status(service, 5)
        one = await status(service, 1)
        none = await status(service, 99)
        await trio.sleep(5 * WINDOW)
    assert five["waiting"] == one["waiting"] == 4
    (lane,) = five["lanes"]
    assert [(t["shard"], t["position"]) for t in lane["tickets"]] == [(5, 2), (5, 4)]
    assert [t["eta"] for t in lane["tickets"]] == pytest.approx([2 * WINDOW - 1, 4 * WINDOW - 1])
    assert five["shard"] == {"shard": 5, "rate_limit_key": 1, "starts": 0, "last_release": None}
    assert one["shard"]["starts"] == 1
    assert one["shard"]["last_release"] == {"ago": 1.0, "waited": 0.0}
    assert one["lanes"][0]["tickets"] == none["lanes"][0]["tickets"] == []


async def test_totals(autojump_clock: MockClock) -> None:
    async with (
        served(loop_free_starts=1, place_seconds=60, session_start_limit=0) as service,
        trio.open_nursery() as nursery,
    ):
        await ask(service, nursery, 1, 1)
        with trio.move_on_after(0.1):
            await wait_for_turn(service.queue, 2)
        seen = await status(service)
        nursery.cancel_scope.cancel()
    assert (seen["waiting"], seen["held"], seen["away"]) == (1, 1, 1)
    assert (seen["starts_used"], seen["session_starts"]) == (1, None)
    assert (seen["ready"], seen["reason"]) == (True, None)
    started_at = datetime.fromisoformat(seen["started_at"])
    assert timedelta(0) <= datetime.now(UTC) - started_at < timedelta(minutes=1)


def test_a_fault_of_discord_says_since_when_and_when_it_is_tried_again() -> None:
    with playing() as discord:
        discord.tricks += [answer(429, retry_after="300")]
        with serving(DISCORD_TOKEN=TOKEN, DISCORD_API_URL=discord.url) as server:
            eventually(lambda: server.status()["faults"]["discord"] is not None)
            seen = server.status()
    assert seen["ready"] is False
    assert seen["reason"] == "Discord's limits are not known yet: 429 Too Many Requests"
    fault = seen["faults"]["discord"]
    assert fault["reason"] == "429 Too Many Requests"
    assert 0 <= fault["for"] < 20
    assert 280 < fault["retry_in"] <= 300
    assert seen["faults"]["store"] is None


def test_a_fault_of_redis_says_since_when_and_when_it_is_tried_again() -> None:
    with serving(REDIS_URL=f"redis://127.0.0.1:{free_port()}") as server:
        eventually(lambda: server.status()["faults"]["store"]["for"] > 0.5)
        seen = server.status()
    assert seen["ready"] is False
    fault = seen["faults"]["store"]
    assert seen["reason"] == f"Redis cannot be used: {fault['reason']}"
    assert 0 <= fault["retry_in"] <= 2


def test_a_bad_shard_is_refused() -> None:
    with serving() as server:
        assert server.get("/status?shard=2").status == 200
        refused = server.get("/status?shard=-1")
    assert refused.status == 400
    assert b"shard must be a whole number" in refused.body


def test_a_repeated_fault_keeps_the_time_of_the_first() -> None:
    first = next_fault(None, "refused", now=10, retry_in=1)
    second = next_fault(first, "timed out", now=12, retry_in=2)
    assert (second.reason, second.since, second.retry_at) == ("timed out", 10, 14)


async def test_starts_of_a_day(autojump_clock: MockClock) -> None:
    starts, numbers = StartsByShard(), itertools.count()

    def start(shard: int | None) -> int:
        number = next(numbers)
        starts.add(number, shard, trio.current_time())
        return number

    for shard in (1, 2, 2, 3, 3, 3, None, None):
        last = start(shard)
    assert starts.most(2) == [(3, 3), (2, 2)]
    assert starts.of(1) == 1
    starts.add(last, None, trio.current_time())
    assert starts.most(9)[1:] == [(2, 2), (None, 2)], "a start counts once"
    starts.remove(last)
    starts.remove(last)
    assert starts.most(9) == [(3, 3), (2, 2)]
    assert starts.counted_for == 0
    await trio.sleep(DAY / 2)
    start(1)
    assert starts.counted_for == DAY / 2
    await trio.sleep(DAY / 2)
    assert starts.most(9) == []
    assert starts.of(1) == 1
    await trio.sleep(DAY / 4)
    assert starts.counted_for == DAY
    for number in range(STARTS_MAX):
        start(number + 10)
    assert starts.of(1) == 0
