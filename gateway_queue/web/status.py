"""The document that ``/status`` answers with."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import trio

from gateway_queue.about import __version__
from gateway_queue.faults import Fault
from gateway_queue.queue import overview
from gateway_queue.queue.events import Released
from gateway_queue.service import Service
from gateway_queue.store import SessionStarts
from gateway_queue.web.summary import BotSummary

TICKETS_PER_STEP = 100
"""Tickets to write in one step of the event loop: a third of a millisecond."""


async def status_document(
    service: Service, shard: int | None = None, bots: Sequence[BotSummary] = ()
) -> bytes:
    """Describe the queue as JSON, in steps, so that a release does not wait for all of it.

    Args:
      service: the bot.
      shard: if given, only tickets of this shard are listed, and the shard is described.
      bots: summaries to add.
    """
    identify_seconds = service.recent.usual_identify_seconds()
    lanes = await overview.lanes(service.queue, identify_seconds=identify_seconds)
    document = _summary(service, lanes)
    if shard is not None:
        document["shard"] = _shard(service, shard)
        lanes = [
            _only(lane, shard) for lane in lanes if lane.rate_limit_key == service.queue.key(shard)
        ]
    if bots:
        document["bots"] = [_bot(bot) for bot in bots]
    head = json.dumps(document).removesuffix("}")
    written = ", ".join([await _lane(lane) for lane in lanes])
    return f'{head}, "lanes": [{written}]}}'.encode()


def _summary(service: Service, lanes: Sequence[overview.LaneStatus]) -> dict[str, Any]:
    queue, settings = service.queue, service.settings
    reason = service.not_ready()
    return {
        "version": __version__,
        **service.labels,
        "started_at": datetime.fromtimestamp(service.started_at, UTC).isoformat(timespec="seconds"),
        "ready": reason is None,
        "reason": reason,
        "faults": {
            "store": _fault(queue.store.fault),
            "discord": _fault(service.limits.fault if service.limits else None),
        },
        "window_seconds": settings.window_seconds,
        "max_concurrency": queue.max_concurrency,
        "store": settings.store_name,
        "waiting": sum(lane.waiting for lane in lanes),
        "held": sum(lane.held for lane in lanes),
        "away": sum(lane.away for lane in lanes),
        "released": queue.released,
        "abandoned": queue.abandoned,
        "starts_used": queue.store.session_starts().used,
        "session_starts": _session_starts(queue.store.session_starts()),
    }


def _bot(bot: BotSummary) -> dict[str, Any]:
    return _json_object(
        {
            "bot": bot.name,
            "ready": bot.not_ready is None,
            "reason": bot.not_ready,
            "waiting": bot.waiting,
            "next_release": bot.next_release,
            "session_starts": _session_starts(bot.starts),
        }
    )


def _fault(fault: Fault | None) -> dict[str, Any] | None:
    if fault is None:
        return None
    now = trio.current_time()
    return _json_object(
        {
            "reason": fault.reason,
            "for": now - fault.since,
            "retry_in": max(0.0, fault.retry_at - now),
        }
    )


def _session_starts(starts: SessionStarts) -> dict[str, Any] | None:
    if starts.total is None:
        return None
    return _json_object(
        {
            "total": starts.total,
            "remaining": starts.remaining,
            "enforced": starts.enforced,
            "resets_in": starts.resets_in,
            "source": starts.source,
        }
    )


def _shard(service: Service, shard: int) -> dict[str, Any]:
    last = service.recent.last_release(shard)
    return {
        "shard": shard,
        "rate_limit_key": service.queue.key(shard),
        "starts": service.queue.store.starts_by_shard.of(shard),
        "last_release": last and _release(last),
    }


def _release(release: Released) -> dict[str, Any]:
    ago = trio.current_time() - release.at
    return _json_object({"ago": ago, "waited": release.waited})


def _only(lane: overview.LaneStatus, shard: int) -> overview.LaneStatus:
    lane.tickets = [ticket for ticket in lane.tickets if (ticket.shard or 0) == shard]
    return lane


async def _lane(lane: overview.LaneStatus) -> str:
    identifying = lane.identifying and {
        "shard": lane.identifying.shard,
        "for": round(lane.identifying.seconds, 3),
    }
    fields = _json_object({**vars(lane), "identifying": identifying})
    del fields["tickets"], fields["held"], fields["away"]
    written: list[str] = []
    for start in range(0, len(lane.tickets), TICKETS_PER_STEP):
        await trio.lowlevel.checkpoint()
        part = lane.tickets[start : start + TICKETS_PER_STEP]
        written.append(json.dumps([_ticket(ticket) for ticket in part])[1:-1])
    head = json.dumps(fields).removesuffix("}")
    return f'{head}, "tickets": [{", ".join(written)}]}}'


def _ticket(ticket: overview.TicketStatus) -> dict[str, Any]:
    # Not dataclasses.asdict(), which takes four times as long.
    replica = {} if ticket.replica is None else {"replica": ticket.replica}
    return {
        "shard": ticket.shard,
        **replica,
        "state": ticket.state,
        "position": ticket.position,
        "waited": round(ticket.waited, 3),
        "eta": round(ticket.eta, 3) if math.isfinite(ticket.eta) else None,
    }


def _json_object(fields: dict[str, Any]) -> dict[str, Any]:
    """Round all times, and write null for the times that are not known."""
    return {
        name: (round(value, 3) if math.isfinite(value) else None)
        if isinstance(value, float)
        else value
        for name, value in fields.items()
    }
