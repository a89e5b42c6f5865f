"""The document that ``/status`` answers with."""

from __future__ import annotations

import math
from typing import Any

from gateway_queue.about import __version__
from gateway_queue.queue import Queue, overview
from gateway_queue.service import Service
from gateway_queue.settings import Settings


def store_name(settings: Settings) -> str:
    """Say where the windows are kept."""
    return "memory" if settings.redis_url is None else "redis"


def status_document(service: Service) -> dict[str, Any]:
    """Describe the queue and all tickets in it."""
    queue, settings = service.queue, service.settings
    return {
        "version": __version__,
        "window_seconds": settings.window_seconds,
        "max_concurrency": queue.max_concurrency,
        "store": store_name(settings),
        "waiting": len(queue),
        "released": queue.released,
        "abandoned": queue.abandoned,
        "session_starts": _session_starts(queue),
        "lanes": [_lane(lane) for lane in overview.lanes(queue)],
    }


def _lane(lane: overview.LaneStatus) -> dict[str, Any]:
    # Not dataclasses.asdict(), which takes four times as long: releases wait for it.
    tickets = [_json_object(vars(ticket)) for ticket in lane.tickets]
    identifying = None
    if lane.identifying is not None:
        identifying = {
            "shard": lane.identifying.shard,
            "for": round(lane.identifying.seconds, 3),
        }
    return _json_object({**vars(lane), "identifying": identifying, "tickets": tickets})


def _session_starts(queue: Queue) -> dict[str, Any] | None:
    starts = queue.store.session_starts()
    if starts.total is None:
        return None
    return _json_object(
        {
            "total": starts.total,
            "remaining": starts.remaining,
            "resets_in": starts.resets_in,
            "source": starts.source,
        }
    )


def _json_object(fields: dict[str, Any]) -> dict[str, Any]:
    """Round what is in seconds, and write null for what is not known."""
    return {
        name: (round(value, 3) if math.isfinite(value) else None)
        if isinstance(value, float)
        else value
        for name, value in fields.items()
    }
