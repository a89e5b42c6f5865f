"""The store in Redis, by itself: on a real server, and with a clock that the test sets."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.lowlevel
import trustme
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from gateway_queue.store import Allowance, Claim, Refusal, Rules
from gateway_queue.store.memory import MemoryStore
from gateway_queue.store.redis import RedisStore, link
from gateway_queue.store.redis.clock import ServerClock
from tests.harness import PATIENCE, free_port
from tests.redis_server import RedisServer, redis_server
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
    store = RedisStore(url, "test", rules, count_error=count_error)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.run)
        yield store
        nursery.cancel_scope.cancel()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what the store does of itself."""
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
async def test_who_has_waited_longest_goes_first_while_it_waits(
    redis: RedisServer, stays: bool
) -> None:
    async with pair(redis.url, Rules(1.0, hold=False)) as (one, other):
        await one.start_window(await claimed(one), trio.current_time())
        long_ago = trio.current_time() - 100
        refusal = await other.claim(0, None, long_ago)
        assert isinstance(refusal, Refusal)
        if not stays:
            await other.withdraw(0)
        await trio.sleep(refusal.seconds)
        assert isinstance(await one.claim(0, None, long_ago + 1), Refusal if stays else Claim)
        assert isinstance(await other.claim(0, None, long_ago), Claim if stays else Refusal)


async def test_a_claim_that_is_given_back_opens_the_key_at_once(redis: RedisServer) -> None:
    rules = Rules(60, hold=False, session_start_limit=10, loop_free_starts=1)
    async with pair(redis.url, rules) as (one, other):
        for _ in range(3):
            await one.give_back(await claimed(one, shard=4))
        assert isinstance(await other.claim(0, 4, trio.current_time()), Claim)
        assert other.session_starts().remaining == 9


@pytest.mark.parametrize(("one", "other"), [(4, 6), (1, 16), (16, 1), (3, 4), (8, 8), (6, 4)])
async def test_replicas_that_know_different_numbers_of_keys_are_not_early(
    redis: RedisServer, one: int, other: int
) -> None:
    """A window of either closes all keys of the other that some shard has besides."""
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


def test_a_clock_that_drifts_is_not_taken_for_one_that_was_set() -> None:
    async def main() -> None:
        clock = ServerClock()
        for second in range(1, 1000):
            server = round((EPOCH + second * 1.0004) * 1e6)
            assert clock.agrees(server, second - 0.001, second + 0.02)

    trio.run(main, clock=MockClock())


@pytest.mark.parametrize("step", [0.05, 3600.0, -0.05, -3600.0])
def test_a_clock_that_was_set_is_noticed(step: float) -> None:
    async def main() -> None:
        clock = ServerClock()
        assert clock.agrees(EPOCH * 1_000_000, 0, 0.01)
        assert not clock.agrees(round((EPOCH + 1 + step) * 1e6), 1, 1.01)

    trio.run(main, clock=MockClock())


@pytest.fixture
def clock_of_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the server decide by a clock that the test sets."""
    script = link.SCRIPT.read_text()
    for original, replacement in (
        ("redis.call('TIME')", "redis.call('HMGET', 'clock', 'seconds', 'micros')"),
        ("redis.call('PEXPIRE', key, math.ceil(after / 1000))", ""),  # it goes by the true clock
    ):
        assert script.count(original) == 1
        script = script.replace(original, replacement)
    (tmp_path / "script.lua").write_text(script)
    monkeypatch.setattr(link, "SCRIPT", tmp_path / "script.lua")


def set_clock(redis: RedisServer, seconds: float) -> None:
    whole, micros = divmod(round((EPOCH + seconds) * 1_000_000), 1_000_000)
    redis.command("HSET", "clock", "seconds", str(whole), "micros", str(micros))


@pytest.mark.usefixtures("clock_of_the_test")
@pytest.mark.parametrize("step", [100.0, -100.0])
async def test_a_redis_whose_clock_is_set_is_not_believed(redis: RedisServer, step: float) -> None:
    """Forward, all windows would seem to be over; back, they would seem to last forever."""
    rules, errors = Rules(0.5, hold=False), list[None]()
    set_clock(redis, trio.current_time())
    stopped = trio.CancelScope()

    async def keep_time() -> None:
        with stopped:
            while True:
                set_clock(redis, trio.current_time() + (step if stepped else 0))
                await trio.lowlevel.checkpoint()

    stepped = False
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep_time)
        async with opened(redis.url, rules, errors) as store:
            await connected(store)
            await store.start_window(await claimed(store), answered_at := trio.current_time())
            stepped = True
            await trio.sleep(0.01)
            assert isinstance(await store.claim(0, None, trio.current_time()), Refusal)
            set_at = trio.current_time()
            await claimed(store)
            assert trio.current_time() - answered_at >= rules.window
            assert trio.current_time() - set_at < 4 * rules.window
            assert errors
        stopped.cancel()


steps = st.lists(
    st.one_of(
        st.tuples(st.just("release"), st.integers(0, 3) | st.none()),
        st.tuples(st.just("give back"), st.integers(0, 3) | st.none()),
        st.tuples(st.just("pass"), st.sampled_from([0.25, 5.0, 15.0, 30.0, 600.0, 3600.0, DAY])),
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
def test_it_decides_as_the_store_in_memory_does(
    redis: RedisServer,
    steps: list[tuple[str, float | None]],
    limit: int | None,
    loop_free_starts: int,
    keys: int,
) -> None:
    """One replica alone, step by step, over hours and days."""
    rules = Rules(WINDOW, False, limit, loop_free_starts)
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
                    clock.jump(value)
                    set_clock(redis, clock.current_time())
                    for _ in range(2):  # what the store asks of itself is answered meanwhile
                        await store.withdraw(0)
                elif act == "allow":
                    now = trio.current_time()
                    allowance = Allowance(12, int(value or 0), now + 6000, now)
                    await memory.allow(allowance)
                    await store.allow(allowance)
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
                min(wait, WINDOW) if expected.concerns == "key" else wait, abs=1e-5
            )
            return
        assert isinstance(outcome, Claim)
        for each, claim in ((memory, expected), (store, outcome)):
            await (each.start_window(claim, now) if uses else each.give_back(claim))
        seen, true = store.session_starts(), memory.session_starts()
        assert (seen.used, seen.total, seen.source) == (true.used, true.total, true.source)
        assert seen.resets_in == pytest.approx(true.resets_in, abs=1e-5)

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
            await until(lambda: store.fault is None or "Unable" in store.fault)
            assert (store.fault is None) == (name == "localhost")


@pytest.mark.parametrize("option", ["ssl_ca_certs=/nonexistent.pem", "max_connections=many"])
async def test_an_option_that_cannot_be_used_is_a_fault(option: str) -> None:
    async with opened(f"rediss://localhost?{option}", Rules(0.2, hold=False)) as store:
        await until(lambda: "not connected" not in str(store.fault))
        assert store.fault
