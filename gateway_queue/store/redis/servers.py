"""How a link finds its server: by a URL, in a cluster, or through sentinels."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, NoReturn, Protocol

import trio
from coredis.connection import TCPLocation
from coredis.exceptions import AuthenticationError, RedisError
from coredis.pool import ConnectionPool

from gateway_queue.store.redis.connection import (
    CALL_SECONDS,
    CONNECT_SECONDS,
    Connection,
    Unreachable,
    connections,
)
from gateway_queue.store.sentinel_url import SentinelUrl

ASK_SECONDS = 0.5
"""Seconds between two questions to a sentinel, if its answers do not take longer."""

FRESH_SECONDS = 2 * CALL_SECONDS
"""Seconds for which an answer of a sentinel counts, from its question on: until the next answer, if
both take the longest time allowed. A replica that was frozen has only older answers."""

OVERLAP_SECONDS = FRESH_SECONDS + 0.5
"""Seconds for which a replica may use a former primary when most sentinels have named another. In a
cluster, it may connect again to a node that does not know yet that it has lost the keys."""


class Servers(Protocol):
    """Finds the server."""

    @property
    def overlap(self) -> float:
        """Seconds for which another replica may use a former server, after this one has changed."""

    def running(self) -> AbstractAsyncContextManager[None]:
        """Make the context in which it can find servers."""

    async def find(self) -> ConnectionPool[Any]:
        """Return the pool of the next connection.

        Raises:
          Unreachable: no server is known.
        """

    async def watch(self, connection: Connection) -> None:
        """Close a connection when another server has taken over."""

    def is_up_to_date(self) -> bool:
        """Return whether no other server has taken over, as far as this replica can know."""

    def note_nodes(self, nodes: Iterable[TCPLocation]) -> None:
        """Remember the nodes of the cluster that a connection has led to."""

    def note_failure(self, connection: Connection) -> None:
        """Note that no store could use a connection."""


class ServersOfUrl:
    """The server at a URL. If it is a node of a cluster, the node that has the keys.

    When one of these two nodes is lost, another node may know which node has the keys.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        # The nodes to try one after the other; None is the node of the URL.
        self._candidates = deque[TCPLocation | None]([None])

    @property
    def overlap(self) -> float:
        return OVERLAP_SECONDS if len(self._candidates) > 1 else 0.0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        yield

    async def find(self) -> ConnectionPool[Any]:
        return connections(self._url, self._candidates[0])

    async def watch(self, connection: Connection) -> None:
        pass  # a server that has been replaced refuses commands, or names the node with the keys

    def is_up_to_date(self) -> bool:
        return True

    def note_nodes(self, nodes: Iterable[TCPLocation]) -> None:
        for node in nodes:
            if node not in self._candidates:
                self._candidates.append(node)
        for candidate in set(self._candidates) - {self._candidates[0], None, *nodes}:
            self._candidates.remove(candidate)

    def note_failure(self, connection: Connection) -> None:
        if connection.moved_to is None:
            self._candidates.rotate(-1)
            return
        if connection.moved_to in self._candidates:
            self._candidates.remove(connection.moved_to)
        self._candidates.appendleft(connection.moved_to)


class Sentinels:
    """The primary that most of the sentinels name.

    A primary that fewer of them name may have been replaced without knowing it. Two replicas that
    use different primaries would both release tickets of the same key.
    """

    def __init__(self, url: SentinelUrl) -> None:
        self._url = url
        # The primary that each sentinel has named last, and when it was asked.
        self._named: dict[TCPLocation, tuple[TCPLocation, float]] = {}
        self._changed = trio.Event()
        self._location: TCPLocation | None = None

    @property
    def overlap(self) -> float:
        return OVERLAP_SECONDS

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery:
            for host, port in self._url.sentinels:
                nursery.start_soon(self._follow, TCPLocation(host, port))
            yield
            nursery.cancel_scope.cancel()

    async def find(self) -> ConnectionPool[Any]:
        with trio.move_on_after(2 * ASK_SECONDS):
            while self._primary() is None:
                await self._changed.wait()
        self._location = self._primary()
        if self._location is None:
            raise Unreachable(self._no_primary())
        return self._pool(self._location, self._url.database, self._url.password)

    async def watch(self, connection: Connection) -> None:
        while True:
            primary = self._primary()
            if primary is None:
                connection.lose(self._no_primary())
            elif primary != self._location:
                connection.lose(f"the sentinels name another primary: {primary}")
            await self._changed.wait()

    def is_up_to_date(self) -> bool:
        return self._primary() == self._location

    def note_nodes(self, nodes: Iterable[TCPLocation]) -> None:
        pass  # sentinels watch no cluster

    def note_failure(self, connection: Connection) -> None:
        pass  # the sentinels name another primary, if there is one

    def _primary(self) -> TCPLocation | None:
        since = trio.current_time() - FRESH_SECONDS
        fresh = (primary for primary, asked_at in self._named.values() if asked_at >= since)
        named = Counter(fresh).most_common(1)
        return named[0][0] if named and 2 * named[0][1] > len(self._url.sentinels) else None

    def _no_primary(self) -> str:
        answers, number = len(self._named), len(self._url.sentinels)
        return f"{answers} of {number} sentinels name a primary of {self._url.service}"

    async def _follow(self, sentinel: TCPLocation) -> NoReturn:
        """Keep asking a sentinel for the primary."""
        password = None
        while True:
            async with self._pool(sentinel, 0, password) as pool:
                try:
                    await self._ask(sentinel, pool)
                except AuthenticationError:
                    password = self._url.password if password is None else None
                except (RedisError, OSError, trio.TooSlowError):
                    pass
            self._note(sentinel, None)
            await trio.sleep(ASK_SECONDS)

    async def _ask(self, sentinel: TCPLocation, pool: ConnectionPool[Any]) -> NoReturn:
        with trio.fail_after(CONNECT_SECONDS):
            connection = await pool.get_connection()
        while True:
            asked_at = trio.current_time()
            with trio.fail_after(CALL_SECONDS):
                named = await connection.create_request(
                    b"SENTINEL GET-MASTER-ADDR-BY-NAME", self._url.service, decode=False
                )
            primary = (TCPLocation(named[0].decode(), int(named[1])), asked_at) if named else None
            self._note(sentinel, primary)
            await trio.sleep_until(asked_at + ASK_SECONDS)

    def _note(self, sentinel: TCPLocation, named: tuple[TCPLocation, float] | None) -> None:
        if named is None:
            self._named.pop(sentinel, None)
        else:
            self._named[sentinel] = named
        self._changed.set()
        self._changed = trio.Event()

    def _pool(
        self, location: TCPLocation, database: int, password: str | None
    ) -> ConnectionPool[Any]:
        username = self._url.username if password is not None else None
        return ConnectionPool(location=location, db=database, username=username, password=password)
