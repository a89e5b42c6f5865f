"""What Prometheus sees."""

from __future__ import annotations

import pytest
import trio
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from prometheus_client.registry import CollectorRegistry
from trio.testing import MockClock, wait_all_tasks_blocked

from gateway_queue.observing.metrics import Metrics
from gateway_queue.queue import Queue
from gateway_queue.store import Rules
from gateway_queue.store.memory import MemoryStore
from tests.harness import Answer, Server, eventually, first_answers, serving
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
    "gateway_queue_session_starts_total": "gauge",
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


def test_what_happens_is_counted() -> None:
    variables = {"MAX_CONCURRENCY": 2, "SESSION_START_LIMIT": 100, "LOOP_FREE_STARTS": 2}
    with serving(WINDOW_SECONDS=0.05, **variables) as server:
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
    assert seen["gateway_queue_lateness_seconds_sum", ""] < 5 * 0.05
    assert seen["gateway_queue_session_starts_remaining", ""] == 95
    assert seen["gateway_queue_session_starts_total", ""] == 100
    assert seen["gateway_queue_store_errors_total", ""] == 0
    assert seen["process_resident_memory_bytes", ""] > 10_000_000


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


def test_without_a_limit_there_are_no_session_starts() -> None:
    with serving() as server:
        assert not [name for name, _ in samples(server) if "session_starts" in name]


def test_metrics_ask_for_the_token_too() -> None:
    with serving(AUTH_TOKEN="secret") as server:
        assert scrape(server).status == 401


def value(registry: CollectorRegistry, name: str) -> float:
    found = registry.get_sample_value(f"gateway_queue_{name}")
    assert found is not None
    return found


@pytest.mark.parametrize("idle", [0.0, 100.0])
async def test_lateness_counts_from_when_the_window_is_open_and_somebody_waits(
    autojump_clock: MockClock, idle: float
) -> None:
    metrics = Metrics()
    store = MemoryStore(Rules(WINDOW, hold=True))
    queue = Queue(store, max_concurrency=1, place_seconds=30, observers=[metrics.observe])
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
