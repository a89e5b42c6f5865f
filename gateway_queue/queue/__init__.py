"""The queue: tickets stand in lanes, and a dispatcher a lane releases one a window.

Pure trio: nothing here knows of HTTP.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from typing import NoReturn

import structlog
import trio

from gateway_queue.metrics import Metrics
from gateway_queue.queue.budget_alarm import BudgetAlarm
from gateway_queue.queue.lane import Lane, Release, Slot, Ticket
from gateway_queue.queue.places import Places
from gateway_queue.store import Allowance, Claim, Refusal, WindowStore

__all__ = ["Queue"]

RECENT_MAX = 2_000
"""Releases to remember, for who wants to look: the last 3 minutes of 55 keys."""

log = structlog.stdlib.get_logger(__name__)


class Queue:
    """Lets one client a window go, for each rate limit key.

    Args:
      store: what is known of earlier releases.
      metrics: where to count what happens.
      max_concurrency: number of rate limit keys; 0 releases everybody at once, and while it is
        None nobody is released.
      place_seconds: how long a shard that goes away while it waits keeps its place.
    """

    def __init__(
        self,
        store: WindowStore,
        metrics: Metrics,
        *,
        max_concurrency: int | None,
        place_seconds: float,
    ) -> None:
        self.store = store
        self._metrics = metrics
        self.max_concurrency = max_concurrency
        self.places = Places(place_seconds)
        self.released = 0
        self.abandoned = 0
        """How many have left without their turn."""
        self.recent = deque[Release](maxlen=RECENT_MAX)
        """The last releases, but for those that nothing held up (``max_concurrency`` 0)."""
        self.lanes: dict[int, Lane] = {}
        self.held: set[Ticket] = set()
        """Those that stand aside, for their shards start too often."""
        self._numbers = count()
        self._budget_alarm = BudgetAlarm()
        self._changes, self._next_change = trio.open_memory_channel[int](0)
        self._dispatchers: trio.Nursery | None = None
        self._open = trio.CancelScope()
        self._closed = trio.Event()

    def __len__(self) -> int:
        """How many wait."""
        return sum(map(len, self.lanes.values())) + len(self.held)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the dispatchers: a lane has one from its first ticket until its last."""
        task_status.started()
        with self._open:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.places.forget_expired)
                await self._dispatch_with_changes()
        self._closed.set()

    async def close(self) -> None:
        """Release nobody any more; return when the answers under way are out."""
        self._open.cancel()
        await self._closed.wait()

    async def set_max_concurrency(self, number: int) -> None:
        """Change the number of rate limit keys: those who wait move to their new lanes."""
        if number != self.max_concurrency:
            await self._changes.send(number)

    async def allow(self, allowance: Allowance) -> None:
        """Take over what Discord says of the day's session starts."""
        await self.store.allow(allowance)
        self._ask_again()
        self._budget_alarm.check(self.store.session_starts())

    def key(self, shard: int | None) -> int:
        """Return the rate limit key of a shard.

        https://discord.com/developers/docs/events/gateway#sharding-max-concurrency
        """
        return (shard or 0) % (self.max_concurrency or 1)

    @asynccontextmanager
    async def turn(self, shard: int | None) -> AsyncIterator[float]:
        """Wait in line; the body of the context answers the client.

        The context is until when it may (:func:`trio.current_time`).

        The window starts when the body ends. A body that is cancelled has not answered: its slot
        goes to the next in line, at once. One that fails may have, so its slot counts as used.

        Args:
          shard: whose turn to wait for; None is a client that did not say, and goes with shard 0.
        """
        if self.max_concurrency == 0:
            yield math.inf
            self.released += 1
            self._metrics.released.labels(0).inc()
            return
        ticket = Ticket(next(self._numbers), shard)
        self._warn_if_unkeyed(ticket)
        self.places.take(ticket)
        try:
            slot = await self._slot(ticket)
            with slot.outcome:
                try:
                    yield slot.claim.answer_by
                except Exception:
                    slot.outcome.send_nowait(trio.current_time())
                    raise
                slot.outcome.send_nowait(trio.current_time())
        except trio.Cancelled:
            self.abandoned += 1
            self._metrics.abandoned.inc()
            self._leave_place(ticket)
            raise
        finally:
            self.places.give_up(ticket)
        self.released += 1
        key = self.key(shard)
        log.info(
            "released",
            shard=shard,
            rate_limit_key=key,
            waited=round(trio.current_time() - ticket.joined_at, 3),
            left=len(self.lanes[key]),
        )

    def _leave_place(self, ticket: Ticket) -> None:
        """Keep the place of a ticket whose client has gone away, for the shard's next one."""
        successor = self.places.last_taken(ticket)
        lane = self.lanes.get(self.key(ticket.shard))
        moves_up = lane is not None and lane.leave(successor)
        self.places.leave(ticket)
        if lane is not None and moves_up:
            lane.join(successor)

    async def _slot(self, ticket: Ticket) -> Slot:
        """Stand in line until the slot comes."""
        while True:
            self._join(ticket)
            try:
                slot = await ticket.offer()
                if slot is None:
                    await trio.sleep_until(ticket.held_until)
                elif trio.current_time() <= slot.claim.begin_by:
                    return slot
                else:
                    log.warning("the store is too slow to release anybody")
                    slot.outcome.close()
            except trio.Cancelled:
                if lane := self.lanes.get(self.key(ticket.shard)):
                    lane.leave(ticket)
                    if not lane:
                        lane.news.unpark_all()
                ticket.tear_up()
                raise
            finally:
                self.held.discard(ticket)

    def _join(self, ticket: Ticket) -> None:
        """Stand in the lane of a ticket's key, and open it if nobody else stands there."""
        key = self.key(ticket.shard)
        if key not in self.lanes:
            self.lanes[key] = Lane(key)
            if self._dispatchers is not None:
                self._dispatchers.start_soon(self._dispatch, self.lanes[key])
        lane = self.lanes[key]
        lane.join(ticket)
        if lane.first() is ticket:
            lane.news.unpark_all()  # this one may have to be held where the former first had not

    def _warn_if_unkeyed(self, ticket: Ticket) -> None:
        if ticket.shard is None and (self.max_concurrency or 0) > 1:
            log.warning("no shard named, taken for shard 0", max_concurrency=self.max_concurrency)
            self._metrics.unkeyed.inc()

    def _move(self, number: int) -> None:
        """Let all who stand in line stand in the lanes of another number of keys."""
        was_known = self.max_concurrency is not None
        in_line = [ticket for lane in self.lanes.values() for ticket in lane]
        self.max_concurrency = number
        self.lanes = {}
        for ticket in in_line:
            self._join(ticket)
            if not was_known:
                self._warn_if_unkeyed(ticket)

    async def _dispatch_with_changes(self) -> NoReturn:
        """Run dispatchers by one number of keys after the other, from the first that is known."""
        number = self.max_concurrency
        while True:
            if number is None:
                number = await self._next_change.receive()
            # Nobody is being answered now, so no window can start in the meantime.
            await self.store.regroup(number)
            self._move(number)
            number = await self._dispatch_until_change()

    async def _dispatch_until_change(self) -> int:
        """Run the dispatchers until the number of keys changes, and return the new one."""
        try:
            async with trio.open_nursery() as self._dispatchers:
                for lane in self.lanes.values():
                    self._dispatchers.start_soon(self._dispatch, lane)
                number = await self._next_change.receive()
                self._dispatchers.cancel_scope.cancel()
        finally:
            self._dispatchers = None
        return number

    async def _dispatch(self, lane: Lane) -> None:
        """Serve a lane until nobody stands in it any more."""
        while lane:
            await trio.lowlevel.checkpoint_if_cancelled()
            with trio.CancelScope(shield=True):  # a claim is used or given back, whatever comes
                ticket = lane.first()
                outcome = await self.store.claim(
                    lane.rate_limit_key, ticket.shard, ticket.joined_at
                )
                if isinstance(outcome, Claim):
                    await self._release(lane, ticket, outcome)
            if isinstance(outcome, Refusal):
                await self._stand_back(lane, ticket, outcome)
        del self.lanes[lane.rate_limit_key]
        await self.store.withdraw(lane.rate_limit_key)

    async def _release(self, lane: Lane, ticket: Ticket, claim: Claim) -> None:
        """Use a claimed key for a ticket, or give it back if its client has left."""
        answered_at = await lane.release(ticket, claim)
        if answered_at is None:
            await self.store.give_back(claim)
            self._ask_again()
        else:
            await self.store.start_window(claim, answered_at)
            self._measure(lane, ticket, answered_at)
            self._budget_alarm.check(self.store.session_starts())

    async def _stand_back(self, lane: Lane, ticket: Ticket, refusal: Refusal) -> None:
        """Wait until it makes sense to claim again, if it does not for another ticket."""
        if refusal.concerns == "shard":
            self._hold(lane, ticket, refusal.seconds)
            return
        lane.opens_at = trio.current_time() + refusal.seconds
        with trio.move_on_at(lane.opens_at):
            await lane.news.park()

    def _measure(self, lane: Lane, ticket: Ticket, answered_at: float) -> None:
        due = max(lane.opens_at, ticket.here_since, ticket.held_until)
        release = Release(
            shard=ticket.shard,
            rate_limit_key=lane.rate_limit_key,
            at=answered_at,
            waited=answered_at - ticket.joined_at,
            lateness=answered_at - due,
        )
        self.recent.append(release)
        self._metrics.lateness.observe(release.lateness)
        self._metrics.wait.observe(release.waited)
        self._metrics.released.labels(release.rate_limit_key).inc()

    def _ask_again(self) -> None:
        """Let all dispatchers claim anew: a session start may be left that was not before."""
        for lane in self.lanes.values():
            lane.news.unpark_all()

    def _hold(self, lane: Lane, ticket: Ticket, seconds: float) -> None:
        """Let a ticket stand aside; its number brings it back to its place."""
        if not lane.leave(ticket):
            return
        log.warning("held: the shard starts too often", shard=ticket.shard, wait=round(seconds, 3))
        self._metrics.loop_held.inc()
        self.held.add(ticket)
        ticket.held_until = trio.current_time() + seconds
        ticket.give(None)
