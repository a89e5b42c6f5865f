"""A store in Redis, which any number of replicas share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count, islice
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar
from uuid import uuid4

import structlog
import trio
from coredis.pool import ConnectionPool

from gateway_queue.store import (
    IN_FLIGHT_WINDOWS,
    USUAL_TOTAL,
    Allowance,
    Claim,
    Refusal,
    Rules,
    SessionStarts,
    Source,
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
from gateway_queue.store.redis.link import CALL_SECONDS, Link, Unreachable, connections

LONGEST_ANSWER = 1.0
"""Seconds for which a claim is good, at most. The others wait for so long, and a window, if a
replica dies with it."""

LOOK_SECONDS = 1.0
"""How often at least to look after the connection, and the day's session starts."""

FIRST_RETRY, LONGEST_RETRY = 0.1, 2.0
"""Seconds between two tries to connect, each time twice as many."""

RESTORE_SECONDS = 2 * LOOK_SECONDS + FIRST_RETRY
"""After so long, every replica that is connected has noticed that data was lost, and has restored
the session starts that it knows."""

KEPT_STARTS = 10_000
"""More than any bot may start between two answers of Discord."""

STARTS_AT_ONCE = 500
"""Session starts in one command: a long one would make the other replicas wait."""

T = TypeVar("T")

log = structlog.stdlib.get_logger(__name__)


class _Answer(NamedTuple):
    """What the script returns; times are in microseconds."""

    verdict: int
    wait: int
    """For a grant: how long the key, and the queue, has been open."""
    now: int
    since: int
    used: int
    total: int
    resets_in: int
    is_discords: int


_GRANTED = 0
_CONCERNS: dict[int, Literal["shard", "key", "queue"]] = {1: "key", 2: "shard", 3: "queue"}


