"""The store in Redis, by itself: on a real server, and with a clock that the test sets."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.lowlevel
import trustme
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs
from trio.testing import MockClock, wait_all_tasks_blocked

from gateway_queue.queue import Queue
from gateway_queue.store import Claim, DiscordBudget, Refusal, Rules
from gateway_queue.store.memory import MemoryStore
from gateway_queue.store.redis import Link, RedisStore, connection
from gateway_queue.store.redis.clock import DRIFT, ServerClock
from gateway_queue.store.redis.connection import Connection
from gateway_queue.store.redis.link import LOOK_SECONDS
from gateway_queue.store.redis.store import RESTORE_SECONDS
from tests.harness import PATIENCE, free_port
from tests.redis_server import Proxy, RedisServer, redis_server
from tests.running import WINDOW

EPOCH = 1_000_000_000
"""What a server's clock shows when the mock clock starts, in seconds."""

DAY = 86_400.0


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture(autouse=True)
def _empty(redis: RedisServer) -> None:
    redis.command("FLUSHALL")


@asynccontextmanager
async def opened(
    url: str, rules: Rules, errors: list[None] | None = None
) -> AsyncIterator[RedisStore]:
    """Run a store, as one replica has it, until the end of the context."""
    count_error = (lambda: None) if errors is None else (lambda: errors.append(None))
    link = Link(url, count_error=count_error)
    store = RedisStore(link, "test", rules)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.run)
        nursery.start_soon(store.run)
        yield store
        nursery.cancel_scope.cancel()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition that the store's own tasks make true."""
    with trio.fail_after(PATIENCE):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.005)


async def connected(store: RedisStore) -> None:
    await until(lambda: store.fault is None)


@asynccontextmanager
async def pair(url: str, rules: Rules) -> AsyncIterator[tuple[RedisStore, RedisStore]]:
    """Run the stores of two replicas that are connected."""
    async with opened(url, rules) as one, opened(url, rules) as other:
        await connected(one)
        await connected(other)
        yield one, other


async def claimed(store: RedisStore, key: int = 0, shard: int | None = None) -> Claim:
    """Claim a key as soon as it is open."""
    came_at = trio.current_time()
    with trio.fail_after(PATIENCE):
        while True:
            outcome = await store.claim(key, shard, came_at)
            if isinstance(outcome, Claim):
                return outcome
            await trio.sleep(outcome.seconds)


async def test_the_lease_of_a_replica_that_dies_ends_a_window_after_its_last_answer(
    redis: RedisServer,
) -> None:
    rules = Rules(0.2, hold=False)
    async with pair(redis.url, rules) as (dying, other):
        claim = await claimed(dying)
        await claimed(other)
        assert trio.current_time() >= claim.answer_by + rules.window


@pytest.mark.parametrize("stays", [True, False])
async def test_the_longest_waiting_ticket_goes_first(redis: RedisServer, stays: bool) -> None:
    async with pair(redis.url, Rules(1.0, hold=False)) as (one, other):
        await one.start_window(await claimed(one), trio.current_time())
        long_ago = trio.current_time() - 100
        refusal = await other.claim(0, None, long_ago)
        assert isinstance(refusal, Refusal)
        if not stays:
            await other.withdraw(0)
        await trio.sleep(refusal.seconds + 0.01)
        assert isinstance(await one.claim(0, None, long_ago + 1), Refusal if stays else Claim)
        assert isinstance(await other.claim(0, None, long_ago), Claim if stays else Refusal)


async def test_a_claim_that_is_given_back_opens_the_key_at_once(redis: RedisServer) -> None:
    rules = Rules(60, hold=False, session_start_limit=10, loop_free_starts=1)
    async with pair(redis.url, rules) as (one, other):
        for _ in range(3):
            await one.give_back(await claimed(one, shard=4))
        await one.withdraw(0)
        assert isinstance(await other.claim(0, 4, trio.current_time()), Claim)
        assert other.session_starts().remaining == 9


