"""Metrics for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gateway_queue.discord.api import Outcome
from gateway_queue.queue.events import (
    Abandoned,
    Event,
    Held,
    Identified,
    KeysChanged,
    NotConfirmed,
    Released,
    ReleasedAtOnce,
    Unkeyed,
)

WAIT_BUCKETS = (0.1, 1, 5, 15, 30, 60, 120, 300, 600, 1200, 1800, 3600)
"""Seconds: from "at once" over the patience of common HTTP clients to a fleet's whole start."""

IDENTIFY_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 30)
"""Seconds: from an idle bot on the same machine to the default of CONFIRM_SECONDS, and beyond."""

ROUND_TRIP_BUCKETS = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
"""Seconds: from Redis on the same machine to the longest that an answer may take."""

KEYS_MAX = 1024
"""Rate limit keys that have series of their own from the start. Discord grants the largest bots
some dozens."""

LATENESS_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1)
"""Seconds: from what the kernel's timer allows to what takes shards out of their windows."""


class Metrics:
    """What is counted while the queue runs; all of it belongs to one registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        self._released = self._counter("released", "Tickets that had their turn.", "rate_limit_key")
        self._abandoned = self._counter("abandoned", "Clients that left without their turn.")
        self._unkeyed = self._counter(
            "unkeyed", "Tickets that named no shard though there are several rate limit keys."
        )
        self._loop_held = self._counter(
            "loop_held", "Times that a ticket was held because its shard starts too often."
        )
        self.store_errors = self._counter("store_errors", "Failures of the window store.")
        self._discord_requests = self._counter(
            "discord_requests", "Requests for Discord's limits, by outcome.", "outcome"
        )
        for outcome in get_args(Outcome):
            self._discord_requests.labels(outcome)
        self._redis_round_trip = self._histogram(
            "redis_round_trip_seconds",
            "From a command to the answer of Redis.",
            ROUND_TRIP_BUCKETS,
        )
        self._wait = self._histogram(
            "wait_seconds", "From the first request to the answer.", WAIT_BUCKETS
        )
        self._identify = self._histogram(
            "identify_seconds",
            "From the answer of a confirmed ticket to its confirmation.",
            IDENTIFY_BUCKETS,
        )
        self._unconfirmed = self._counter(
            "unconfirmed", "Confirmed tickets without a confirmation within CONFIRM_SECONDS."
        )
        self._lateness = self._histogram(
            "lateness_seconds",
            "From the moment in which the window was open and somebody waited to the answer.",
            LATENESS_BUCKETS,
        )

    def observe(self, event: Event) -> None:
        """Count what the queue reports."""
        match event:
            case Released():
                self._lateness.observe(event.lateness)
                self._wait.observe(event.waited)
                self._released.labels(event.rate_limit_key).inc()
            case ReleasedAtOnce():
                self._released.labels(0).inc()
            case Abandoned():
                self._abandoned.inc()
            case Held():
                self._loop_held.inc()
            case Unkeyed():
                self._unkeyed.inc()
            case Identified():
                self._identify.observe(event.seconds)
            case NotConfirmed():
                self._unconfirmed.inc()
            case KeysChanged():
                self._create_series(event.max_concurrency)

    def count_discord_request(self, outcome: Outcome) -> None:
        """Count a request to Discord."""
        self._discord_requests.labels(outcome).inc()

    def observe_redis_round_trip(self, seconds: float) -> None:
        """Count a command that Redis has answered."""
        self._redis_round_trip.observe(seconds)

    def _create_series(self, max_concurrency: int) -> None:
        """Show 0 before the first release of a key: Prometheus counts from the first value on."""
        for key in range(min(max_concurrency or 1, KEYS_MAX)):
            self._released.labels(key)

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """Write all metrics in the best format that an Accept header allows.

        Returns:
          The text and its content type.
        """
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def watch(self, look: Callable[[], Iterable[GaugeMetricFamily]]) -> None:
        """Add gauges that are looked up when somebody asks for them."""
        self.registry.register(_Gauges(look))

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(f"gateway_queue_{name}", about, labels, registry=self.registry)

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"gateway_queue_{name}", about, buckets=buckets, registry=self.registry)


class _Gauges(Collector):
    def __init__(self, look: Callable[[], Iterable[Metric]]) -> None:
        self._look = look

    def collect(self) -> Iterable[Metric]:
        return self._look()