class RedisStore:
    """A :class:`~gateway_queue.store.WindowStore` for several replicas of a server.

    A claim is a lease: the answer has to be out soon after it was sent for, and the lease ends a
    window later. So the next release is never early, even if nobody says when the answer was.

    A server that was restarted, or has taken over from another one, may have missed the last
    lease, and so may one that has lost data while the connection lived: the script notices, and its
    data begins anew. So the answers count only when a whole lease has passed on the same
    connection, with the same data and a clock that was not set. Each replica knows the session
    starts of all replicas, and restores those that the server has lost.

    Args:
      url: of the server.
      prefix: the first part of every key there.
      rules: to hold each key for a lease from now, among others.
      count_error: called when the server is lost, or cannot be reached.
    """

    def __init__(
        self, url: str, prefix: str, rules: Rules, *, count_error: Callable[[], None]
    ) -> None:
        window, limit = rules.window, rules.session_start_limit
        self.rules = rules
        self._url = url
        self._prefix = prefix
        self._answer_seconds = min(window, LONGEST_ANSWER)
        lease = rules.unconfirmed_window + self._answer_seconds
        self._in_flight = IN_FLIGHT_WINDOWS * window
        self._limit = limit
        self._count_error = count_error
        self._settings = (
            # These are long enough also if the clock of the server runs faster than ours.
            _microseconds(longest_there(window)),
            _microseconds(longest_there(lease)),
            _microseconds(longest_there(DAY)),
            _microseconds(longest_there(self._in_flight)),
            # How late a replica may ask, and still go first for its older ticket.
            _microseconds(window / 10),
            # How soon to ask again while another one answers, or should have asked.
            _microseconds(min(window / 20, 0.05)),
            -1 if limit is None else limit,
            USUAL_TOTAL,
            rules.loop_free_starts,
            rules.releases_per_window or 0,
        )
        self._replica = uuid4().hex
        self._numbers = count()
        self._max_concurrency = 1
        self.fault: str | None = "not connected to Redis yet"
        self._link: Link | None = None
        self._lease = longest_here(longest_there(lease))
        self._longest_lease = self._lease + longest_here(longest_there(rules.confirm_seconds))
        self._claim_lease = _microseconds(longest_there(lease))
        self._confirm_lease = _microseconds(longest_there(lease + rules.confirm_seconds))
        self._clock = ServerClock(self._longest_lease)
        self._since: int | None = None
        # Since when the data is kept that has all starts of other replicas that are known here.
        self._complete_since: int | None = None
        # Since when the data is kept that was seen last, and when that was, by the server's clock.
        self._seen = (0, 0)
        self._hold = self._lease if rules.hold else 0.0
        self._trusted_at = math.inf
        # Claims that nobody has used, though they may have been granted.
        self._doubtful: list[Claim] = []
        # The tokens of claims that will not be used, the last ones: see _uncount_restored.
        self._unused: dict[str, None] = {}
        # Those whose shards are identifying, and until when their leases last, here.
        self._identifying: dict[Claim, float] = {}
        # The times of the day's session starts by token, also those of other replicas.
        self._starts: dict[str, float] = {}
        self._kept_starts = max(KEPT_STARTS, limit or 0)
        self._looked_at = 0
        self._allowance: Allowance | None = None
        self._known = _Answer(0, 0, 0, 0, 0, limit or -1, _microseconds(DAY), 0)
        self._known_at = trio.current_time()

    async def run(self) -> NoReturn:
        """Stay connected until cancelled."""
        delay = FIRST_RETRY
        while True:
            try:
                pool = connections(self._url)
            except (OSError, ValueError) as error:  # a certificate, or an option in the URL
                reason = str(error)
            else:
                async with pool:
                    reason = await self._use(pool)
            if self.fault is None:
                delay = FIRST_RETRY
            if self.fault != reason:
                log.warning("Redis cannot be reached, nobody is released", reason=reason)
            self.fault = reason
            self._count_error()
            await trio.sleep(delay)
            delay = min(2 * delay, LONGEST_RETRY)

    async def _use(self, pool: ConnectionPool[Any]) -> str:
        """Use one connection until it is lost, and return why."""
        try:
            self._clock, self._since = ServerClock(self._longest_lease), None
            link = Link(pool, self._prefix)
            await link.open()
            self._link = link
            await self._warn_of_eviction(link)
            await self._catch_up()
            self._trusted_at = self._when_to_trust()
            self._hold = self._lease
            self.fault = None
            log.info("connected to Redis")
            while True:
                with trio.move_on_after(LOOK_SECONDS):
                    await link.lost.wait()
                await self._look()
                await self._settle_doubtful()
        except Unreachable as error:
            return str(error)
        finally:
            self._link = None
            self._trusted_at = math.inf

    def _when_to_trust(self) -> float:
        """Return when no lease and no start can be left that the server does not know."""
        if not self._hold:
            return trio.current_time()
        restored_at = self._clock.when(self._since or 0) + RESTORE_SECONDS
        return max(trio.current_time() + self._hold, restored_at)

    async def _warn_of_eviction(self, link: Link) -> None:
        policy = await link.eviction_policy()
        if policy is not None:
            log.warning(
                "Redis removes data when it is full: set its maxmemory-policy to noeviction",
                maxmemory_policy=policy,
            )

    async def _catch_up(self) -> None:
        """Tell a server what it may have missed.

        Raises:
          Unreachable: it is lost again.
        """
        self._looked_at = 0
        await self._look()
        await self._settle_doubtful()
        if self._allowance is not None:
            await self._hand_over(self._allowance)
        await self._restore(also_of_others=self._since != self._complete_since)
        self._complete_since = self._since
        for claim, until in tuple(self._identifying.items()):
            if claim not in self._identifying:
                continue  # its shard has identified meanwhile
            left = _microseconds(longest_there(max(0.0, until - trio.current_time())))
            await self._ask("restore_claim", *_words(claim), left)

    async def _restore(self, *, also_of_others: bool) -> None:
        starts = [
            (token, self._clock.at_latest(at))
            for token, at in self._starts.items()
            if also_of_others or self._is_own(token)
        ]
        for part in _parts(starts):
            await self._ask("restore", *(word for start in part for word in start))

    async def _look(self) -> None:
        """Ask for what there is to know, above all the starts of other replicas.

        A start is there from its claim on, so one that is not there any more was given back.
        """
        looked_at = self._looked_at
        answer, starts = await self._ask("look", looked_at)
        listed = {
            token.decode(): self._clock.when(int(at))
            for token, at in zip(starts[::2], starts[1::2], strict=True)
        }
        seen = {token: at for token, at in listed.items() if not self._is_own(token)}
        if self._since == self._complete_since:
            since = self._clock.when(looked_at) + self._clock.longest_step()
            for token, at in list(self._starts.items()):
                if at > since and token not in seen and not self._is_own(token):
                    del self._starts[token]
        for token, at in seen.items():
            self._remember_start(token, at)
        if trio.current_time() >= self._trusted_at:  # until then, replicas may restore older ones
            self._looked_at = answer.now - _microseconds(2 * self._lease)
        await self._uncount(token for token in listed if token in self._unused)

    def _is_own(self, token: str) -> bool:
        return token.startswith(self._replica)

    async def _uncount(self, unused: Iterable[str]) -> None:
        """Uncount claims that another replica has restored after this one gave them back."""
        for part in _parts(unused):
            await self._ask("uncount", *part)

    def _remember_unused(self, claim: Claim) -> None:
        self._unused[claim.token] = None
        if len(self._unused) > KEPT_STARTS:
            del self._unused[next(iter(self._unused))]

    @contextmanager
    def _doubting(self, claim: Claim) -> Iterator[None]:
        """Give a claim back later if there is no answer, or it is not waited for."""
        try:
            yield
        except (Unreachable, trio.Cancelled):
            self._doubtful.append(claim)
            self._remember_unused(claim)
            raise

    async def _settle_doubtful(self) -> None:
        """Give back claims that may have been granted, until no request for one can arrive."""
        for claim in tuple(self._doubtful):
            asked_at = trio.current_time()
            await self._ask("give_back", *_words(claim))
            if asked_at > claim.answer_by + CALL_SECONDS:
                self._doubtful.remove(claim)

    def _remember_start(self, token: str, at: float) -> None:
        self._starts[token] = at
        while len(self._starts) > self._kept_starts or self._oldest_start() + DAY <= at:
            del self._starts[next(iter(self._starts))]

    def _oldest_start(self) -> float:
        return next(iter(self._starts.values()))

    async def _ask(self, command: str, *arguments: str | int) -> tuple[_Answer, list[bytes]]:
        """Let the server decide.

        Returns:
          Its answer, and what follows it.

        Raises:
          Unreachable: there is no answer, or none that can be trusted.
        """
        link = self._link
        if link is None:
            raise Unreachable("not connected")
        asked_at = trio.current_time()
        words = (self._replica, *self._seen, *self._settings, *arguments)
        reply = await link.call(command, *words)
        answer = _Answer(*reply[: len(_Answer._fields)])
        if not self._clock.agrees(answer.now, asked_at, trio.current_time()):
            self._seen = (0, 0)
            link.give_up("its clock was set")
        if self._since is None:
            self._since = answer.since
        if self._since != answer.since:
            link.give_up("its data is gone")
        since, last = self._seen
        # Answers that came in one go may be read in another order.
        self._seen = answer.since, max(answer.now, last if answer.since == since else 0)
        self._known, self._known_at = answer, asked_at
        return answer, reply[len(_Answer._fields) :]

    async def claim(
        self, key: int, shard: int | None, came_at: float, *, confirm: bool = False
    ) -> Claim | Refusal:
        asked_at = trio.current_time()
        if self._trusted_at == math.inf:
            return Refusal(FIRST_RETRY, "key")
        if asked_at < self._trusted_at:
            return Refusal(self._trusted_at - asked_at, "key")
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
        times = lease, self._clock.at(came_at), self._clock.at(answer_by)
        caution = _microseconds(self._clock.longest_step())
        try:
            with self._doubting(claim):
                answer, _ = await self._ask("claim", *_words(claim), *times, caution)
                if answer.verdict == _GRANTED:
                    open_for = answer.wait / MICROSECONDS
                    await trio.sleep(max(0.0, self._clock.longest_step() - open_for))
                    if confirm:
                        until = asked_at + longest_here(lease / MICROSECONDS)
                        self._identifying[claim] = until
                    return claim
        except Unreachable:
            return Refusal(LOOK_SECONDS, "key")
        wait = asked_at + answer.wait / MICROSECONDS - trio.current_time()
        return Refusal(max(0.0, wait), _CONCERNS[answer.verdict])

    async def start_window(self, claim: Claim, at: float, *, confirmed: bool = False) -> None:
        self._identifying.pop(claim, None)
        self._remember_start(claim.token, at)
        # No more than has passed by the server's clock.
        ago = math.floor((trio.current_time() - at) * (1 - DRIFT) * MICROSECONDS)
        seconds = self.rules.window if confirmed else self.rules.unconfirmed_window
        window = _microseconds(longest_there(seconds))
        with suppress(Unreachable):  # then the lease ends in time, and the start is in _starts
            await self._ask("start_window", *_words(claim), ago, window)

    async def give_back(self, claim: Claim) -> None:
        self._identifying.pop(claim, None)
        self._remember_unused(claim)
        with suppress(Unreachable), self._doubting(claim):
            await self._ask("give_back", *_words(claim))

    async def withdraw(self, key: int) -> None:
        with suppress(Unreachable):  # then it is forgotten soon
            await self._ask("withdraw", self._max_concurrency, key)

    def regroup(self, max_concurrency: int) -> None:
        self._max_concurrency = max_concurrency  # the server knows all the windows that it has

    async def allow(self, allowance: Allowance) -> None:
        self._allowance = allowance
        # The loop guard needs them for an hour, also if they are in Discord's figure.
        counted = min(allowance.asked_at - self._in_flight, trio.current_time() - HOUR)
        self._starts = {token: at for token, at in self._starts.items() if at > counted}
        with suppress(Unreachable):  # then it catches up
            await self._hand_over(allowance)

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

    async def _hand_over(self, allowance: Allowance) -> None:
        await self._ask(
            "allow",
            allowance.total,
            allowance.remaining,
            self._clock.at(allowance.resets_at),
            self._clock.at(allowance.asked_at),
        )


def _parts(items: Iterable[T]) -> Iterator[list[T]]:
    rest = iter(items)
    while part := list(islice(rest, STARTS_AT_ONCE)):
        yield part


def _words(claim: Claim) -> tuple[str | int, ...]:
    """Name a claim as the script does."""
    return claim.max_concurrency, claim.key, claim.token


def _microseconds(seconds: float) -> int:
    """Round up: nothing may be early."""
    return math.ceil(seconds * MICROSECONDS)
