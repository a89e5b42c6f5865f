"""A store in Redis, which any number of replicas share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from typing import NamedTuple, NoReturn
from uuid import uuid4
from zlib import crc32

import structlog
import trio

from gateway_queue.faults import Fault, next_fault
from gateway_queue.store import (
    IN_FLIGHT_WINDOWS,
    Claim,
    DiscordBudget,
    DistantPlace,
    Identifying,
    Line,
    Refusal,
    Rules,
    SessionStarts,
    Source,
    Standing,
)
from gateway_queue.store.budget import DAY
from gateway_queue.store.loop_guard import HOUR
from gateway_queue.store.redis.clock import (
    DRIFT,
    MICROSECONDS,
    ServerClock,
    longest_here,
    longest_there,
)
from gateway_queue.store.redis.connection import CALL_SECONDS, Connection, Known, Unreachable
from gateway_queue.store.redis.line import SharedLine, distant_place, host_name
from gateway_queue.store.redis.link import FIRST_RETRY, LOOK_SECONDS, Link
from gateway_queue.store.redis.script import (
    CONCERNS,
    GRANTED,
    Lease,
    ScriptReply,
    answer_seconds,
    lease_seconds,
    leases_in,
    microseconds,
    script_settings,
    shard_of,
    usable_seconds,
    words,
)
from gateway_queue.store.redis.starts import KnownStarts

REST_SECONDS = 600.0
"""The longest time, in seconds, for which an idle store lets the link check its data."""

SLOW_SECONDS = 3 * LOOK_SECONDS
"""Seconds without a timely answer of the server, after which a replica cannot release tickets."""

RESTORE_SECONDS = 2 * LOOK_SECONDS + FIRST_RETRY
"""Seconds after which every connected replica has noticed that data was lost, and has restored the
session starts that it knows."""

LIST_SECONDS = 0.5
"""For how many seconds a list of all places is reused."""

RETIRE_SECONDS = 0.5
"""The longest time, in seconds, for the last commands when this server stops."""

log = structlog.stdlib.get_logger(__name__)


class _Window(NamedTuple):
    """A window that has started after a release."""

    claim: Claim
    at: float
    """When it started (:func:`trio.current_time`)."""
    seconds: float
    """How long it is."""


class RedisStore:
    """A :class:`~gateway_queue.store.WindowStore` for several replicas of a server.

    A claim is a lease: the answer has to be written soon after the claim was sent, and the lease
    ends a window later. So the next release is never early, even if the time of the answer is lost.

    A server that was restarted, has taken over from another one, or has lost data may have missed
    the last lease. The script notices this, and its data begins anew. So no claim is sent until a
    whole lease has passed with the same data, and with no step of the server's clock but small
    ones. After a new connection to a server with the same data and clock, no other lease has to
    pass. Each replica knows the session starts of all replicas, and restores those that the server
    has lost.

    Args:
      link: the connection to the server.
      prefix: the first part of every key there.
      rules: of the queue. If ``hold`` is set, each key stays closed for one lease from now.
      send_away: called while this replica's connection to the server is too slow to release
        tickets, and that of another replica is quick enough.
    """

    def __init__(
        self, link: Link, prefix: str, rules: Rules, send_away: Callable[[], None] = lambda: None
    ) -> None:
        self._link = link
        self._prefix = prefix
        self._send_away = send_away
        self._set_rules(rules)
        # The stores of many bots check their data at different times of a second.
        self._first_look = LOOK_SECONDS * (1 - crc32(prefix.encode()) / 2**32)
        self._replica = f"{host_name()}-{uuid4().hex[:12]}"
        self._numbers = count()
        self._max_concurrency = 1
        now = trio.current_time()
        self._fault: Fault | None = Fault("not connected to Redis yet", now, now)
        self._slowness: Fault | None = None
        # When the last answer came that was quick enough to release tickets.
        self._in_time_at = now
        self._is_quick = False
        self._connection: Connection | None = None
        self._is_caught_up = False
        self._clock = ServerClock(self._longest_lease, self._answer_seconds)
        # When the data began that this connection leads to (`since` in decisions.lua).
        self._since: int | None = None
        # When the data began that has all starts of other replicas that are known here.
        self._complete_since: int | None = None
        # When the data began that was seen last, and when that was, by the server's clock.
        self._seen = (0, 0)
        self._hold = self._lease if rules.hold else 0.0
        # Whether the server's clock has made a step since this replica has caught up.
        self._clock_was_set = False
        # From when on claims can be granted, and when the data began for which this is true.
        self._trusted_at = math.inf
        self._trusted_since: int | None = None
        # Claims that were not used here, though the server may have granted them.
        self._doubtful: list[Claim] = []
        # Windows that the server may not know, by the tokens of their claims.
        self._untold: dict[str, _Window] = {}
        # The confirmed claims whose shards are identifying, by token, also those of other replicas.
        self._identifying: dict[str, Lease] = {}
        self._starts = KnownStarts(self._replica, self._limit)
        self.starts_by_shard = self._starts.by_shard
        self._line = SharedLine()
        self._listing = trio.Lock()
        self._listed: Line | None = None
        self._listed_at = -math.inf
        self._knows_line = trio.Event()
        """Set while the server can be told of places."""
        self._looked_at = 0
        # Whether there was no other command since the last look.
        self._is_quiet = False
        self._awake = trio.Event()
        self._discord_budget: DiscordBudget | None = None
        self._known = ScriptReply(0, 0, 0, 0, 0, self._limit or -1, microseconds(DAY), 0)
        self._known_at = trio.current_time()
        # When the last command with an answer was sent, by this store or by the link for it.
        self._heard_at = self._known_at

    def _set_rules(self, rules: Rules) -> None:
        lease = lease_seconds(rules)
        self.rules = rules
        self._limit = rules.session_start_limit
        self._in_flight = IN_FLIGHT_WINDOWS * rules.window
        self._answer_seconds = answer_seconds(rules)
        self._usable_seconds = usable_seconds(rules)
        self._script_settings = script_settings(rules)
        self._lease = longest_here(longest_there(lease))
        self._longest_lease = self._lease + longest_here(longest_there(rules.confirm_seconds))
        self._claim_lease = microseconds(longest_there(lease))
        self._confirm_lease = microseconds(longest_there(lease + rules.confirm_seconds))

    @property
    def fault(self) -> Fault | None:
        return self._link.fault or self._fault or self._slowness

    async def run(self) -> NoReturn:
        """Stay connected until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._share_line)
            while True:
                await self._use(await self._link.connected())

    async def _use(self, connection: Connection) -> None:
        """Use a connection until it is lost."""
        try:
            self._since = None
            self._connection = connection
            await self._link.turn()
            is_identified = await self._catch_up()
            if self._since != self._trusted_since or not is_identified:
                self._trusted_at, self._trusted_since = self._when_to_trust(), self._since
            self._hold = self._lease
            self._clock_was_set = False
            self._is_caught_up = True
            self._fault = None
            self._link.confirm(connection)
            self._knows_line.set()
            look_in = self._first_look
            while True:
                with trio.move_on_after(look_in):
                    await connection.lost.wait()
                was_quiet = self._is_quiet
                await self._link.turn()
                await self._look()
                await self._settle_doubtful()
                await self._follow_clock()
                self._line.look_again(self._clock)
                look_in = LOOK_SECONDS
                if was_quiet and self._may_rest(connection):
                    await self._rest()
                    look_in = 0.0
        except Unreachable as error:
            now = trio.current_time()
            self._fault = Fault(str(error), now, now)
        finally:
            self._connection = None
            self._is_caught_up = False
            if self._knows_line.is_set():
                self._knows_line = trio.Event()

    @property
    def _opens_at(self) -> float:
        """From when on claims can be granted; infinite while that is not known."""
        return self._trusted_at if self._is_caught_up else math.inf

    def _may_rest(self, connection: Connection) -> bool:
        """Return whether the link can check the data instead, as there is nothing else to do."""
        return (
            self._is_quiet
            and self._is_quick
            and trio.current_time() >= self._opens_at
            and not self._doubtful
            and not self._untold
            and not self._identifying
            and not self._line.has_places  # other replicas have to see that this replica lives
            and not connection.lost.is_set()  # a lost connection wakes the stores only once
        )

    async def _rest(self) -> None:
        """Let the link check the data until it changes."""
        self._awake = trio.Event()
        resumes_in = self.session_starts().resumes_in  # then the starts are reset
        with self._link.resting(self), trio.move_on_after(min(REST_SECONDS, resumes_in)):
            await self._awake.wait()

    def known(self) -> Known:
        return Known(self._prefix, self._replica, *self._seen)

    def note_answer(self, now: int, asked_at: float, answered_at: float) -> None:
        self._compare_speed(answered_at - asked_at)
        if self._connection is not None and not self._clock.agrees(now, asked_at, answered_at):
            self._doubt_clock(self._connection)
        if not self._is_quick or self._clock.was_set:
            self.wake()
        self._heard_at = asked_at

    async def _follow_clock(self) -> None:
        """Tell the server again when the budget is reset, if a small step has set its clock."""
        if self._clock.was_set:
            self._clock.was_set = False
            if self._discord_budget is not None:
                await self._hand_over(self._discord_budget)

    def _doubt_clock(self, connection: Connection) -> NoReturn:
        self._seen, self._trusted_since, self._clock_was_set = (0, 0), None, True
        connection.close("its clock was set")

    def wake(self) -> None:
        self._awake.set()

    def _when_to_trust(self) -> float:
        """Return when no lease and no session start can be left that the server does not know."""
        if not self._hold:
            return trio.current_time()
        restored_at = self._clock.when(self._since or 0) + RESTORE_SECONDS
        return max(trio.current_time() + self._hold + self._link.overlap, restored_at)

    async def _catch_up(self) -> bool:
        """Tell a server what it may have missed.

        Returns:
          Whether the server has named its replication id. Without it, a server with the same data
          may be an older copy, which has missed more.

        Raises:
          Unreachable: the connection is lost again.
        """
        self._looked_at = 0
        known = tuple(self._identifying.values())
        is_identified = await self._look()
        await self._settle_doubtful()
        for window in tuple(self._untold.values()):
            await self._tell(window)
        if self._discord_budget is not None:
            await self._hand_over(self._discord_budget)
        is_new = self._since != self._complete_since
        await self._restore(also_of_others=is_new)
        # All places, even if only the connection is new: meanwhile, other replicas may have taken
        # this replica for dead.
        self._line.tell_all(self._clock, is_lost=is_new)
        self._complete_since = self._since
        for lease in known:
            is_unknown = is_new or self._clock_was_set or self._is_own(lease)
            if lease.token not in self._identifying or not is_unknown:
                continue  # its shard has identified meanwhile, or the server knows of the claim
            left = max(0.0, lease.until - trio.current_time())
            await self._ask("restore_claim", *words(lease), self._closes_for(left))
        return is_identified

    async def _share_line(self) -> NoReturn:
        """Tell the server of each change of a place here, whenever it can be reached."""
        while True:
            await self._line.has_changes()
            knows_line = self._knows_line
            await knows_line.wait()
            try:
                await self._tell_changes()
            except Unreachable:
                if self._knows_line is knows_line:
                    self._knows_line = trio.Event()  # until there is another connection

    async def _tell_changes(self) -> None:
        changes = self._line.changes(self._clock)
        try:
            _, answers = await self._ask("share", *(change.words for change in changes))
        except (Unreachable, trio.Cancelled):
            self._line.not_told(changes)
            raise
        self._line.told(changes, map(int, answers), self._clock)

    async def _restore(self, *, also_of_others: bool) -> None:
        for part in self._starts.to_restore(also_of_others=also_of_others):
            arguments: list[str | int] = []
            for token, at in part:
                arguments += token, self._clock.at_latest(at)
            await self._ask("restore", *arguments)

    async def _look(self) -> bool:
        """Learn the starts and confirmed claims of other replicas, and notice a loss of data.

        Returns:
          Whether the server has named its replication id.
        """
        looked_at = self._looked_at
        self._is_quiet = True
        answer, more = await self._ask("look", looked_at, int(self._is_quick))
        server, quick_ago, identifying, *starts = more
        if self._slowness is not None and int(quick_ago) < microseconds(SLOW_SECONDS):
            self._send_away()
        self._compare_identifying(identifying.decode())
        listed = {
            token.decode(): self._clock.when(int(at))
            for token, at in zip(starts[::2], starts[1::2], strict=True)
        }
        since = self._clock.when(looked_at) + self._clock.longest_step()
        self._starts.compare(listed, since if self._since == self._complete_since else None)
        if trio.current_time() >= self._opens_at:  # until then, replicas may restore older starts
            self._looked_at = answer.now - microseconds(2 * self._lease)
        for unused in self._starts.unused(listed):
            await self._ask("uncount", *unused)
        return bool(server)

    def _compare_identifying(self, listed: str) -> None:
        """Update the confirmed claims of other replicas from the server's list."""
        # By a clock that was set forward, claims seem to have ended and are not listed.
        is_complete = self._since == self._complete_since and not self._clock_was_set
        for lease in tuple(self._identifying.values()):
            if not self._is_own(lease) and (is_complete or lease.until <= trio.current_time()):
                del self._identifying[lease.token]
        for lease in leases_in(listed, self._clock):
            if not self._is_own(lease) and lease.until > trio.current_time():
                self._identifying[lease.token] = lease

    def _is_own(self, lease: Lease) -> bool:
        return lease.token.startswith(self._replica)

    @contextmanager
    def _doubting(self, claim: Claim) -> Iterator[None]:
        """Give a claim back later if its answer does not come, or the wait for it is cancelled."""
        try:
            yield
        except (Unreachable, trio.Cancelled):
            self._doubtful.append(claim)
            self._starts.add_unused(claim.token)
            raise

    async def _settle_doubtful(self) -> None:
        """Give back claims that may have been granted, as long as their commands may arrive."""
        for claim in tuple(self._doubtful):
            asked_at = trio.current_time()
            await self._give_back(claim)
            if asked_at > claim.answer_by + CALL_SECONDS:
                self._doubtful.remove(claim)

    async def _ask(self, command: str, *arguments: str | int) -> tuple[ScriptReply, list[bytes]]:
        """Run a command of the script in Redis.

        Returns:
          The fields that every answer has, and what follows them.

        Raises:
          Unreachable: there is no answer, or none that can be trusted.
        """
        connection = self._connection
        if connection is None:
            raise Unreachable("not connected")
        if command != "look":
            self._is_quiet = False
            self.wake()
        asked_at = trio.current_time()
        told = (self._replica, *self._seen, *self._script_settings, *arguments)
        reply = await connection.call(self._prefix, command, *told)
        answered_at = trio.current_time()
        self._link.observe_round_trip(answered_at - asked_at)
        self._compare_speed(answered_at - asked_at)
        answer = ScriptReply(*reply[: len(ScriptReply._fields)])
        is_same_clock = self._clock.agrees(answer.now, asked_at, answered_at)
        if self._since is None:
            self._since = answer.since
            # After a longer time, other replicas may use a server that has taken over, while this
            # may be the former server, which does not know it.
            self._clock_was_set |= not is_same_clock
            if not is_same_clock or answered_at > self._heard_at + RESTORE_SECONDS:
                self._trusted_since = None
            if self._trusted_since is None:
                self._clock = ServerClock(self._longest_lease, self._answer_seconds)
                self._clock.agrees(answer.now, asked_at, answered_at)
        elif not is_same_clock:
            self._doubt_clock(connection)
        if self._trusted_since != answer.since:
            # If the data that was trusted comes back, it may be an older copy.
            self._trusted_since = None
        if self._since != answer.since:
            connection.close("its data was lost")
        since, last = self._seen
        # Answers that arrive together can be read in another order.
        self._seen = answer.since, max(answer.now, last if answer.since == since else 0)
        self._known, self._known_at = answer, asked_at
        self._heard_at = asked_at
        return answer, reply[len(ScriptReply._fields) :]

    def _compare_speed(self, seconds: float) -> None:
        """Note whether an answer came in time to release tickets, and log a change."""
        now = trio.current_time()
        self._is_quick = seconds <= self._usable_seconds
        if self._is_quick:
            self._in_time_at = now
            if self._slowness is not None:
                log.info("Redis is fast enough again", after=round(now - self._slowness.since, 3))
                self._slowness = None
        elif now > self._in_time_at + SLOW_SECONDS:
            reason = (
                f"it answers after {seconds:.2f} s; "
                f"to release tickets, it has to answer within {self._usable_seconds:.2g} s"
            )
            if self._slowness is None:
                log.warning("Redis is too slow, no ticket is released", reason=reason)
                self._link.count_error()
            self._slowness = next_fault(self._slowness, reason, now, LOOK_SECONDS)

    async def claim(
        self, key: int, shard: int | None, came_at: float, *, confirm: bool = False
    ) -> Claim | Refusal:
        asked_at = trio.current_time()
        if asked_at < self._opens_at:
            return await self._announce(key, shard, came_at)
        answer_by = asked_at + self._answer_seconds
        claim = Claim(
            key=key,
            max_concurrency=self._max_concurrency,
            shard=shard,
            confirm=confirm,
            begin_by=(asked_at + answer_by) / 2,
            answer_by=answer_by,
            token=f"{self._replica}:{next(self._numbers)}:{'' if shard is None else shard}",
        )
        lease = self._confirm_lease if confirm else self._claim_lease
        times = lease, round(came_at * MICROSECONDS), self._clock.at(answer_by)
        caution = microseconds(self._clock.longest_step())
        set_back_by = microseconds(self._clock.set_back_by())
        try:
            with self._doubting(claim):
                answer, _ = await self._ask("claim", *words(claim), *times, caution, set_back_by)
                if answer.verdict == GRANTED:
                    open_for = answer.wait / MICROSECONDS
                    await trio.sleep(max(0.0, self._clock.longest_step() - open_for))
                    self._link.check_up_to_date()
                    if confirm:
                        until = asked_at + longest_here(lease / MICROSECONDS)
                        self._identifying[claim.token] = Lease(*words(claim), until)
                    return claim
        except Unreachable:
            return Refusal(FIRST_RETRY, "key")
        return _refusal(answer, asked_at)

    async def _announce(self, key: int, shard: int | None, came_at: float) -> Refusal:
        """Tell other replicas of a ticket that cannot be released yet but may be the oldest."""
        asked_at = trio.current_time()
        if self._opens_at < math.inf:
            ticket = key, "" if shard is None else shard
            times = round(came_at * MICROSECONDS), self._clock.at(self._opens_at)
            caution = microseconds(self._clock.longest_step())
            with suppress(Unreachable):
                answer, _ = await self._ask(
                    "announce", self._max_concurrency, *ticket, *times, caution
                )
                if answer.verdict != GRANTED:
                    return _refusal(answer, asked_at)
        left = self._opens_at - trio.current_time()
        return Refusal(FIRST_RETRY if left == math.inf else max(0.0, left), "key")

    async def start_window(self, claim: Claim, at: float, *, confirmed: bool = False) -> None:
        self._identifying.pop(claim.token, None)
        self._starts.add(claim.token, at)
        seconds = self.rules.window if confirmed else self.rules.unconfirmed_window
        window = self._untold[claim.token] = _Window(claim, at, seconds)
        with suppress(Unreachable):  # then the lease closes the key until the server can be told
            await self._tell(window)

    async def _tell(self, window: _Window) -> None:
        """Tell the server of a window that has started."""
        # Rounded down: no more than has passed by the server's clock.
        ago = math.floor((trio.current_time() - window.at) * (1 - DRIFT) * MICROSECONDS)
        seconds = self._closes_for(window.seconds)
        await self._ask("start_window", *words(window.claim), ago, seconds)
        self._untold.pop(window.claim.token, None)

    def _closes_for(self, seconds: float) -> int:
        """Return how many microseconds the server has to close a key for ``seconds`` of ours."""
        return microseconds(longest_there(seconds) + self._clock.set_back_by())

    async def give_back(self, claim: Claim) -> None:
        self._identifying.pop(claim.token, None)
        self._starts.add_unused(claim.token)
        with suppress(Unreachable), self._doubting(claim):
            await self._give_back(claim)

    async def _give_back(self, claim: Claim) -> None:
        await self._ask("give_back", *words(claim), microseconds(self._clock.longest_step()))

    async def withdraw(self, key: int) -> None:
        with suppress(Unreachable):  # then the server soon forgets the ticket
            await self._ask("withdraw", self._max_concurrency, key)

    def place_time(self) -> float:
        return self._line.next_time()

    def follow_moves(self, move: Callable[[Standing, float, float], None]) -> None:
        self._line.follow_moves(move)

    def share(self, place: Standing) -> None:
        self._line.add(place)

    def unshare(self, place: Standing) -> None:
        self._line.remove(place)

    async def line(self) -> Line | None:
        async with self._listing:
            if trio.current_time() >= self._listed_at + LIST_SECONDS:
                # To cancel a command closes the connection.
                with trio.CancelScope(shield=True):
                    self._listed = await self._list_line()
                self._listed_at = trio.current_time()
            return self._listed

    async def _list_line(self) -> Line | None:
        places: dict[str, DistantPlace] = {}
        opens: list[bytes] = []
        identifying = ""
        cursor = "0"
        try:
            while cursor != "0" or not opens:
                _, reply = await self._ask("list", cursor, self._max_concurrency)
                next_cursor, opens_now, identifying_now, *found = reply
                if cursor == "0":
                    opens, identifying = opens_now.split(), identifying_now.decode()
                cursor = next_cursor.decode()
                places.update(distant_place(one.decode(), self._clock) for one in found)
        except Unreachable:
            return None
        opens_at = {key: self._clock.when(int(at)) for key, at in enumerate(opens)}
        return Line(
            self._replica, list(places.values()), opens_at, self._identifying_elsewhere(identifying)
        )

    def _identifying_elsewhere(self, listed: str) -> dict[int, Identifying]:
        """Read the shards that are identifying after an answer of another replica, by key."""
        lasts = self._confirm_lease / MICROSECONDS
        return {
            lease.key: Identifying(shard_of(lease.token), lease.until - lasts)
            for lease in leases_in(listed, self._clock)
            if not self._is_own(lease)
            and lease.max_concurrency == self._max_concurrency
            and lease.until > trio.current_time()
        }

    async def retire(self) -> None:
        self._line.close()
        with trio.move_on_after(RETIRE_SECONDS), suppress(Unreachable):
            while self._line.is_behind and self._knows_line.is_set():
                await self._tell_changes()
            await self._ask("retire")

    def change_rules(self, rules: Rules) -> None:
        self._set_rules(rules)
        self._hold = self._lease
        self._clock.change(self._longest_lease, self._answer_seconds)
        self._starts.keep(self._limit)
        self._trusted_at = max(self._trusted_at, trio.current_time() + self._lease)
        self.wake()

    def regroup(self, max_concurrency: int) -> None:
        self._max_concurrency = max_concurrency  # the server keeps the windows of each number

    async def update_budget(self, budget: DiscordBudget) -> None:
        self._discord_budget = budget
        # The loop guard needs starts for an hour, even if Discord's figure includes them.
        counted = min(budget.asked_at - self._in_flight, trio.current_time() - HOUR)
        self._starts.forget_until(counted)
        with suppress(Unreachable):  # then _catch_up() tells the server
            await self._hand_over(budget)

    def session_starts(self) -> SessionStarts:
        known, now = self._known, trio.current_time()
        source: Source | None = "configured" if self._limit else None
        resets_in = max(0.0, self._known_at + known.resets_in / MICROSECONDS - now)
        return SessionStarts(
            used=known.used,
            total=None if known.total < 0 else known.total,
            enforced=self._limit != 0,
            resets_in=resets_in,
            resumes_in=resets_in + (self.rules.window if known.is_discords else 0.0),
            source="discord" if known.is_discords else source,
        )

    async def _hand_over(self, budget: DiscordBudget) -> None:
        await self._ask(
            "update_budget",
            budget.total,
            budget.remaining,
            self._clock.at(budget.resets_at),
            self._clock.at(budget.asked_at),
        )


def _refusal(answer: ScriptReply, asked_at: float) -> Refusal:
    wait = asked_at + answer.wait / MICROSECONDS - trio.current_time()
    return Refusal(max(0.0, wait), CONCERNS[answer.verdict])
