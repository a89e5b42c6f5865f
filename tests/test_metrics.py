"""The metrics that the server exports for Prometheus."""

from __future__ import annotations

import pytest
import trio
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from prometheus_client.registry import CollectorRegistry
from trio.testing import MockClock, wait_all_tasks_blocked

from gateway_queue.about import __version__
from gateway_queue.bots_file import DEFAULT_BOT
from gateway_queue.observing.metrics import Metrics
from gateway_queue.queue import Queue
from gateway_queue.store import DiscordBudget, Rules
from gateway_queue.store.memory import MemoryStore
from tests.fake_discord import TOKEN, answer, playing
from tests.harness import Answer, Server, eventually, first_answers, serving
from tests.redis_server import redis_server
from tests.running import WINDOW

TYPES = {
    "gateway_queue_waiting": "gauge",
    "gateway_queue_released_total": "counter",
    "gateway_queue_abandoned_total": "counter",
    "gateway_queue_wait_seconds": "histogram",
    "gateway_queue_identify_seconds": "histogram",
    "gateway_queue_unconfirmed_total": "counter",
    "gateway_queue_lateness_seconds": "histogram",
    "gateway_queue_unkeyed_total": "counter",
    "gateway_queue_loop_held_total": "counter",
    "gateway_queue_session_starts_remaining": "gauge",
    "gateway_queue_session_starts_limit": "gauge",
    "gateway_queue_build_info": "gauge",
    "gateway_queue_ready": "gauge",
    "gateway_queue_held": "gauge",
    "gateway_queue_away": "gauge",
    "gateway_queue_window_seconds": "gauge",
    "gateway_queue_max_concurrency": "gauge",
    "gateway_queue_discord_requests_total": "counter",
    "gateway_queue_redis_round_trip_seconds": "histogram",
    "gateway_queue_store_errors_total": "counter",
}


def scrape(server: Server, accept: str = "text/plain") -> Answer:
    request = f"GET /metrics HTTP/1.1\r\nHost: q\r\nAccept: {accept}\r\n\r\n"
    return server.connect(request.encode()).answer()


def samples(server: Server) -> dict[tuple[str, str], float]:
    """Return each value by name and rate limit key."""
    return {
        (sample.name, sample.labels.get("rate_limit_key", "")): sample.value
        for family in parse_text(scrape(server).body.decode())
        for sample in family.samples
    }


def test_each_event_counts_in_its_metric() -> None:
    window = 0.2
    variables = {"MAX_CONCURRENCY": 2, "SESSION_START_LIMIT": 100, "LOOP_FREE_STARTS": 2}
    with serving(WINDOW_SECONDS=window, **variables) as server:
        first_answers([*map(server.ask, (1, 1, 3, 2)), server.connect()], 5)
        server.ask(1)  # is held
        eventually(lambda: server.status()["waiting"] == 1)
        leaver = server.ask(1)
        eventually(lambda: server.status()["waiting"] == 2)
        leaver.hang_up()
        eventually(lambda: server.status()["abandoned"] == 1)
        seen = samples(server)
    assert seen["gateway_queue_released_total", "0"] == 2
    assert seen["gateway_queue_released_total", "1"] == 3
    assert seen["gateway_queue_waiting", "1"] == 1
    assert seen["gateway_queue_abandoned_total", ""] == 1
    assert seen["gateway_queue_unkeyed_total", ""] == 1
    assert seen["gateway_queue_loop_held_total", ""] == 2
    assert seen["gateway_queue_wait_seconds_count", ""] == 5
    assert seen["gateway_queue_lateness_seconds_count", ""] == 5
    assert seen["gateway_queue_lateness_seconds_sum", ""] < 5 * window
    assert seen["gateway_queue_session_starts_remaining", ""] == 95
    assert seen["gateway_queue_session_starts_limit", ""] == 100
    assert seen["gateway_queue_store_errors_total", ""] == 0
    assert seen["gateway_queue_held", ""] == 1
    assert seen["gateway_queue_away", ""] == 1
    assert seen["gateway_queue_ready", ""] == 1
    assert seen["gateway_queue_window_seconds", ""] == window
    assert seen["gateway_queue_max_concurrency", ""] == 2
    assert seen["gateway_queue_build_info", ""] == 1
    assert seen["process_resident_memory_bytes", ""] > 10_000_000


def test_every_key_has_its_series_before_its_first_ticket() -> None:
    """For Prometheus a series starts with its first value, so it would miss the first release."""
    with serving(MAX_CONCURRENCY=3, WINDOW_SECONDS=0.05) as server:
        before = samples(server)
        server.ask(1).answer()
        server.settle()
        after = samples(server)
    for key in "012":
        assert before["gateway_queue_released_total", key] == 0
        assert before["gateway_queue_waiting", key] == after["gateway_queue_waiting", key] == 0
    assert after["gateway_queue_released_total", "1"] == 1


def test_a_huge_number_of_keys_has_no_huge_number_of_series() -> None:
    with serving(MAX_CONCURRENCY=999_999_999) as server:
        assert len([name for name, _ in samples(server) if name == "gateway_queue_waiting"]) == 1024


def test_the_version_is_a_label() -> None:
    with serving() as server:
        text = scrape(server).body.decode()
    assert f'gateway_queue_build_info{{version="{__version__}"}} 1.0' in text


