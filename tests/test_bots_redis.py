"""Many bots share one connection to Redis, on the mock clock."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import pytest
import trio
from trio.testing import MockClock

from gateway_queue.store import Claim, Rules
from gateway_queue.store.redis import Link, RedisStore, servers
from gateway_queue.store.redis.link import LOOK_SECONDS
from gateway_queue.store.redis.script import lease_seconds
from gateway_queue.store.redis.store import REST_SECONDS
from tests.exploration.record import History
from tests.exploration.redis_data import Database
from tests.exploration.redis_server import SimulatedPool, SimulatedRedis
from tests.exploration.scenario import draw

BOTS = 200

RULES = Rules(5.0, hold=False, session_start_limit=100)


class Replica:
    """A process that is never frozen or cut off from Redis."""

    is_frozen = False
    way_latency = 0.0

    def __init__(self) -> None:
        self.sends = trio.lowlevel.ParkingLot()

    async def thawed(self) -> None:
        await trio.lowlevel.checkpoint()

    async def reachable(self) -> None:
        pass


class Server:
    """A simulated Redis, and the processes that connect to it."""

    def __init__(self, nursery: trio.Nursery, latency: float) -> None:
        scenario = replace(draw(0), latency=latency, clock_rate=1.0)
        self.redis = SimulatedRedis(
            nursery, History(is_full=False), scenario, random.Random("redis")
        )
        self.nursery = nursery

    def open(self, bots: int, nursery: trio.Nursery | None = None) -> list[RedisStore]:
        """Connect one process, whose tasks run in a nursery, and return the stores of its bots."""
        nursery = nursery or self.nursery
        link = Link("redis://simulated", count_error=lambda: None)
        stores = [RedisStore(link, f"bot:{number}", RULES) for number in range(bots)]
        nursery.start_soon(link.run)
        for store in stores:
            nursery.start_soon(store.run)
        return stores

    def lose_data(self) -> None:
        self.redis.data = Database(random.Random("data"))

    def bots_with_starts(self) -> int:
        return sum(key.endswith(b":starts") for key in self.redis.data.values)


@asynccontextmanager
async def serving(monkeypatch: pytest.MonkeyPatch, latency: float = 0.001) -> AsyncIterator[Server]:
    async with trio.open_nursery() as nursery:
        server = Server(nursery, latency)
        pools = partial(SimulatedPool, server.redis, Replica())
        monkeypatch.setattr(servers, "connections", lambda *_: pools())
        yield server
        nursery.cancel_scope.cancel()


async def until(condition: Callable[[], bool]) -> float:
    """Wait for a condition, and return how long that took, in seconds."""
    started_at = trio.current_time()
    while not condition():  # noqa: ASYNC110  # on a clock that jumps
        await trio.sleep(0.01)
    return trio.current_time() - started_at


async def connected(*stores: RedisStore) -> None:
    """Wait until stores can use the server, trust it, and have nothing to do."""
    await until(lambda: all(store.fault is None for store in stores))
    await trio.sleep(lease_seconds(RULES) + 3 * LOOK_SECONDS)


async def start_a_shard(store: RedisStore) -> None:
    claim = await store.claim(0, 0, trio.current_time())
    assert isinstance(claim, Claim)
    await store.start_window(claim, trio.current_time())


async def test_many_bots_restore_in_time_what_a_slow_redis_has_lost(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    del autojump_clock
    async with serving(monkeypatch, latency=0.1) as server:
        stores = server.open(BOTS)
        await connected(*stores)
        async with trio.open_nursery() as starts:
            for store in stores:
                starts.start_soon(start_a_shard, store)
        await trio.sleep(3 * LOOK_SECONDS)
        server.lose_data()
        seconds = await until(lambda: server.bots_with_starts() == BOTS)
        # After a lease, a replica may trust the server.
        assert seconds < lease_seconds(RULES)


async def test_a_store_that_rests_sends_nothing_until_there_is_a_ticket(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    del autojump_clock
    async with serving(monkeypatch) as server:
        stores = server.open(2)
        await connected(*stores)
        before = dict(server.redis.data.values[b"bot:0:state"])
        await trio.sleep(REST_SECONDS / 2)
        assert server.redis.data.values[b"bot:0:state"] == before
        await start_a_shard(stores[0])
        assert server.redis.data.values[b"bot:0:state"] != before
        await trio.sleep(REST_SECONDS + 2)
        assert stores[0].fault is None
        await start_a_shard(stores[0])


async def test_a_store_that_rests_learns_of_the_starts_of_a_replica_that_dies(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    del autojump_clock
    async with serving(monkeypatch) as server:
        (store,) = server.open(1)
        async with trio.open_nursery() as dying:
            (other,) = server.open(1, dying)
            await connected(store, other)
            await start_a_shard(other)
            await trio.sleep(2 * LOOK_SECONDS)
            dying.cancel_scope.cancel()
        server.lose_data()
        await connected(store)
        assert store.session_starts().used == 1


@pytest.mark.parametrize("clock", [-30.0, 30.0])
async def test_a_store_that_rests_notices_that_the_clock_was_set(
    clock: float, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    del autojump_clock
    async with serving(monkeypatch) as server:
        (store,) = server.open(1)
        await connected(store)
        server.redis.set_clock(clock)
        assert await until(lambda: store.fault is not None) < LOOK_SECONDS + 0.1


@pytest.mark.parametrize("key", [b"bot:1:state", b"bot:1:starts"])
async def test_a_store_that_rests_notices_the_loss_of_one_key(
    key: bytes, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    del autojump_clock
    async with serving(monkeypatch) as server:
        stores = server.open(2)
        await connected(*stores)
        await start_a_shard(stores[1])
        await trio.sleep(3 * LOOK_SECONDS)
        server.redis.data.delete(key)
        assert await until(lambda: stores[1].fault is not None) < LOOK_SECONDS + 0.1
        await connected(*stores)
        assert stores[1].session_starts().used == 1
