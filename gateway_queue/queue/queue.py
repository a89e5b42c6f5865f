"""The queue: the places of tickets, and the dispatchers that release them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import cast

import trio

from gateway_queue.queue.events import (
    Abandoned,
    Event,
    Held,
    Identified,
    KeysChanged,
    NotConfirmed,
    Observer,
    Released,
    StartsChanged,
    Unkeyed,
)
from gateway_queue.queue.gate import Gate
from gateway_queue.queue.lane import Lane, Place
from gateway_queue.queue.places import Places
from gateway_queue.queue.ticket import Slot, Ticket, Turn, UnpacedTicket
from gateway_queue.store import (
    Claim,
    DiscordBudget,
    Identifying,
    Refusal,
    Rules,
    Standing,
    WindowStore,
)


@dataclass(frozen=True, slots=True)
class Answered:
    """A ticket whose client has its answer."""

    ticket: Ticket
    at: float
    """When the answer was written (:func:`trio.current_time`)."""
    outcome: trio.MemoryReceiveChannel[float]
    """Yields the time of the confirmation, if there is one."""


class Queue:
    """Releases one ticket per window, for each rate limit key.

    Args:
      store: remembers earlier releases, and grants the claims of keys.
      max_concurrency: number of rate limit keys; 0 releases every ticket at once, and while it is
        None no ticket is released.
      observers: called with each event.
    """

    def __init__(
        self,
        store: WindowStore,
        *,
        max_concurrency: int | None,
        observers: Iterable[Observer] = (),
    ) -> None:
        self.store = store
        self._observers = tuple(observers)
        self.max_concurrency = max_concurrency
        if max_concurrency is not None:
            store.regroup(max_concurrency)
            self.report(KeysChanged(max_concurrency))
        self.released = 0
        self.abandoned = 0
        """Clients that disconnected before their turn."""
        self.lanes: dict[int, Lane] = {}
        self._places = Places(store)
        store.follow_moves(self._move)
        self._gate = None if store.rules.releases_per_window is None else Gate()
        self._dispatchers: trio.Nursery | None = None
        self._open = trio.CancelScope()
        self._closed = trio.Event()

    def __len__(self) -> int:
        """Count the clients that wait."""
        return sum(map(len, self.lanes.values()))

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the dispatchers until closed: each lane has one while it has places."""
        with self._open:
            async with trio.open_nursery() as nursery:
                if self._gate is not None:
                    nursery.start_soon(self._gate.run)
                for lane in self.lanes.values():
                    nursery.start_soon(self._dispatch, lane)
                self._dispatchers = nursery
                task_status.started()
                try:
                    await trio.sleep_forever()
                finally:
                    # Here and not later: a nursery that has closed cannot start a dispatcher.
                    self._dispatchers = None
        self._closed.set()

    async def close(self) -> None:
        """Release no more tickets, and return when the answers being written are complete.

        After that, other replicas may take over the places.
        """
        self._open.cancel()
        await self._closed.wait()
        await self.store.retire()

    def dismiss(self) -> None:
        """End the requests of all waiting clients without an answer, and keep no places."""
        for place in self._all_places():
            ticket = place.ticket
            self._places.end(place, "gone")
            if ticket is not None:
                ticket.dismiss()

    def send_away(self) -> None:
        """End the requests of all waiting clients without an answer; named shards keep places."""
        for place in self._all_places():
            if place.ticket is not None:
                place.ticket.dismiss()

    def change_rules(self, rules: Rules) -> None:
        """Change the rules. Tickets keep waiting, for at least one window of the new rules."""
        self.store.change_rules(rules)
        if rules.releases_per_window is not None and self._gate is None:
            self._gate = Gate()
            if self._dispatchers is not None:
                self._dispatchers.start_soon(self._gate.run)
        self._retry_claims()

    def set_max_concurrency(self, number: int | None) -> None:
        """Change the number of rate limit keys: all places move to their new lanes.

        Args:
          number: as for the constructor. When it becomes 0, the requests of waiting clients end
            without an answer: the clients ask again, and are released at once.
        """
        if number == self.max_concurrency:
            return
        if not number:
            self.max_concurrency = number  # the store keeps the windows of the former number
            if number == 0:
                self.dismiss()
            return
        was_known = bool(self.max_concurrency)
        places = self._all_places()
        for place in places:
            place.unlist()
        self.store.regroup(number)
        self.max_concurrency = number
        self.report(KeysChanged(number))
        for place in places:
            self._list(place)
            if not was_known and place.ticket is not None:
                self._report_if_unkeyed(place.ticket)

    async def update_budget(self, budget: DiscordBudget) -> None:
        """Give Discord's figures for the day's session starts to the store."""
        await self.store.update_budget(budget)
        self._retry_claims()
        self.report(StartsChanged(self.store.session_starts()))

    def key(self, shard: int | None) -> int:
        """Return the rate limit key of a shard.

        https://discord.com/developers/docs/events/gateway#sharding-max-concurrency
        """
        return (shard or 0) % (self.max_concurrency or 1)

    @property
    def is_open(self) -> bool:
        """Whether tickets are released; false once :meth:`close` was called."""
        return not self._open.cancel_called

    def report(self, event: Event) -> None:
        """Pass an event to all observers."""
        for observe in self._observers:
            observe(event)

    # --- tickets: turn(), join(), release() and leave() run in the task of the request, see Ticket

    def turn(
        self, shard: int | None, *, confirm: bool = False
    ) -> AbstractAsyncContextManager[Turn]:
        """Make the context that waits for a shard's turn, and whose body answers the client.

        The window starts when the body ends. A body that is cancelled, or that raises
        :class:`NotAnswered`, has not answered: its slot goes to the next ticket, at once. A body
        that fails otherwise may have answered, so its slot counts as used.

        The body of a confirmed ticket goes on after the answer until the client closes its
        response, which cancels the body, or until ``confirm_seconds`` are over.

        Args:
          shard: the shard that will identify; None if the client named none, which counts as 0.
          confirm: whether the client closes its response when it has identified.
        """
        if self.max_concurrency == 0:
            return UnpacedTicket(self)
        return Ticket(self, shard, confirm=confirm)

    def join(self, ticket: Ticket) -> None:
        """Give a ticket its place."""
        self._report_if_unkeyed(ticket)
        self._list(self._places.take(ticket))

    def release(self, ticket: Ticket) -> None:
        """End the place of a ticket that was answered."""
        self._places.end(ticket.place, "released")
        self.released += 1

    def leave(self, ticket: Ticket) -> None:
        """Remove a ticket without an answer. The place of a named shard is kept for a while."""
        self.abandoned += 1
        self.report(Abandoned(ticket.shard))
        self._list(self._places.leave(ticket))

    def _all_places(self) -> list[Place]:
        """Return the places of all lanes, in the order of each lane."""
        return [place for lane in self.lanes.values() for place in lane]

    def _move(self, standing: Standing, since: float, joined_at: float) -> None:
        """Move a place to another time in the queue."""
        place = cast("Place", standing)
        is_listed = place.lane is not None
        place.unlist()
        for given_up in self._places.move(place, since, joined_at):
            self._places.end(given_up, "gone")
        if is_listed:
            self._list(place)

    def _list(self, place: Place) -> None:
        """List a place in the lane of its key, or end it if it is empty and its time is over."""
        if place.state == "chosen":
            return  # its dispatcher lists it again when the outcome is known
        place.unlist()
        if place.ticket is None and place.expires_at <= trio.current_time():
            self._places.end(place, "gone")
            return
        key = self.key(place.shard)
        if key not in self.lanes:
            self.lanes[key] = Lane(key)
            if self._dispatchers is not None:
                self._dispatchers.start_soon(self._dispatch, self.lanes[key])
        self.lanes[key].add(place)

    def _report_if_unkeyed(self, ticket: Ticket) -> None:
        if ticket.shard is None and self.max_concurrency and self.max_concurrency > 1:
            self.report(Unkeyed(self.max_concurrency))

    # --- lanes: _dispatch() and what it calls run in the task of the lane's dispatcher ------------

    async def _dispatch(self, lane: Lane) -> None:
        """Release the tickets of a lane, until it has no places any more."""
        has_claimed = False
        while lane:
            await trio.lowlevel.checkpoint()
            for place in lane.overdue():
                self._list(place)
            if self._next_claim(lane) <= trio.current_time():
                has_claimed = True
                await self._claim(lane)
            elif has_claimed and not lane.waiting:
                has_claimed = False
                await self._withdraw(lane)
            else:
                await lane.wait(self._next_claim(lane))
        if self.lanes.get(lane.rate_limit_key) is lane:
            del self.lanes[lane.rate_limit_key]
        if has_claimed:
            await self._withdraw(lane)

    async def _withdraw(self, lane: Lane) -> None:
        """Tell other replicas that no ticket here waits for the key of a lane.

        Shielded, because cancelling it could break the claim of another lane.
        """
        with trio.CancelScope(shield=True):
            await self.store.withdraw(lane.rate_limit_key)

    def _next_claim(self, lane: Lane) -> float:
        """Return when to claim a lane's key; infinite while no ticket can be released."""
        if self.max_concurrency is None or not lane.waiting:
            return math.inf
        return lane.claim_at

    async def _claim(self, lane: Lane) -> None:
        """Claim the key for the first ticket, and release that ticket or wait as the store asks."""
        gate = self._gate
        if gate is not None:
            await gate.enter(lane)
        with trio.CancelScope(shield=True):  # so that the claim is used or given back
            claimed = await self._claim_for_first(lane, gate)
            if claimed is None:
                return
            place, claim = claimed
            answer = await self._offer(place, claim)
            if answer is None:
                await self.store.give_back(claim)
                self._retry_claims()
        if answer is not None:
            self._report_release(lane, place, answer)
            await self._start_window(lane, claim, answer)
        lane.retry_claim()

    async def _claim_for_first(self, lane: Lane, gate: Gate | None) -> tuple[Place, Claim] | None:
        """Claim the key for the first place of a lane, and return both if the store grants it."""
        lane.claim_at = math.inf  # a change before the store answers sets it to -inf again
        try:
            place = lane.first()
            if place is None or place.ticket is None:
                return None
            asked_at = trio.current_time()
            outcome = await self.store.claim(
                lane.rate_limit_key, place.shard, place.since, confirm=place.ticket.confirm
            )
            if isinstance(outcome, Refusal):
                self._wait(lane, place, outcome)
                return None
            # The key may have opened early, for example because another replica has asked Discord.
            lane.opens_at = min(lane.opens_at, asked_at)
            return place, outcome
        finally:
            if gate is not None:
                gate.admit_next()

    def _wait(self, lane: Lane, place: Place, refusal: Refusal) -> None:
        """Note when to claim again."""
        now = trio.current_time()
        if refusal.concerns == "shard":
            lane.retry_claim()
            self._hold(place, refusal.seconds)
            return
        lane.opens_at = now + refusal.seconds
        if refusal.concerns == "queue" and self._gate is not None:
            self._gate.close(place.order, refusal.seconds)
            lane.retry_claim()
        elif lane.claim_at == math.inf:
            lane.claim_at = lane.opens_at

    def _hold(self, place: Place, seconds: float) -> None:
        """Hold a shard that starts too often; its place keeps its position."""
        if place.state != "waiting":
            return
        self.report(Held(place.shard, seconds))
        place.unlist()
        place.held_until = trio.current_time() + seconds
        self._list(place)
        self.store.share(place)

    async def _offer(self, place: Place, claim: Claim) -> Answered | None:
        """Offer the slot to a place's client.

        Returns:
          The answer, or None if there was none.
        """
        ticket = place.ticket
        if place.state != "waiting" or ticket is None or ticket.is_dismissed:
            return None
        if ticket.confirm != claim.confirm:
            return None
        place.unlist()
        place.state = "chosen"
        send, outcome = trio.open_memory_channel[float](2)
        ticket.offer(Slot(claim, send))
        try:
            return Answered(ticket, await outcome.receive(), outcome)
        except trio.EndOfChannel:
            return None
        finally:
            if place.state == "chosen":
                place.state = "waiting"
                self._list(place)

    async def _start_window(self, lane: Lane, claim: Claim, answer: Answered) -> None:
        """Start the window of a release: after the answer, or when the shard has identified."""
        at, confirmed = answer.at, False
        confirm_seconds = self.store.rules.confirm_seconds  # the rules may change meanwhile
        if claim.confirm:
            lane.identifying = Identifying(claim.shard, answer.at)
            try:
                at, confirmed = await answer.outcome.receive(), True
            except trio.EndOfChannel:
                at = answer.at + confirm_seconds
            finally:
                lane.identifying = None
            if confirmed:
                self.report(Identified(claim.shard, at, at - answer.at))
            else:
                self.report(NotConfirmed(claim.shard, at, confirm_seconds))
        # If the queue closes before this, the lease of the claim keeps the key closed.
        with trio.CancelScope(shield=True):
            await self.store.start_window(claim, at, confirmed=confirmed)
        self.report(StartsChanged(self.store.session_starts()))

    def _report_release(self, lane: Lane, place: Place, answer: Answered) -> None:
        due = max(lane.opens_at, answer.ticket.connected_at, place.held_until)
        due = min(due, answer.at)  # the store may open a key earlier than it announced
        self.report(
            Released(
                shard=place.shard,
                rate_limit_key=lane.rate_limit_key,
                at=answer.at,
                waited=answer.at - place.joined_at,
                lateness=answer.at - due,
                still_waiting=len(lane),
            )
        )

    def _retry_claims(self) -> None:
        """Let all dispatchers claim again: the reason of an earlier refusal may be gone."""
        for lane in self.lanes.values():
            lane.opens_at = min(lane.opens_at, trio.current_time())
            lane.retry_claim()
        if self._gate is not None:
            self._gate.open()
