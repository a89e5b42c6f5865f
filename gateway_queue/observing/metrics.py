"""Metrics for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics import MetricWrapperBase
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
"""Seconds: from "at once" and the timeouts of common HTTP clients to the start of a whole fleet."""

IDENTIFY_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 30)
"""Seconds: from an idle bot on the same machine to the default of CONFIRM_SECONDS, and beyond."""

ROUND_TRIP_BUCKETS = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
"""Seconds: from Redis on the same machine to the longest that an answer may take."""

KEYS_MAX = 1024
"""Rate limit keys that have series of their own from the start. Discord grants the largest bots
some dozens."""

LATENESS_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1)
"""Seconds: from the precision of the kernel's timer to a large part of a window."""


M = TypeVar("M", bound=MetricWrapperBase)


class Metrics:
    """All metrics of the server, in one registry.

    Args:
      by_bot: whether the metrics of a bot have the label ``bot``.
    """

    def __init__(self, *, by_bot: bool = False) -> None:
        self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        self._bot = ("bot",) if by_bot else ()
        self._of_bots: list[MetricWrapperBase] = []
        self.released = self._counter("released", "Tickets that had their turn.", "rate_limit_key")
        self.abandoned = self._counter("abandoned", "Clients that disconnected before their turn.")
        self.unkeyed = self._counter(
            "unkeyed", "Tickets without a shard, although there are several rate limit keys."
        )
        self.loop_held = self._counter(
            "loop_held", "Times that a ticket was held because its shard starts too often."
        )
        self.discord_requests = self._counter(
            "discord_requests", "Requests for Discord's limits, by outcome.", "outcome"
        )
        self.wait = self._histogram(
            "wait_seconds", "From the first request to the answer.", WAIT_BUCKETS
        )
        self.identify = self._histogram(
            "identify_seconds",
            "From the answer of a confirmed ticket to its confirmation.",
            IDENTIFY_BUCKETS,
        )
        self.unconfirmed = self._counter(
            "unconfirmed", "Confirmed tickets without a confirmation within CONFIRM_SECONDS."
        )
        self.lateness = self._histogram(
            "lateness_seconds",
            "From the moment when a key is open and a client waits, to the answer.",
            LATENESS_BUCKETS,
        )
        self.store_errors = Counter(
            "gateway_queue_store_errors", "Failures of the window store.", registry=self.registry
        )
        self.redis_round_trip = Histogram(
            "gateway_queue_redis_round_trip_seconds",
            "From a command to the answer of Redis.",
            buckets=ROUND_TRIP_BUCKETS,
            registry=self.registry,
        )

    def of(self, bot: str) -> BotMetrics:
        """Return the metrics of one bot."""
        return BotMetrics(self, dict.fromkeys(self._bot, bot))

    def forget(self, bot: str) -> None:
        """Drop the series of a bot that was removed."""
        for metric in self._of_bots:
            metric.remove_by_labels({"bot": bot})

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """Write all metrics in the best format that an Accept header allows.

        Returns:
          The text and its content type.
        """
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def watch(self, look: Callable[[], Iterable[GaugeMetricFamily]]) -> None:
        """Add gauges that are computed for each scrape."""
        self.registry.register(_Gauges(look))

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        names = (*self._bot, *labels)
        counter = Counter(f"gateway_queue_{name}", about, names, registry=self.registry)
        self._of_bots.append(counter)
        return counter

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
        name = f"gateway_queue_{name}"
        histogram = Histogram(name, about, self._bot, buckets=buckets, registry=self.registry)
        self._of_bots.append(histogram)
        return histogram


class BotMetrics:
    """Counts the events of one bot's queue; :meth:`Metrics.of` makes it.

    Args:
      metrics: of the server.
      labels: identify the bot.
    """

    def __init__(self, metrics: Metrics, labels: dict[str, str]) -> None:
        self._metrics = metrics
        self.labels = labels
        for counter in (
            metrics.abandoned,
            metrics.unkeyed,
            metrics.loop_held,
            metrics.unconfirmed,
        ):
            self._series(counter)

    def observe(self, event: Event) -> None:
        """Count an event of the queue."""
        metrics = self._metrics
        match event:
            case Released():
                self._series(metrics.lateness).observe(event.lateness)
                self._series(metrics.wait).observe(event.waited)
                self._count_release(event.rate_limit_key)
            case ReleasedAtOnce():
                self._count_release(0)
            case Abandoned():
                self._series(metrics.abandoned).inc()
            case Held():
                self._series(metrics.loop_held).inc()
            case Unkeyed():
                self._series(metrics.unkeyed).inc()
            case Identified():
                self._series(metrics.identify).observe(event.seconds)
            case NotConfirmed():
                self._series(metrics.unconfirmed).inc()
            case KeysChanged():
                self._create_series(event.max_concurrency)

    def expect_discord_requests(self) -> None:
        """Show 0 before the first request to Discord."""
        for outcome in get_args(Outcome):
            self._series(self._metrics.discord_requests, outcome=outcome)

    def count_discord_request(self, outcome: Outcome) -> None:
        """Count a request to Discord."""
        self._series(self._metrics.discord_requests, outcome=outcome).inc()

    def _count_release(self, rate_limit_key: int) -> None:
        self._series(self._metrics.released, rate_limit_key=str(rate_limit_key)).inc()

    def _create_series(self, max_concurrency: int) -> None:
        """Show 0 before the first release of a key: Prometheus counts from the first value on."""
        for key in range(min(max_concurrency or 1, KEYS_MAX)):
            self._series(self._metrics.released, rate_limit_key=str(key))

    def _series(self, metric: M, **labels: str) -> M:
        labels = {**self.labels, **labels}
        return metric.labels(**labels) if labels else metric


class _Gauges(Collector):
    def __init__(self, look: Callable[[], Iterable[Metric]]) -> None:
        self._look = look

    def collect(self) -> Iterable[Metric]:
        return self._look()
