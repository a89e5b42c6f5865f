"""The Redis servers that are the primary one after the other, and the sentinels that name it."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import TracebackType
from typing import Self

import trio
from coredis.connection import TCPLocation
from coredis.exceptions import ConnectionError as ConnectionLost

from tests.exploration.redis_data import Database, Reply
from tests.exploration.redis_server import Host, SimulatedPool, SimulatedRedis
from tests.exploration.scenario import Scenario

SENTINELS = 3

PRIMARY_PORT = 6379
"""Of the first primary; each further one has the next port."""


class Primaries:
    """The servers of a run. Without sentinels and a cluster, there is only one.

    Args:
      make_server: returns a new server, which is empty.
      scenario: of any bot.
      random_source: chooses the clocks.
    """

    def __init__(
        self,
        make_server: Callable[[], SimulatedRedis],
        scenario: Scenario,
        random_source: random.Random,
    ) -> None:
        self._make_server = make_server
        self._scenario = scenario
        self._random = random_source
        self.servers: list[SimulatedRedis] = []
        self.servers.append(self._next())
        self._standby = self._next() if scenario.cluster else None
        self.isolated: int | None = None
        """Index of the former cluster node that still acts as the primary; None if none does."""
        self.sentinels = [SimulatedSentinel(self) for _ in range(SENTINELS)]

    @property
    def current(self) -> SimulatedRedis:
        return self.servers[-1]

    def take_over(self, data: Database) -> None:
        """Make another server the primary, while the former one keeps running.

        Args:
          data: of the new primary.
        """
        former, server = self.current, self._standby or self._next()
        server.data = data
        server.follow_clock(former, self._random.choice((0.0, 0.01, -0.01, 1.0, -1.0)))
        self.isolated = len(self.servers) - 1
        self.servers.append(server)
        self._standby = self._next() if self._scenario.cluster else None
        server.lose(f"server {len(self.servers)} takes over, without the last writes")

    def _next(self) -> SimulatedRedis:
        server, index = self._make_server(), len(self.servers)
        server.port = PRIMARY_PORT + index
        if self._scenario.cluster:
            server.owner = lambda: (
                PRIMARY_PORT + (index if index == self.isolated else len(self.servers) - 1)
            )
        return server

    def mend(self) -> None:
        """Let all processes and sentinels find the primary.

        With sentinels, former primaries serve no client any more. In a cluster, they are nodes.
        """
        for sentinel in self.sentinels:
            sentinel.is_up, sentinel.cut_off_from = True, None
            sentinel.named = len(self.servers) - 1
        for former in self.servers[:-1]:
            former.is_up, former.is_retired = True, False
            if self._scenario.sentinels:
                former.retire()
        self.current.is_up = True
        self.isolated = None

    def pool(self, location: TCPLocation, host: Host) -> SimulatedPool | SentinelPool:
        """Return the stand-in for coredis's pool of connections to a server or a sentinel."""
        if location.host == "primary":
            servers = [*self.servers, self._standby]
            server = servers[location.port - PRIMARY_PORT]
            assert server is not None
            return SimulatedPool(server, host)
        return SentinelPool(self.sentinels[location.port - 1], host)

    def url(self, process: int) -> str:
        """Return the URL of Redis for a process, with its number in it, see :func:`process_of`."""
        if not self._scenario.sentinels:
            return f"redis://{process}"
        sentinels = ",".join(f"sentinel-{process}:{port + 1}" for port in range(SENTINELS))
        return f"redis+sentinel://{sentinels}/main/{process}"


def first_primary() -> TCPLocation:
    """Return the location of the first primary."""
    return TCPLocation("primary", PRIMARY_PORT)


def process_of(location: TCPLocation, database: int) -> int:
    """Return the number of the process that connects, see :meth:`Primaries.url`."""
    return database if location.host == "primary" else int(location.host.partition("-")[2])


class SimulatedSentinel:
    """Names a primary. It can be down, and it may learn late of a new primary."""

    def __init__(self, primaries: Primaries) -> None:
        self._primaries = primaries
        self.is_up = True
        self.cut_off_from: Host | None = None
        """The process that cannot reach it."""
        self.named = 0
        """The primary, by its index."""

    def answers(self, host: Host) -> bool:
        return self.is_up and host is not self.cut_off_from

    def latency(self) -> float:
        return self._primaries.current.latency()


class SentinelPool:
    """Stands in for coredis's pool: a link takes one connection to a sentinel from it."""

    def __init__(self, sentinel: SimulatedSentinel, host: Host) -> None:
        self._sentinel = sentinel
        self._host = host

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass

    def close(self, _reason: str) -> None:
        pass  # nothing that was sent to a sentinel matters

    async def get_connection(self) -> Self:
        await self._travel()
        return self

    async def create_request(self, _command: bytes, _service: str, *, decode: bool) -> Reply:
        assert not decode
        await self._travel()
        port = PRIMARY_PORT + self._sentinel.named
        await self._travel()
        return [b"primary", b"%d" % port]

    async def _travel(self) -> None:
        await self._host.thawed()
        await self._host.reachable()
        await trio.sleep(self._sentinel.latency() + self._host.way_latency)
        if not self._sentinel.answers(self._host):
            raise ConnectionLost("Connection refused")
        await self._host.reachable()
        await self._host.thawed()