@pytest.mark.parametrize(("one", "other"), [(4, 6), (1, 16), (16, 1), (3, 4), (8, 8), (6, 4)])
async def test_replicas_that_know_different_numbers_of_keys_are_not_early(
    redis: RedisServer, one: int, other: int
) -> None:
    """A window of one replica closes each key of the other replica that shares a shard with it."""
    rules = Rules(60, hold=False)
    async with pair(redis.url, rules) as (store, second):
        store.regroup(one)
        second.regroup(other)
        await store.start_window(await claimed(store, key=one // 2), trio.current_time())
        shared = {shard % other for shard in range(one * other) if shard % one == one // 2}
        for key in range(other):
            outcome = await second.claim(key, None, trio.current_time())
            assert isinstance(outcome, Refusal) == (key in shared), key
            if isinstance(outcome, Claim):
                await second.give_back(outcome)


# --- data that is lost while the connection lives ----------------------------------------------


def lose(*keys: str) -> Callable[[RedisServer], None]:
    """Return a fault that deletes some keys, as a full Redis with an eviction policy does."""

    def fault(redis: RedisServer) -> None:
        redis.command("DEL", *(f"test:{key}" for key in keys))

    return fault


def load_an_older_copy(redis: RedisServer) -> None:
    redis.command("DEBUG", "RELOAD", "NOSAVE")


def run_as_another_server(redis: RedisServer) -> None:
    redis.command("HSET", "test:state", "replid", "0" * 40)


FAULTS = {
    "state": lose("state"),
    "starts": lose("starts"),
    "shards": lose("shards"),
    "everything": lose("state", "starts", "shards", "heads"),
    "older copy": load_an_older_copy,
    "other server": run_as_another_server,
}


@pytest.fixture
def debuggable() -> Iterator[RedisServer]:
    """Run a Redis that can load an older copy of its data."""
    with redis_server("--enable-debug-command", "yes") as server:
        yield server


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("first", [0, 1], ids=["the replica that released", "the other replica"])
async def test_data_that_is_lost_in_part_makes_no_release_early(
    debuggable: RedisServer, fault: Callable[[RedisServer], None], first: int
) -> None:
    rules = Rules(1.5, hold=False, session_start_limit=10, loop_free_starts=3)
    async with pair(debuggable.url, rules) as stores:
        one, other = stores
        debuggable.command("SAVE")
        await one.start_window(await claimed(one, shard=1), answered_at := trio.current_time())
        await other.withdraw(0)
        fault(debuggable)
        await claimed(stores[first], shard=2)
        assert trio.current_time() >= answered_at + rules.window


async def test_a_replica_notices_a_loss_that_another_one_did_not_see(
    debuggable: RedisServer,
) -> None:
    """The other replica has sent its last command before the copy was made."""
    async with pair(debuggable.url, Rules(60, hold=False)) as (one, other):
        debuggable.command("SAVE")
        await one.start_window(await claimed(one), trio.current_time())
        debuggable.command("DEBUG", "RELOAD", "NOSAVE")
        await other.withdraw(0)
        await one.withdraw(0)
        assert isinstance(await other.claim(0, None, trio.current_time()), Refusal)
        await until(lambda: other.fault is not None)


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
async def test_the_starts_of_a_replica_that_died_are_known_to_the_others(
    debuggable: RedisServer, fault: Callable[[RedisServer], None]
) -> None:
    rules = Rules(0.1, hold=False, session_start_limit=5, loop_free_starts=2)
    async with opened(debuggable.url, rules) as other:
        await connected(other)
        async with opened(debuggable.url, rules) as dying:
            await connected(dying)
            debuggable.command("SAVE")
            for _ in range(2):
                claim = await claimed(dying, shard=7)
                await dying.start_window(claim, started_at := trio.current_time())
            await dying.give_back(await claimed(dying, shard=8))
            await trio.sleep(LOOK_SECONDS)
        await other.start_window(await claimed(other, shard=1), trio.current_time())
        fault(debuggable)
        await until(lambda: other.fault is not None)
        await connected(other)
        assert other.session_starts().used == 3
        await claimed(other, shard=2)
        assert other.session_starts().used == 4
        refusal = await other.claim(0, 7, trio.current_time())
        assert isinstance(refusal, Refusal)
        assert refusal.concerns == "shard"
        # The replicas compare their clocks with the server's, with an error of half a round trip.
        assert started_at + 15 - trio.current_time() - 0.03 <= refusal.seconds <= 15


async def test_a_failover_behind_a_proxy_that_keeps_connections_makes_no_release_early(
    redis: RedisServer,
) -> None:
    rules = Rules(1.5, hold=False, session_start_limit=3)
    with (
        redis_server("--replicaof", "127.0.0.1", str(redis.port)) as standby,
        Proxy(redis.port) as proxy,
    ):
        proxy.keeps_clients = True
        await until(lambda: "status:up" in standby.command("INFO", "replication"))
        async with pair(proxy.url, rules) as (one, other):
            standby.command("REPLICAOF", "NO", "ONE")  # it misses what comes now
            async with opened(standby.url, rules) as third:  # loads the script on the standby
                await connected(third)
            await one.start_window(await claimed(one), answered_at := trio.current_time())
            await other.withdraw(0)
            proxy.target = standby.port
            await claimed(other)
            assert trio.current_time() >= answered_at + rules.window
            assert other.session_starts().used == 2


async def test_after_a_loss_all_replicas_have_time_to_restore_what_they_know(
    redis: RedisServer,
) -> None:
    """Also if the windows are so short that a lease ends sooner."""
    rules = Rules(0.1, hold=True, session_start_limit=2)
    async with pair(redis.url, rules) as (one, other):
        for store in (one, other):
            await store.start_window(await claimed(store), trio.current_time())
        await trio.sleep(0.05)
        redis.command("FLUSHALL")
        await one.withdraw(0)
        await connected(one)
        with trio.move_on_after(2 * RESTORE_SECONDS):
            await claimed(one)
            pytest.fail("a start was granted beyond the limit of two")


@pytest.mark.parametrize(
    ("memory", "policy", "warned"),
    [
        ("100mb", "allkeys-lru", True),
        ("100mb", "volatile-ttl", True),
        ("100mb", "noeviction", False),
        ("0", "allkeys-lru", False),
    ],
)
async def test_an_eviction_policy_is_logged(memory: str, policy: str, warned: bool) -> None:
    options = ("--maxmemory", memory, "--maxmemory-policy", policy)
    with redis_server(*options) as redis, capture_logs() as logs:
        async with opened(redis.url, Rules(0.2, hold=False)) as store:
            await connected(store)
        assert [e["maxmemory_policy"] for e in logs if "noeviction" in e["event"]] == (
            [policy] if warned else []
        )


async def test_a_redis_user_without_the_info_command_can_be_used(redis: RedisServer) -> None:
    redis.command("ACL", "SETUSER", "queue", "on", ">secret", "~*", "+@all", "-info")
    url = redis.url.replace("//", "//queue:secret@")
    async with opened(url, Rules(0.2, hold=False)) as store:
        await connected(store)
        await store.start_window(await claimed(store), trio.current_time())
        await claimed(store)


async def test_the_list_of_places_expires_though_its_last_one_ends_as_the_next_one_comes(
    redis: RedisServer,
) -> None:
    async def wait_for_turn(queue: Queue, scope: trio.CancelScope) -> None:
        with scope:
            async with queue.turn(None):
                pass

    async with (
        pair(redis.url, Rules(2.0, hold=False)) as (store, _),
        trio.open_nursery() as nursery,
    ):
        queue, first = Queue(store, max_concurrency=1), trio.CancelScope()
        nursery.start_soon(wait_for_turn, queue, first)
        await until(lambda: redis.command("HKEYS", "test:line").endswith(":0"))
        first.cancel()
        nursery.start_soon(wait_for_turn, queue, trio.CancelScope())
        await until(lambda: redis.command("HKEYS", "test:line").endswith(":1"))
        assert int(redis.command("PTTL", "test:line").removeprefix(":")) > 0
        nursery.cancel_scope.cancel()


async def wait_for_turn(queue: Queue, scope: trio.CancelScope) -> None:
    with scope:
        async with queue.turn(1):
            pass


async def test_a_place_is_taken_over_soon_after_its_client_has_left(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that asks another replica can arrive there before its first connection is closed."""
    monkeypatch.setattr("gateway_queue.store.redis.store.LOOK_SECONDS", 10 * PATIENCE)

    def places() -> list[tuple[int, bool]]:
        """Return the time of each place of shard 1, and whether it has a client."""
        listed = redis.command("HGET", "test:line", "1")
        return sorted((int(at), kept == "0") for at, kept in re.findall(r"=(\d+),(\d+)", listed))

    first, second = trio.CancelScope(), trio.CancelScope()
    async with (
        pair(redis.url, Rules(60, hold=True, place_seconds=30)) as (one, other),
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(wait_for_turn, Queue(one, max_concurrency=1), first)
        await until(lambda: len(places()) == 1)
        nursery.start_soon(wait_for_turn, Queue(other, max_concurrency=1), second)
        await until(lambda: len(places()) == 2)
        first.cancel()
        await until(lambda: [has_client for _, has_client in places()] == [True, False])
        second.cancel()


async def test_places_are_shared_also_if_the_first_connection_has_failed(
    redis: RedisServer,
) -> None:
    with Proxy(redis.port) as proxy:
        proxy.swallows_answers_to = b"$4\r\nlook\r\n"
        async with (
            opened(proxy.url, Rules(2.0, hold=False, place_seconds=30)) as store,
            trio.open_nursery() as nursery,
        ):
            queue = Queue(store, max_concurrency=1)
            nursery.start_soon(wait_for_turn, queue, trio.CancelScope())
            await until(lambda: proxy.cuts > 0)
            proxy.swallows_answers_to = None
            await until(lambda: redis.command("HLEN", "test:line") == ":1")
            nursery.cancel_scope.cancel()


# --- claims whose answer is lost ---------------------------------------------------------------


async def test_a_claim_that_arrives_after_it_was_given_back_is_given_back_again(
    redis: RedisServer,
) -> None:
    rules = Rules(2.0, hold=False, session_start_limit=10)
    with Proxy(redis.port) as proxy:
        async with opened(proxy.url, rules) as store, opened(redis.url, rules) as other:
            await connected(store)
            await connected(other)
            proxy.holds_back = b"claim"
            assert isinstance(await store.claim(0, None, trio.current_time()), Refusal)
            proxy.holds_back = None
            await until(lambda: redis.command("ZCARD", "test:starts") == ":1")
            await until(lambda: redis.command("ZCARD", "test:starts") == ":0")
            await until(lambda: redis.command("HEXISTS", "test:state", "claim:1:0") == ":0")
            await claimed(other)  # soon: the older ticket does not claim again


async def test_a_claim_that_is_given_back_late_opens_no_key_that_is_claimed_again(
    redis: RedisServer,
) -> None:
    rules = Rules(0.3, hold=False)
    async with pair(redis.url, rules) as (one, other):
        claim = await claimed(one)
        await claimed(other)
        await one.give_back(claim)
        assert isinstance(await one.claim(0, None, trio.current_time()), Refusal)
        assert redis.command("ZCARD", "test:starts") == ":1"


@pytest.mark.parametrize("loses", [False, True])
async def test_a_doubtful_claim_is_given_back_after_two_reconnections(
    redis: RedisServer, loses: bool
) -> None:
    rules = Rules(2.0, hold=False, session_start_limit=10)
    with Proxy(redis.port) as proxy:
        async with opened(proxy.url, rules) as store:
            await connected(store)
            proxy.swallows_answers_to = b"claim"
            assert isinstance(await store.claim(0, None, trio.current_time()), Refusal)
            if loses:
                redis.command("DEL", "test:state")
            proxy.swallows_answers_to = b"give_back"
            await until(lambda: proxy.cuts == 2)
            proxy.swallows_answers_to = None
            await until(lambda: redis.command("ZCARD", "test:starts") == ":0")
            await connected(store)


async def test_a_claim_without_a_waiting_caller_is_given_back(redis: RedisServer) -> None:
    rules = Rules(2.0, hold=False, session_start_limit=10)
    with Proxy(redis.port, delay=0.1) as proxy:
        async with opened(proxy.url, rules) as store:
            await connected(store)
            with trio.move_on_after(0.15):
                await store.claim(0, None, trio.current_time())
            assert redis.command("ZCARD", "test:starts") == ":1"
            await until(lambda: redis.command("ZCARD", "test:starts") == ":0")


# --- connections that are lost -----------------------------------------------------------------


@asynccontextmanager
async def cut_off(redis: RedisServer, rules: Rules) -> AsyncIterator[tuple[RedisStore, Proxy]]:
    """Run a store that has lost its connection to Redis.

    It cannot connect again until the test sets the target of the proxy to Redis.
    """
    with Proxy(redis.port) as proxy:
        async with opened(proxy.url, rules) as store:
            await connected(store)
            proxy.target = free_port()
            proxy.cut()
            await until(lambda: store.fault is not None)
            yield store, proxy


async def test_a_connection_to_the_same_data_is_trusted_at_once(redis: RedisServer) -> None:
    async with cut_off(redis, Rules(60, hold=False)) as (store, proxy):
        proxy.target = redis.port
        assert isinstance(await claimed(store), Claim)


async def test_a_connection_after_a_longer_time_waits_for_a_lease(redis: RedisServer) -> None:
    """Another server may have taken over meanwhile, and other replicas may use it."""
    async with cut_off(redis, Rules(60, hold=False)) as (store, proxy):
        await trio.sleep(RESTORE_SECONDS)
        proxy.target = redis.port
        await connected(store)
        assert isinstance(await store.claim(0, None, trio.current_time()), Refusal)


async def test_a_hold_goes_on_after_a_connection_was_lost(redis: RedisServer) -> None:
    began, rules = trio.current_time(), Rules(1.5, hold=True)
    async with cut_off(redis, rules) as (store, proxy):
        proxy.target = redis.port
        await claimed(store)
        assert 2.5 <= trio.current_time() - began < 4


def forbid_info(redis: RedisServer) -> None:
    redis.command("ACL", "SETUSER", "default", "-info")


def allow_info(redis: RedisServer) -> None:
    redis.command("ACL", "SETUSER", "default", "+info")


@pytest.mark.parametrize(
    "change",
    [lose("state"), run_as_another_server, forbid_info],
    ids=["other data", "other server", "unknown server"],
)
async def test_a_connection_without_proof_that_the_data_is_the_same_waits_for_a_lease(
    redis: RedisServer, change: Callable[[RedisServer], None]
) -> None:
    async with cut_off(redis, Rules(60, hold=False)) as (store, proxy):
        change(redis)
        proxy.target = redis.port
        await connected(store)
        try:
            assert isinstance(await store.claim(0, None, trio.current_time()), Refusal)
        finally:
            allow_info(redis)


async def test_a_window_that_started_without_a_connection_is_reported_later(
    redis: RedisServer,
) -> None:
    """Otherwise the claim would close the key for CONFIRM_SECONDS (60 s)."""
    rules = Rules(0.5, hold=False, confirm_seconds=60)
    with Proxy(redis.port) as proxy:
        async with opened(proxy.url, rules) as store:
            await connected(store)
            claim = await store.claim(0, 1, trio.current_time(), confirm=True)
            assert isinstance(claim, Claim)
            proxy.target = free_port()
            proxy.cut()
            await until(lambda: store.fault is not None)
            await store.start_window(claim, identified_at := trio.current_time(), confirmed=True)
            proxy.target = redis.port
            await claimed(store)
            assert trio.current_time() >= identified_at + rules.window


# --- one limit over all keys -------------------------------------------------------------------


async def test_releases_of_all_keys_stay_within_the_limit(redis: RedisServer) -> None:
    rules = Rules(1.0, hold=False, releases_per_window=2)
    async with pair(redis.url, rules) as (one, other):
        for store in (one, other):
            store.regroup(8)
        began = trio.current_time()
        claims = [await claimed(one, key=0), await claimed(other, key=1)]
        refusal = await one.claim(2, None, trio.current_time())
        assert isinstance(refusal, Refusal)
        assert refusal.concerns == "queue"
        assert refusal.seconds < 0.1  # a claim that is not used yet may end at any time
        await one.start_window(claims[0], trio.current_time())
        await other.give_back(claims[1])
        claim = await claimed(other, key=2)
        released = [began, trio.current_time()]
        await other.start_window(claim, released[-1])
        assert trio.current_time() - began < 0.5
        refusal = await other.claim(3, None, trio.current_time())
        assert isinstance(refusal, Refusal)
        assert refusal.concerns == "queue"
        assert 0.5 < refusal.seconds <= 1.01
        for key in range(3, 7):
            store = (one, other)[key % 2]
            claim = await claimed(store, key)
            released.append(trio.current_time())
            await store.start_window(claim, released[-1])
        assert min(b - a for a, b in zip(released, released[2:], strict=False)) >= 1.0


@pytest.mark.parametrize("stays", [True, False])
async def test_the_oldest_ticket_of_all_keys_goes_first(redis: RedisServer, stays: bool) -> None:
    rules = Rules(1.0, hold=False, releases_per_window=1)
    async with pair(redis.url, rules) as (one, other):
        for store in (one, other):
            store.regroup(8)
        await one.start_window(await claimed(one, key=0), trio.current_time())
        long_ago = trio.current_time() - 100
        refusal = await other.claim(1, None, long_ago)
        assert isinstance(refusal, Refusal)
        assert refusal.concerns == "queue"
        if not stays:
            await other.withdraw(1)
        await trio.sleep(refusal.seconds + 0.01)
        outcome = await one.claim(2, None, long_ago + 1)
        assert isinstance(outcome, Refusal if stays else Claim)
        if isinstance(outcome, Refusal):
            assert outcome.concerns == "queue"
            assert outcome.seconds <= 0.1
        assert isinstance(await other.claim(1, None, long_ago), Claim if stays else Refusal)


async def test_a_replica_whose_oldest_ticket_has_a_closed_key_delays_no_other_replica(
    redis: RedisServer,
) -> None:
    rules = Rules(1.0, hold=False, releases_per_window=2)
    async with pair(redis.url, rules) as (one, other):
        for store in (one, other):
            store.regroup(8)
        await one.start_window(await claimed(one, key=0), trio.current_time())
        refusal = await other.claim(0, None, trio.current_time() - 100)
        assert isinstance(refusal, Refusal)
        assert refusal.concerns == "key"
        assert isinstance(await one.claim(1, None, trio.current_time()), Claim)


# --- other numbers of keys ---------------------------------------------------------------------


async def test_a_held_shard_of_a_replica_that_has_just_started_delays_no_other_replica(
    redis: RedisServer,
) -> None:
    rules = Rules(0.2, hold=False, loop_free_starts=1)
    async with (
        opened(redis.url, rules) as store,
        opened(redis.url, dataclasses.replace(rules, hold=True, window=4.0)) as starting,
    ):
        await connected(store)
        await connected(starting)
        await store.start_window(await claimed(store, shard=4), trio.current_time())
        long_ago = trio.current_time() - 100
        refusal = await starting.claim(0, 4, long_ago)
        assert isinstance(refusal, Refusal)
        assert refusal.concerns == "shard"
        await trio.sleep(0.3)
        assert isinstance(await store.claim(0, 5, trio.current_time()), Claim)


async def test_a_claim_stays_good_when_the_number_of_keys_changes(redis: RedisServer) -> None:
    async with pair(redis.url, Rules(60, hold=False)) as (one, other):
        for store in (one, other):
            store.regroup(4)
        used, unused = await claimed(one, key=1), await claimed(one, key=2)
        for store in (one, other):
            store.regroup(8)
        for key in (1, 2, 5, 6):
            assert isinstance(await other.claim(key, None, trio.current_time()), Refusal)
        await one.give_back(unused)
        await one.start_window(used, trio.current_time())
        for key in (2, 6):
            assert isinstance(await other.claim(key, None, trio.current_time()), Claim)
        for key in (1, 5):
            assert isinstance(await other.claim(key, None, trio.current_time()), Refusal)


async def test_numbers_of_keys_that_alternate_make_no_release_early(redis: RedisServer) -> None:
    rules = Rules(0.8, hold=False)
    async with pair(redis.url, rules) as (one, other):
        one.regroup(4)
        other.regroup(6)
        late = await claimed(one, key=0)
        while trio.current_time() < late.answer_by - 0.1:
            # No window closes these keys. Each claim shows its replica the other number of keys.
            for store, key in ((one, 1), (other, 3)):
                outcome = await store.claim(key, None, trio.current_time())
                if isinstance(outcome, Claim):
                    await store.give_back(outcome)
            await trio.sleep(0.05)
        await one.start_window(late, answered_at := trio.current_time())
        await claimed(other, key=4)
        assert trio.current_time() >= answered_at + rules.window


async def test_windows_of_former_numbers_of_keys_are_forgotten(redis: RedisServer) -> None:
    async with opened(redis.url, Rules(0.1, hold=False)) as store:
        await connected(store)
        for number in (3, 5, 7):
            store.regroup(number)
            for key in range(number):
                await store.start_window(await claimed(store, key), trio.current_time())
        await trio.sleep(0.5)
        await claimed(store)
        fields = redis.command("HKEYS", "test:state")
        assert "window:7:3" in fields
        assert "window:5" not in fields
        assert "window:3" not in fields


# --- the clock of the server -------------------------------------------------------------------


@pytest.mark.parametrize(
    "rate",
    [
        lambda _: 0.0009,
        lambda _: -0.0009,
        lambda second: 0.0009 if second // 1000 % 2 else -0.0009,
    ],
    ids=["fast", "slow", "changing"],
)
def test_a_clock_that_drifts_is_not_taken_for_one_that_was_set(
    rate: Callable[[int], float],
) -> None:
    async def main() -> None:
        clock, server = ServerClock(6.0, 1.0), float(EPOCH)
        for second in range(1, 100_000):
            server += 1 + rate(second)
            assert clock.agrees(round(server * 1e6), second - 0.001, second + 0.02)
            assert clock.longest_step() < 0.03

    trio.run(main, clock=MockClock())


@pytest.mark.parametrize("step", [1.1, 3600.0, -1.1, -3600.0])
def test_a_clock_that_was_set_is_noticed(step: float) -> None:
    async def main() -> None:
        clock = ServerClock(6.0, 1.0)
        assert clock.agrees(EPOCH * 1_000_000, 0, 0.01)
        assert not clock.agrees(round((EPOCH + 1 + step) * 1e6), 1, 1.01)

    trio.run(main, clock=MockClock())


@pytest.mark.parametrize("step", [0.05, -0.05])
def test_small_clock_steps_count_for_one_window(step: float) -> None:
    async def main() -> None:
        clock = ServerClock(6.0, 1.0)
        assert clock.agrees(EPOCH * 1_000_000, 0, 0.01)
        for second in range(1, 12):
            off = step if second % 2 else 0.0
            assert clock.agrees(round((EPOCH + second + off) * 1e6), second, second + 0.001)
            assert clock.was_set
            is_forward = off == max(0.0, step)
            # Too long by the round trip and by the drift of one second, at most.
            assert 0 <= clock.longest_step() - (0.05 if is_forward else 0) < 0.013
            if second > 2:
                assert 0 <= clock.set_back_by() - (0 if is_forward else 0.05) < 0.013
        for second in range(12, 20):
            assert clock.agrees(round((EPOCH + second) * 1e6), second, second + 0.001)
        assert clock.longest_step() < 0.01
        assert clock.set_back_by() == 0

    trio.run(main, clock=MockClock())


def test_a_clock_step_that_is_shorter_than_the_round_trip_is_bounded() -> None:
    """Also a step that happens before a faster answer shows the clock more precisely."""

    async def main() -> None:
        clock = ServerClock(6.0, 1.0)
        assert clock.agrees(EPOCH * 1_000_000, -0.2, 0.2)
        for second in range(1, 6):
            assert clock.agrees(round((EPOCH + second + 0.15) * 1e6), second, second + 0.001)
            assert clock.longest_step() >= 0.15
        for second in range(6, 20):
            assert clock.agrees(round((EPOCH + second + 0.15) * 1e6), second, second + 0.001)
        assert clock.longest_step() < 0.005

    trio.run(main, clock=MockClock())


def decide_by(clock: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = connection.SCRIPT.read_text()
    for original, replacement in (
        ("redis.call('TIME')", clock),
        ("redis.call('PEXPIRE', key, math.ceil(after / 1000))", ""),  # it uses the real clock
    ):
        assert script.count(original) == 1
        script = script.replace(original, replacement)
    (tmp_path / "script.lua").write_text(script)
    monkeypatch.setattr(connection, "SCRIPT", tmp_path / "script.lua")


@pytest.fixture
def clock_of_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the script use a clock that only the test sets."""
    decide_by("redis.call('HMGET', 'clock', 'seconds', 'micros')", tmp_path, monkeypatch)


def set_clock(redis: RedisServer, seconds: float) -> None:
    whole, micros = divmod(round((EPOCH + seconds) * 1_000_000), 1_000_000)
    redis.command("HSET", "clock", "seconds", str(whole), "micros", str(micros))


@pytest.fixture
def clock_that_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the script use the server's clock, which :func:`step_clock` sets."""
    clock = """(function()
      local clock, step = redis.call('TIME'), redis.call('GET', 'step') or 0
      return {clock[1], clock[2] + step}
    end)()"""
    decide_by(clock, tmp_path, monkeypatch)


def step_clock(redis: RedisServer, seconds: float) -> None:
    """Set the clock forward, or back if negative."""
    redis.command("SET", "step", str(round(seconds * 1_000_000)))


@pytest.mark.usefixtures("clock_that_is_set")
@pytest.mark.parametrize("step", [100.0, -100.0])
async def test_a_redis_whose_clock_is_set_is_not_trusted(redis: RedisServer, step: float) -> None:
    """Set forward, the clock would end all windows; set back, they would seem to last forever."""
    rules, errors = Rules(0.5, hold=False), list[None]()
    async with opened(redis.url, rules, errors) as store:
        await connected(store)
        await store.start_window(await claimed(store), answered_at := trio.current_time())
        step_clock(redis, step)
        assert isinstance(await store.claim(0, None, trio.current_time()), Refusal)
        set_at = trio.current_time()
        await claimed(store)
        assert trio.current_time() - answered_at >= rules.window
        # After a step forward, the data stays the same; after a step back, it begins anew.
        most = 4 * rules.window if step > 0 else RESTORE_SECONDS + 2 * rules.window
        assert trio.current_time() - set_at < most
        assert errors


async def test_windows_and_leases_are_long_enough_by_a_clock_that_runs_fast(
    redis: RedisServer,
) -> None:
    def opens_in() -> float:
        """Return in how many seconds a key opens, if the server's clock runs fast from now on."""
        until_when = int(redis.command("HGET", "test:state", "window:1:0").split()[-1])
        seconds, micros = redis.command("TIME").split()[2::2]
        return (until_when / 1e6 - int(seconds) - int(micros) / 1e6) / (1 + 0.9 * DRIFT)

    rules = Rules(60, hold=False)
    async with opened(redis.url, rules) as store:
        await connected(store)
        claim = await claimed(store)
        assert opens_in() + trio.current_time() >= claim.answer_by + rules.window
        answered_at = trio.current_time()
        await store.start_window(claim, answered_at)
        assert opens_in() + trio.current_time() >= answered_at + rules.window


@pytest.mark.usefixtures("clock_that_is_set")
async def test_a_clock_step_that_a_far_replica_cannot_notice_makes_no_release_early(
    redis: RedisServer,
) -> None:
    rules, granted_at = Rules(2.0, hold=False), list[float]()

    async def claim_after(seconds: float) -> None:
        await trio.sleep(seconds)
        if isinstance(await far.claim(0, None, 0.0), Claim):
            granted_at.append(trio.current_time())

    with Proxy(redis.port, delay=0.1) as proxy:
        async with opened(redis.url, rules) as near, opened(proxy.url, rules) as far:
            await connected(near)
            await connected(far)
            await near.start_window(await claimed(near), answered_at := trio.current_time())
            step_clock(redis, 0.19)
            async with trio.open_nursery() as nursery:
                for number in range(300):
                    nursery.start_soon(claim_after, number / 100)
            assert len(granted_at) == 1
            assert granted_at[0] - answered_at >= rules.window
            assert far.fault is None


@pytest.fixture
def unanswered(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Return a list that has an item for each request to the server, until its answer."""
    requests: list[None] = []
    send = Connection._request  # noqa: SLF001

    async def request(connection: Connection, *arguments: Any, **options: Any) -> Any:
        requests.append(None)
        try:
            return await send(connection, *arguments, **options)
        finally:
            requests.pop()

    monkeypatch.setattr(Connection, "_request", request)
    return requests


async def until_empty(unanswered: list[None]) -> None:
    """Wait until the server has answered. At the next jump, its answers would be too late."""
    await wait_all_tasks_blocked()
    while unanswered:
        await wait_all_tasks_blocked()


# A little more than the windows and the day, which are longer in Redis by the drift of its clock.
PASSING = [0.3, 5.01, 15.0, 30.1, 600.0, 3600.0, 1.002 * DAY]

steps = st.lists(
    st.one_of(
        st.tuples(st.just("release"), st.integers(0, 3) | st.none()),
        st.tuples(st.just("give back"), st.integers(0, 3) | st.none()),
        st.tuples(st.just("pass"), st.sampled_from(PASSING)),
        st.tuples(st.just("allow"), st.integers(0, 12)),
    ),
    max_size=40,
)


@pytest.mark.usefixtures("clock_of_the_test")
@settings(
    deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    steps=steps,
    limit=st.sampled_from([None, 0, 3, 10]),
    loop_free_starts=st.integers(0, 3),
    keys=st.integers(1, 3),
)
def test_the_store_in_redis_decides_as_the_store_in_memory_does(
    redis: RedisServer,
    unanswered: list[None],
    steps: list[tuple[str, float | None]],
    limit: int | None,
    loop_free_starts: int,
    keys: int,
) -> None:
    """One replica alone, step by step, over hours and days."""
    rules = Rules(WINDOW, False, session_start_limit=limit, loop_free_starts=loop_free_starts)
    clock = MockClock()

    async def main() -> None:
        redis.command("FLUSHALL")
        set_clock(redis, 0)
        memory = MemoryStore(rules)
        memory.regroup(keys)
        async with opened(redis.url, rules) as store:
            while store.fault is not None:
                await trio.lowlevel.checkpoint()  # the clock stands still
            store.regroup(keys)
            for act, value in steps:
                if act == "pass":
                    assert value is not None
                    # 1% more, because times in Redis are longer by the drift of its clock.
                    clock.jump(value * 1.01)
                    set_clock(redis, clock.current_time())
                    for _ in range(2):  # the store asks, too
                        await store.withdraw(0)
                    await until_empty(unanswered)
                elif act == "allow":
                    now = trio.current_time()
                    budget = DiscordBudget(12, int(value or 0), now + 6000, now)
                    await memory.update_budget(budget)
                    await store.update_budget(budget)
                else:
                    await compare(memory, store, value, act == "release")

    async def compare(
        memory: MemoryStore, store: RedisStore, value: float | None, uses: bool
    ) -> None:
        shard = None if value is None else int(value)
        key, now = (shard or 0) % keys, trio.current_time()
        expected = await memory.claim(key, shard, now)
        outcome = await store.claim(key, shard, now)
        if isinstance(expected, Refusal):
            assert isinstance(outcome, Refusal)
            assert outcome.concerns == expected.concerns
            # Another replica may change the day's budget at any time.
            wait = expected.seconds
            assert outcome.seconds == pytest.approx(
                min(wait, WINDOW) if expected.concerns == "key" else wait, rel=2 * DRIFT, abs=0.01
            )
            return
        assert isinstance(outcome, Claim)
        for each, claim in ((memory, expected), (store, outcome)):
            await (each.start_window(claim, now) if uses else each.give_back(claim))
        seen, true = store.session_starts(), memory.session_starts()
        assert (seen.used, seen.total, seen.source) == (true.used, true.total, true.source)
        assert seen.resets_in == pytest.approx(true.resets_in, rel=2 * DRIFT, abs=1e-5)

    trio.run(main, clock=clock)


@pytest.mark.parametrize("name", ["localhost", "elsewhere.example"])
async def test_certificates_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    authority, ca, pem = trustme.CA(), str(tmp_path / "ca.pem"), str(tmp_path / "server.pem")
    authority.cert_pem.write_to_path(ca)
    authority.issue_cert(name).private_key_and_cert_chain_pem.write_to_path(pem)
    monkeypatch.setenv("SSL_CERT_FILE", ca)
    port, rules = free_port(), Rules(0.2, hold=False)
    tls = ("--tls-port", str(port), "--tls-cert-file", pem, "--tls-key-file", pem)
    with redis_server(*tls, "--tls-ca-cert-file", ca, "--tls-auth-clients", "no"):
        async with opened(f"rediss://localhost:{port}", rules) as store:
            await until(lambda: store.fault is None or "Unable" in store.fault.reason)
            assert (store.fault is None) == (name == "localhost")


@pytest.mark.parametrize("option", ["ssl_ca_certs=/nonexistent.pem", "max_connections=many"])
async def test_an_option_that_cannot_be_used_is_a_fault(option: str) -> None:
    async with opened(f"rediss://localhost?{option}", Rules(0.2, hold=False)) as store:
        await until(lambda: "not connected" not in str(store.fault))
        assert store.fault


async def test_after_a_change_of_rules_the_next_release_waits_for_a_new_window(
    redis: RedisServer,
) -> None:
    async with opened(redis.url, Rules(0.1, hold=False)) as store:
        await connected(store)
        claim = await claimed(store)
        await store.start_window(claim, trio.current_time())
        changed_at = trio.current_time()
        store.change_rules(Rules(0.8, hold=False))
        claim = await claimed(store)
        assert trio.current_time() - changed_at >= 0.8
        started_at = trio.current_time()
        await store.start_window(claim, started_at)
        await claimed(store)
        assert trio.current_time() - started_at >= 0.8
