"""The queue: tickets stand in lanes, and a dispatcher a lane releases one a window.

Pure trio: nothing here knows of HTTP.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
import trio

from gateway_queue.queue.lane import Lane
from gateway_queue.store import WindowStore

__all__ = ["Queue"]

log = structlog.stdlib.get_logger(__name__)


class Queue:
    """Lets one client a window go, for each rate limit key.

    Args:
      store: the windows.
      max_concurrency: number of rate limit keys.
    """

    def __init__(self, store: WindowStore, *, max_concurrency: int = 1) -> None:
        self._store = store
        self._max_concurrency = max_concurrency
        self._lanes: dict[int, Lane] = {}
        self._dispatchers: trio.Nursery
        self._closed = trio.Event()

    def __len__(self) -> int:
        """How many wait."""
        return sum(map(len, self._lanes.values()))

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the dispatchers: a lane has one from its first ticket until its last."""
        async with trio.open_nursery() as self._dispatchers:
            task_status.started()
            await trio.sleep_forever()
        self._closed.set()

    async def close(self) -> None:
        """Release nobody any more; return when the answers under way are out."""
        self._dispatchers.cancel_scope.cancel()
        await self._closed.wait()

    @asynccontextmanager
    async def turn(self, shard: int | None) -> AsyncIterator[None]:
        """Wait in line; the body of the context answers the client.

        The window starts when the body ends. A body that is cancelled has not answered: its slot
        goes to the next in line, at once. One that fails may have, so its slot counts as used.

        Args:
          shard: whose turn to wait for; None is a client that did not say, and goes with shard 0.
        """
        lane = self._lane((shard or 0) % self._max_concurrency)
        ticket = lane.join(shard)
        try:
            slot = await ticket.slot()
        except trio.Cancelled:
            lane.leave(ticket)
            raise
        with slot:
            try:
                yield
            except Exception:
                slot.send_nowait(trio.current_time())
                raise
            slot.send_nowait(trio.current_time())
        log.info(
            "released",
            shard=shard,
            rate_limit_key=lane.rate_limit_key,
            waited=round(trio.current_time() - ticket.joined_at, 3),
            left=len(lane),
        )

    def _lane(self, key: int) -> Lane:
        if key not in self._lanes:
            self._lanes[key] = Lane(key)
            self._dispatchers.start_soon(self._dispatch, self._lanes[key])
        return self._lanes[key]

    async def _dispatch(self, lane: Lane) -> None:
        """Serve a lane until nobody stands in it any more."""
        key = lane.rate_limit_key
        while lane:
            if wait := await self._store.claim(key):
                await trio.sleep(wait)
                continue
            with trio.CancelScope(shield=True):  # an answer under way is finished
                answered_at = await lane.release()
            if answered_at is None:
                await self._store.give_back(key)
            else:
                await self._store.start_window(key, answered_at)
        del self._lanes[key]
