"""What ``/metrics`` shows of the moment in which it is asked."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.metrics_core import GaugeMetricFamily

from gateway_queue.queue import Queue


def gauges(queue: Queue) -> Iterator[GaugeMetricFamily]:
    """Look at the lanes, not at each ticket."""
    gauge = GaugeMetricFamily(
        "gateway_queue_waiting", "Clients that wait.", labels=["rate_limit_key"]
    )
    for key, lane in sorted(queue.lanes.items()):
        gauge.add_metric([str(key)], len(lane))
    yield gauge

    starts = queue.store.session_starts()
    if starts.total is not None and starts.remaining is not None:
        yield GaugeMetricFamily(
            "gateway_queue_session_starts_remaining",
            "Session starts that are left of the day's.",
            value=starts.remaining,
        )
        yield GaugeMetricFamily(
            "gateway_queue_session_starts_total", "Session starts of a day.", value=starts.total
        )
