"""The connection to Redis that the stores of all bots share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any, NoReturn, Protocol

import structlog
import trio
from coredis.pool import ConnectionPool

from gateway_queue.faults import Fault, next_fault
from gateway_queue.store.redis.connection import Connection, Known, Unreachable
from gateway_queue.store.redis.servers import Sentinels, Servers, ServersOfUrl
from gateway_queue.store.sentinel_url import SCHEME, parse_sentinel_url

CHANGED, LOST = 1, 2
"""Answers of ``glance.lua`` about the data of a bot."""

FIRST_RETRY, LONGEST_RETRY = 0.1, 1.0
"""Seconds between two tries to connect. They double after each try, up to the longest."""

LOOK_SECONDS = 1.0
"""The longest time, in seconds, between two checks of a bot's data."""

RESTING_AT_ONCE = 250
"""The most resting stores in one command: a long command delays releases."""

TURN_SECONDS = 0.001
"""Seconds between the checks of two stores, so that no release waits for hundreds of them."""

log = structlog.stdlib.get_logger(__name__)


class Resting(Protocol):
    """An idle store, whose data the link checks."""

    def known(self) -> Known:
        """Return what the store knows of its data."""

    def note_answer(self, now: int, asked_at: float, answered_at: float) -> None:
        """Compare the server's clock and speed, see :meth:`ServerClock.agrees`.

        Raises:
          Unreachable: the clock was set.
        """

    def wake(self) -> None:
        """Let the store check its data."""


class Link:
    """Connects to a server, and again whenever the connection is lost.

    A store that doubts its data closes the connection for all stores: the reason, such as a server
    that was restarted, concerns the other stores too.

    Args:
      url: of the server, of a node of its cluster, or of its sentinels.
      count_error: called when the server is lost, cannot be reached, or is too slow.
      observe_round_trip: called after each answer with the seconds that it took.
    """

    def __init__(
        self,
        url: str,
        *,
        count_error: Callable[[], None],
        observe_round_trip: Callable[[float], None] = lambda _: None,
    ) -> None:
        now = trio.current_time()
        self.fault: Fault | None = Fault("not connected to Redis yet", now, now)
        """Why no store can use the server; None if stores can."""
        self.count_error = count_error
        self.observe_round_trip = observe_round_trip
        self._free_at = -math.inf
        self._resting: dict[Resting, None] = {}
        self._servers: Servers = (
            Sentinels(parse_sentinel_url(url)) if url.startswith(SCHEME) else ServersOfUrl(url)
        )
        self._is_announced = False
        self._connection: Connection | None = None
        self._changed = trio.Event()

    async def connected(self) -> Connection:
        """Wait for a connection that is not lost."""
        while self._connection is None or self._connection.lost.is_set():
            await self._changed.wait()
        return self._connection

    def confirm(self, connection: Connection) -> None:
        """Note that a store can use a connection."""
        if self.fault is None or connection.lost.is_set():
            return
        after = trio.current_time() - self.fault.since
        self.fault, self._is_announced = None, False
        log.info("connected to Redis", after=round(after, 3))

    @property
    def overlap(self) -> float:
        """Seconds for which another replica may still use a former server."""
        return self._servers.overlap

    def check_up_to_date(self) -> None:
        """Check that no other server has taken over, as far as this replica can know.

        Raises:
          Unreachable: another server may have taken over.
        """
        if not self._servers.is_up_to_date():
            raise Unreachable("another server may have taken over")

    async def turn(self) -> None:
        """Wait until a store may check its data."""
        at = max(trio.current_time(), self._free_at)
        self._free_at = at + TURN_SECONDS
        await trio.sleep_until(at)

    @contextmanager
    def resting(self, store: Resting) -> Iterator[None]:
        """Make the context in which the link checks a store's data, in one command for all."""
        self._resting[store] = None
        try:
            yield
        finally:
            del self._resting[store]

    async def run(self) -> None:
        """Stay connected until cancelled."""
        async with self._servers.running():
            await self._stay_connected()

    async def _stay_connected(self) -> NoReturn:
        delay = FIRST_RETRY
        has_followed = False
        while True:
            reason, is_elsewhere = await self._use_next()
            has_worked, now = self.fault is None, trio.current_time()
            if is_elsewhere and (has_worked or not has_followed):
                log.info("another node of the Redis cluster is used", reason=reason)
                self.fault = next_fault(self.fault, reason, now, 0)
                has_followed = True
                continue
            has_followed = False
            if has_worked:
                delay = FIRST_RETRY
            if has_worked or not self._is_announced:
                log.warning("Redis cannot be reached, no ticket is released", reason=reason)
                self._is_announced = True
            elif self.fault is not None and self.fault.reason != reason:
                log.info("Redis still cannot be reached", reason=reason)
            self.fault = next_fault(self.fault, reason, now, delay)
            self.count_error()
            await trio.sleep(delay)
            delay = min(2 * delay, LONGEST_RETRY)

    async def _use_next(self) -> tuple[str, bool]:
        """Use one connection until it is lost.

        Returns:
          Why it is lost, and whether another node of the cluster has the keys.
        """
        try:
            pool = await self._servers.find()
        except (OSError, ValueError, Unreachable) as error:  # OSError: a certificate in the URL
            return str(error), False
        async with pool:
            connection = await self._offer(pool)
        is_elsewhere = connection.moved_to is not None
        if is_elsewhere or self.fault is not None:
            self._servers.note_failure(connection)
        return connection.reason, is_elsewhere

    async def _offer(self, pool: ConnectionPool[Any]) -> Connection:
        """Let the stores use one connection until it is lost, and return it."""
        connection = Connection(pool)
        with suppress(Unreachable):
            await connection.open()
            self._servers.note_nodes(await connection.cluster_nodes())
            await self._warn_of_eviction(connection)
            self._connection = connection
            self._changed.set()
            self._changed = trio.Event()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._servers.watch, connection)
                await self._glance_until_lost(connection)
                nursery.cancel_scope.cancel()
        return connection

    async def _glance_until_lost(self, connection: Connection) -> None:
        while not connection.lost.is_set():
            with trio.move_on_after(LOOK_SECONDS):
                await connection.lost.wait()
            with suppress(Unreachable):
                await self._glance(connection)
        for store in self._resting:
            store.wake()

    async def _glance(self, connection: Connection) -> None:
        """Wake the stores whose data has changed.

        Raises:
          Unreachable: the data of a store was lost, or the connection is.
        """
        stores = iter(tuple(self._resting))
        while part := tuple(islice(stores, RESTING_AT_ONCE)):
            asked_at = trio.current_time()
            now, *verdicts = await connection.glance([store.known() for store in part])
            answered_at = trio.current_time()
            self.observe_round_trip(answered_at - asked_at)
            for store, verdict in zip(part, verdicts, strict=True):
                if store not in self._resting:
                    continue  # it checks its data itself now
                store.note_answer(now, asked_at, answered_at)
                if verdict == LOST:
                    connection.close("its data was lost")
                elif verdict == CHANGED:
                    store.wake()

    async def _warn_of_eviction(self, connection: Connection) -> None:
        policy = await connection.eviction_policy()
        if policy is not None:
            log.warning(
                "Redis removes data when it is full: set its maxmemory-policy to noeviction",
                maxmemory_policy=policy,
            )
