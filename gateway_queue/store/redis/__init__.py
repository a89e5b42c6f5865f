"""A store in Redis, which any number of replicas share."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from typing import Any, NamedTuple, NoReturn
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
from gateway_queue.store.redis.clock import MICROSECONDS, ServerClock
from gateway_queue.store.redis.link import Link, Unreachable, connections

LONGEST_ANSWER = 1.0
"""Seconds for which a claim is good, at most. The others wait for so long, and a window, if a
replica dies with it."""

LOOK_SECONDS = 1.0
"""How often at least to look after the connection, and the day's session starts."""

FIRST_RETRY, LONGEST_RETRY = 0.1, 2.0
"""Seconds between two tries to connect, each time twice as many."""

KEPT_STARTS = 10_000
"""More than any bot may start between two answers of Discord."""

log = structlog.stdlib.get_logger(__name__)


class _Answer(NamedTuple):
    """What the script returns; times are in microseconds."""

    verdict: int
    wait: int
    now: int
    since: int
    used: int
    total: int
    resets_in: int
    is_discords: int


_GRANTED, _KEY_CLOSED = 0, 1


class _Start(NamedTuple):
    token: str
    shard: int | None
    at: float


class RedisStore:
    """A :class:`~gateway_queue.store.WindowStore` for several replicas of a server.

    A claim is a lease: the answer has to be out soon after it was sent for, and the lease ends a
    window later. So the next release is never early, even if nobody says when the answer was.

    A server that was restarted, or has taken over from another one, may have missed the last
    lease. So what it says counts only when a whole lease has passed on the same connection, with
    the same data and a clock that was not set.

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
        self._url = url
        self._prefix = prefix
        self._answer_seconds = min(window, LONGEST_ANSWER)
        self._lease = window + self._answer_seconds
        self._in_flight = IN_FLIGHT_WINDOWS * window
        self._limit = limit
        self._count_error = count_error
        self._settings = (
            _microseconds(window),
            _microseconds(self._lease),
            # How late a replica may ask, and still go first for its older ticket.
            _microseconds(window / 10),
            # How soon to ask again while another one answers, or should have asked.
            _microseconds(min(window / 20, 0.05)),
            _microseconds(self._in_flight),
            -1 if limit is None else limit,
            USUAL_TOTAL,
            rules.loop_free_starts,
        )
        self._replica = uuid4().hex
        self._numbers = count()
        self._max_concurrency = 1
        self.fault: str | None = "not connected to Redis yet"
        self._link: Link | None = None
        self._clock = ServerClock()
        self._since: int | None = None
        self._hold = self._lease if rules.hold else 0.0
        self._trusted_at = math.inf
        # Claims that nobody has used, though they may have been granted.
        self._doubtful: list[tuple[str | int, ...]] = []
        self._starts = deque[_Start](maxlen=max(KEPT_STARTS, limit or 0))
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
            self._clock, self._since = ServerClock(), None
            link = Link(pool, self._prefix)
            await link.open()
            self._link = link
            await self._catch_up()
            self._trusted_at = trio.current_time() + self._hold
            self._hold = self._lease
            self.fault = None
            log.info("connected to Redis")
            while True:
                with trio.move_on_after(LOOK_SECONDS):
                    await link.lost.wait()
                await self._ask("look")
        except Unreachable as error:
            return str(error)
        finally:
            self._link = None
            self._trusted_at = math.inf

    async def _catch_up(self) -> None:
        """Tell a server what it may have missed.

        Raises:
          Unreachable: it is lost again.
        """
        await self._ask("look")
        while self._doubtful:
            await self._ask("give_back", *self._doubtful[0])
            del self._doubtful[0]
        if self._allowance is not None:
            await self._hand_over(self._allowance)
        if self._starts:
            starts = [(s.token, _word(s.shard), self._clock.at(s.at)) for s in self._starts]
            await self._ask("restore", *(word for start in starts for word in start))

    async def _ask(self, command: str, *arguments: str | int) -> _Answer:
        """Let the server decide.

        Raises:
          Unreachable: there is no answer, or none that can be trusted.
        """
        link = self._link
        if link is None:
            raise Unreachable("not connected")
        asked_at = trio.current_time()
        answer = _Answer(*await link.call(command, *self._settings, *arguments))
        if not self._clock.agrees(answer.now, asked_at, trio.current_time()):
            link.give_up("its clock was set")
        if self._since is None:
            self._since = answer.since
        if self._since != answer.since:
            link.give_up("its data is gone")
        self._known, self._known_at = answer, asked_at
        return answer

    async def claim(self, key: int, shard: int | None, came_at: float) -> Claim | Refusal:
        asked_at = trio.current_time()
        if self._trusted_at == math.inf:
            return Refusal(FIRST_RETRY, "key")
        if asked_at < self._trusted_at:
            return Refusal(self._trusted_at - asked_at, "key")
        token = f"{self._replica}:{next(self._numbers)}"
        answer_by = asked_at + self._answer_seconds
        claim = Claim(
            key, self._max_concurrency, shard, (asked_at + answer_by) / 2, answer_by, token
        )
        words = self._words(claim)
        try:
            answer = await self._ask("claim", *words, self._replica, self._clock.at(came_at))
        except Unreachable:
            self._doubtful.append(words)
            return Refusal(LOOK_SECONDS, "key")
        if answer.verdict == _GRANTED:
            return claim
        wait = asked_at + answer.wait / MICROSECONDS - trio.current_time()
        return Refusal(max(0.0, wait), "key" if answer.verdict == _KEY_CLOSED else "shard")

    async def start_window(self, claim: Claim, answered_at: float) -> None:
        self._starts.append(_Start(claim.token, claim.shard, answered_at))
        ago = _microseconds(trio.current_time() - answered_at)
        with suppress(Unreachable):  # then the lease ends in time, and the start is in _starts
            await self._ask("start_window", *self._words(claim), ago)

    async def give_back(self, claim: Claim) -> None:
        words = self._words(claim)
        try:
            await self._ask("give_back", *words)
        except Unreachable:
            self._doubtful.append(words)

    async def withdraw(self, key: int) -> None:
        with suppress(Unreachable):  # then it is forgotten soon
            await self._ask("withdraw", self._max_concurrency, key, self._replica)

    def regroup(self, max_concurrency: int) -> None:
        self._max_concurrency = max_concurrency  # the server knows all the windows that it has

    async def allow(self, allowance: Allowance) -> None:
        self._allowance = allowance
        while self._starts and self._starts[0].at + self._in_flight <= allowance.asked_at:
            self._starts.popleft()
        with suppress(Unreachable):  # then it catches up
            await self._hand_over(allowance)

    def session_starts(self) -> SessionStarts:
        known, now = self._known, trio.current_time()
        source: Source | None = "configured" if self._limit else None
        return SessionStarts(
            used=known.used,
            total=None if known.total < 0 else known.total,
            enforced=self._limit != 0,
            resets_in=max(0.0, self._known_at + known.resets_in / MICROSECONDS - now),
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

    def _words(self, claim: Claim) -> tuple[str | int, ...]:
        """Name a claim as the script does."""
        return self._max_concurrency, claim.key, _word(claim.shard), claim.token


def _word(shard: int | None) -> str | int:
    return "" if shard is None else shard


def _microseconds(seconds: float) -> int:
    return round(seconds * MICROSECONDS)
