"""A connection to Redis, used until anything about it is in doubt."""

from __future__ import annotations

import ssl
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import trio
from coredis.connection import BaseConnection, TCPLocation
from coredis.exceptions import MovedError, RedisError, ResponseError
from coredis.pool import ConnectionPool
from coredis.typing import RedisValueT

CALL_SECONDS = 1.0
"""The longest that an answer may take."""

CONNECT_SECONDS = 2.0
"""The longest that it may take to connect, with the handshakes of TLS and Redis: four round trips
(two with a Redis before 7.2), two more with TLS, one more with a database other than 0."""

SCRIPT = Path(__file__).with_name("decisions.lua")

KEYS = ("state", "starts", "shards", "heads", "line")
"""The keys of the script, without the prefix."""

GLANCE = Path(__file__).with_name("glance.lua")
GLANCE_KEYS = KEYS[:3]


class Unreachable(Exception):
    """Redis has not answered, or has answered with an error; the message says why.

    The command may have been carried out.
    """


class Known(NamedTuple):
    """What a replica knows of a bot's data; times are the server's, in microseconds."""

    prefix: str
    replica: str
    since: int
    """When the data began."""
    seen_at: int
    """When the replica's last command came."""


def connections(url: str, location: TCPLocation | None = None) -> ConnectionPool[Any]:
    """Make the pool from which a link gets its connection.

    Args:
      url: of a server.
      location: another node of this server's cluster, to connect to instead.

    A pool replaces a lost connection by itself. But the next connection may lead to a server that
    has missed the last commands. So each pool has one link, and each link one connection.
    """
    if url.startswith("rediss:") and "ssl_" not in url:
        # Otherwise coredis would accept the certificate of any host.
        context = ssl.create_default_context()
        pool = ConnectionPool.from_url(url, decode_components=True, ssl_context=context)
    else:
        pool = ConnectionPool.from_url(url, decode_components=True)
    pool.location = location or pool.location
    return pool


class Connection:
    """A connection, from :meth:`open` until it is lost.

    Args:
      pool: an open pool that makes the connection.
    """

    _connection: BaseConnection
    _script: Any
    _glance: Any

    def __init__(self, pool: ConnectionPool[Any]) -> None:
        self.lost = trio.Event()
        """Set when it cannot be used any more."""
        self.reason = ""
        """Why it is lost."""
        self.moved_to: TCPLocation | None = None
        """The node of the cluster that has the keys, if this one does not."""
        self._pool = pool

    async def open(self) -> None:
        """Connect, and load the script into Redis.

        Raises:
          Unreachable: there is no such server, or it refuses.
        """
        try:
            with trio.fail_after(CONNECT_SECONDS) as attempt:
                self._connection = await self._pool.get_connection()
        except (trio.TooSlowError, RedisError) as error:
            is_late = attempt.cancel_called  # coredis has another error for this
            self.close(f"no connection within {CONNECT_SECONDS:g} s" if is_late else str(error))
        self._script = await self._request(b"SCRIPT LOAD", SCRIPT.read_bytes())
        self._glance = await self._request(b"SCRIPT LOAD", GLANCE.read_bytes())

    async def call(self, prefix: str, command: str, *arguments: RedisValueT) -> Any:
        """Run a command of the script.

        Args:
          prefix: the first part of every key.
          command: for the script.
          arguments: of the command.

        Raises:
          Unreachable: there is no answer; the connection is lost.
        """
        keys = [f"{prefix}:{key}" for key in KEYS]
        script = (self._script, len(keys), *keys)
        return await self._request(b"EVALSHA", *script, command, *arguments)

    async def glance(self, known: Iterable[Known]) -> Any:
        """Ask which bots' data has changed or was lost.

        Args:
          known: what a replica knows of each bot.

        Returns:
          The server's time, and for each bot a number, see ``glance.lua``.

        Raises:
          Unreachable: there is no answer.
        """
        keys, told = list[str](), list[str | int]()
        for one in known:
            keys += (f"{one.prefix}:{key}" for key in GLANCE_KEYS)
            told += one.replica, one.since, one.seen_at
        return await self._request(b"EVALSHA", self._glance, len(keys), *keys, *told)

    async def eviction_policy(self) -> str | None:
        """Return the rule by which a full server removes data; None if it removes none.

        Raises:
          Unreachable: there is no answer.
        """
        try:
            memory = await self._request(b"INFO", b"memory", may_be_refused=True)
        except ResponseError:  # not every user may ask for it
            return None
        fields = dict(line.split(":", 1) for line in memory.decode().split("\r\n") if ":" in line)
        policy = fields.get("maxmemory_policy", "noeviction")
        return None if policy == "noeviction" or fields.get("maxmemory") == "0" else policy

    async def cluster_nodes(self) -> set[TCPLocation]:
        """Return the nodes of the server's cluster; none if it has none, or refuses to list them.

        Raises:
          Unreachable: there is no answer.
        """
        try:
            slots = await self._request(b"CLUSTER SLOTS", may_be_refused=True)
        except ResponseError:
            return set()
        nodes = (node for _, _, *its_nodes in slots for node in its_nodes)
        # A node that does not know its own address names none.
        return {TCPLocation(host.decode(), port) for host, port, *_ in nodes if host}

    def lose(self, reason: str) -> None:
        """Mark this connection as lost: it is not used any more."""
        if not self.lost.is_set():
            self.reason = reason
            self.lost.set()

    def close(self, reason: str) -> NoReturn:
        """Mark this connection as lost, and raise an error.

        Raises:
          Unreachable: always, with the first reason for which the connection was lost.
        """
        self.lose(reason)
        raise Unreachable(self.reason)

    async def _request(
        self, command: bytes, *arguments: RedisValueT, may_be_refused: bool = False
    ) -> Any:
        if self.lost.is_set():
            raise Unreachable(self.reason)
        try:
            with trio.fail_after(CALL_SECONDS):
                return await self._connection.create_request(
                    command, *arguments, decode=False, disconnect_on_cancellation=True
                )
        except trio.TooSlowError:
            self.close(f"no answer within {CALL_SECONDS:g} s")
        except MovedError as error:
            location = self._pool.location
            same_host = location.host if isinstance(location, TCPLocation) else ""
            self.moved_to = TCPLocation(error.host or same_host, error.port)
            self.close(f"the keys are on another node of the cluster: {self.moved_to}")
        except RedisError as error:
            if may_be_refused and isinstance(error, ResponseError):
                raise
            self.close(str(error))