def test_requests_to_discord_are_counted_by_outcome() -> None:
    with playing(max_concurrency=2) as discord:
        discord.tricks += [answer(429, retry_after="0"), answer(503)]
        url = discord.url
        with serving(
            DISCORD_TOKEN=TOKEN, DISCORD_API_URL=url, DISCORD_REFRESH_SECONDS=60
        ) as server:
            eventually(lambda: server.get("/readyz").status == 200)
            text = scrape(server).body.decode()
    requests = {
        sample.labels["outcome"]: sample.value
        for family in parse_text(text)
        for sample in family.samples
        if sample.name == "gateway_queue_discord_requests_total"
    }
    assert requests == {"answered": 1, "failed": 1, "rate_limited": 1, "rejected_token": 0}


def test_a_server_that_does_not_know_the_limits_is_not_ready() -> None:
    with playing() as discord:
        discord.tricks += [answer(503)] * 9
        with serving(DISCORD_TOKEN=TOKEN, DISCORD_API_URL=discord.url) as server:
            seen = samples(server)
    assert seen["gateway_queue_ready", ""] == 0
    assert ("gateway_queue_max_concurrency", "") not in seen


def test_round_trips_to_redis_are_measured() -> None:
    with redis_server() as redis, serving(REDIS_URL=redis.url) as server:
        eventually(lambda: server.get("/readyz").status == 200)
        seen = samples(server)
    assert seen["gateway_queue_redis_round_trip_seconds_count", ""] > 0
    assert 0 < seen["gateway_queue_redis_round_trip_seconds_sum", ""] < 1


def test_both_formats_have_all_names() -> None:
    with serving(SESSION_START_LIMIT=100) as server:
        server.connect()
        eventually(lambda: server.status()["waiting"] == 1)
        plain = scrape(server, "text/plain;version=0.0.4")
        modern = scrape(server, "application/openmetrics-text;version=1.0.0,text/plain;q=0.5")
        by_default = scrape(server, "*/*")
    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert by_default.headers["content-type"].startswith("text/plain")
    assert modern.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    described = [line.split()[2:] for line in plain.body.decode().splitlines() if "# TYPE" in line]
    assert {name: kind for name, kind in described if name in TYPES} == TYPES
    openmetrics = {family.name for family in parse_openmetrics(modern.body.decode())}  # type: ignore[no-untyped-call]
    assert {name for name in openmetrics if name.startswith("gateway_queue")} == {
        name if TYPES[name] == "gauge" else name.removesuffix("_total") for name in TYPES
    }


def test_without_a_limit_there_are_no_metrics_of_session_starts() -> None:
    with serving() as server:
        assert not [name for name, _ in samples(server) if "session_starts" in name]


def test_metrics_require_the_token_too() -> None:
    with serving(AUTH_TOKEN="secret") as server:
        assert scrape(server).status == 401


def value(registry: CollectorRegistry, name: str) -> float:
    found = registry.get_sample_value(f"gateway_queue_{name}")
    assert found is not None
    return found


@pytest.mark.parametrize("idle", [0.0, 100.0])
async def test_lateness_counts_from_when_a_key_is_open_and_a_client_waits(
    autojump_clock: MockClock, idle: float
) -> None:
    metrics = Metrics()
    observe = metrics.of(DEFAULT_BOT).observe
    store = MemoryStore(Rules(WINDOW, hold=True, place_seconds=30))
    queue = Queue(store, max_concurrency=1, observers=[observe])
    async with trio.open_nursery() as nursery:
        await nursery.start(queue.run)
        await trio.sleep(idle)
        for _ in range(3):
            async with queue.turn(1):
                await trio.sleep(0.25)
        await wait_all_tasks_blocked()
        assert value(metrics.registry, "lateness_seconds_sum") == pytest.approx(3 * 0.25)
        with trio.move_on_after(1):
            async with queue.turn(1):
                raise AssertionError
        await trio.sleep(20)
        async with queue.turn(1):  # back at its place, long after the window has opened
            pass
        await wait_all_tasks_blocked()
        assert value(metrics.registry, "lateness_seconds_sum") == pytest.approx(3 * 0.25)
        first = WINDOW + 0.25 if idle == 0 else 0.25
        assert value(metrics.registry, "wait_seconds_sum") == pytest.approx(
            first + 2 * (WINDOW + 0.25) + 21
        )
        await queue.close()


async def test_a_window_that_opens_earlier_than_expected_is_not_late_before_it_opens(
    autojump_clock: MockClock,
) -> None:
    """Another replica has told the store that the day's session starts are back."""
    metrics = Metrics()
    observe = metrics.of(DEFAULT_BOT).observe
    store = MemoryStore(Rules(WINDOW, hold=False))
    await store.update_budget(DiscordBudget(total=10, remaining=0, resets_at=5e4, asked_at=0))
    queue = Queue(store, max_concurrency=1, observers=[observe])
    async with trio.open_nursery() as nursery:
        await nursery.start(queue.run)
        with trio.move_on_after(10):
            async with queue.turn(1):
                raise AssertionError
        await store.update_budget(DiscordBudget(total=10, remaining=9, resets_at=5e4, asked_at=10))
        async with queue.turn(1):  # back at the first place, so the key is claimed again
            await trio.sleep(0.25)
        await wait_all_tasks_blocked()
        assert value(metrics.registry, "lateness_seconds_sum") == pytest.approx(0.25)
        await queue.close()
