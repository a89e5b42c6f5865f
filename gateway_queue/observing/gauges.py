"""The gauges of ``/metrics``, computed at each scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client.metrics_core import GaugeMetricFamily

from gateway_queue.about import __version__
from gateway_queue.observing.metrics import KEYS_MAX
from gateway_queue.queue import Queue


def build_info() -> GaugeMetricFamily:
    """Return the version of the server."""
    return _gauge("build_info", "Always 1, with the version of the server.", 1, version=__version__)


def merged(
    looks: Iterable[tuple[dict[str, str], Iterable[GaugeMetricFamily]]],
) -> Iterable[GaugeMetricFamily]:
    """Merge the gauges of several bots.

    Args:
      looks: for each bot, the labels that identify it, and its gauges.
    """
    families: dict[str, GaugeMetricFamily] = {}
    for labels, look in looks:
        for gauge in look:
            family = families.setdefault(
                gauge.name, GaugeMetricFamily(gauge.name, gauge.documentation)
            )
            family.samples += [
                sample._replace(labels={**labels, **sample.labels}) for sample in gauge.samples
            ]
    return families.values()


def gauges(queue: Queue, not_ready: Callable[[], str | None]) -> Iterator[GaugeMetricFamily]:
    """Compute the gauges of one bot from its lanes, without looking at each ticket.

    Args:
      queue: the queue to describe.
      not_ready: returns why no ticket can be released; None if tickets can be released.
    """
    yield _gauge("ready", "1 while tickets can be released, 0 otherwise.", not not_ready())
    yield _waiting(queue)
    lanes = queue.lanes.values()
    yield _gauge(
        "held",
        "Waiting clients that are held because their shards start too often.",
        sum(len(lane.held) for lane in lanes),
    )
    yield _gauge(
        "away",
        "Places that are kept for shards whose clients have left.",
        sum(len(lane.away) for lane in lanes),
    )
    yield _gauge(
        "window_seconds",
        "Discord's window: minimum time between two IDENTIFYs of one rate limit key.",
        queue.store.rules.window,
    )
    if queue.max_concurrency is not None:
        yield _gauge("max_concurrency", "Number of rate limit keys.", queue.max_concurrency)
    starts = queue.store.session_starts()
    if starts.total is not None and starts.remaining is not None:
        yield _gauge(
            "session_starts_remaining", "Session starts that are left today.", starts.remaining
        )
        yield _gauge("session_starts_limit", "Session starts of a day.", starts.total)


def _waiting(queue: Queue) -> GaugeMetricFamily:
    gauge = GaugeMetricFamily(
        "gateway_queue_waiting", "Clients that wait.", labels=["rate_limit_key"]
    )
    # Also keys without clients: if a series ended, its last value would seem to stay.
    keys = {*range(min(queue.max_concurrency or 1, KEYS_MAX)), *queue.lanes}
    for key in sorted(keys):
        gauge.add_metric([str(key)], len(queue.lanes.get(key, ())))
    return gauge


def _gauge(name: str, about: str, value: float, **labels: str) -> GaugeMetricFamily:
    gauge = GaugeMetricFamily(f"gateway_queue_{name}", about, labels=list(labels))
    gauge.add_metric(list(labels.values()), value)
    return gauge
