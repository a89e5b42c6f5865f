"""A simulated Redis server, the network to it, and the faults of both."""

from __future__ import annotations

import random
from collections.abc import Callable, Coroutine, Generator
from math import inf
from types import TracebackType
from typing import Any, Protocol, Self

import trio
from coredis.exceptions import ConnectionError as ConnectionLost
from coredis.exceptions import MovedError, RedisError

from tests.exploration.record import History, Loss
from tests.exploration.redis_data import Database, Reply, Status, word
from tests.exploration.redis_scripts import Scripts
from tests.exploration.scenario import Scenario

EPOCH = 1_800_000_000_000_000
"""What the server's clock shows at the start, in microseconds."""


SMALL_STEP = 1.0
"""Seconds by which a clock may be set at most, so that its times can still be used."""


class Host(Protocol):
    """Where a client of the server runs."""

    sends: trio.lowlevel.ParkingLot
    """Tasks that wait until the next request is sent."""
    way_latency: float
    """Seconds that a request or a reply takes longer than those of other hosts."""

    @property
    def is_frozen(self) -> bool: ...

    async def thawed(self) -> None:
        """Wait while the process is frozen."""

    async def reachable(self) -> None:
        """Wait while the host is cut off from the server."""


class SimulatedRedis:
    """The server. It can crash, lose data, be slow, and have a wrong clock.

    Args:
      nursery: runs the tasks of its connections.
      history: where to note what happens.
      scenario: of any bot.
      random_source: chooses latencies and faults.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        history: History,
        scenario: Scenario,
        random_source: random.Random,
    ) -> None:
        self.nursery = nursery
        self.history = history
        self.random = random_source
        self.data = Database(random_source)
        self.policy = b"noeviction"
        self.is_up = True
        self.is_retired = False
        """Whether it serves no client any more."""
        self.owner: Callable[[], int] | None = None
        """In a cluster: returns the port of the node that has the keys."""
        self.port = 0
        self.loses_requests = self.loses_replies = 0.0
        """Probabilities that a message is lost."""
        self.stalls_until = 0.0
        self.extra_latency = 0.0
        """The most seconds that are added to the usual time of a request or a reply."""
        self._latency = scenario.latency
        self._rate = scenario.clock_rate
        self._shown, self._shown_at = float(EPOCH), trio.current_time()
        self._connections: list[Connection] = []
        self._scripts = Scripts(self._execute)
        self._new_replid()

    def time(self) -> int:
        """Return what its clock shows, in microseconds."""
        passed = trio.current_time() - self._shown_at
        return int(self._shown + passed * self._rate * 1e6)

    def set_clock(self, seconds: float) -> None:
        """Set its clock forward or back. After a long step, its times cannot be used any more."""
        self._step(seconds)
        self.lose(f"clock set by {seconds:.3f} s", is_of_clock=True)

    def adjust_clock(self, seconds: float) -> None:
        """Set its clock by a small step, as time daemons and virtual machines do."""
        self._step(seconds)
        self.history.note(f"Redis: clock set by {seconds:.6f} s")

    def _step(self, seconds: float) -> None:
        self.follow_clock(self, seconds)
        if abs(seconds) <= SMALL_STEP:
            self.history.note_clock_step(seconds)

    def follow_clock(self, other: SimulatedRedis, seconds: float) -> None:
        """Set the clock some seconds ahead of that of another server."""
        self._shown, self._shown_at = other.time() + seconds * 1e6, trio.current_time()

    def retire(self) -> None:
        """Serve no client any more."""
        self.is_retired = True
        self.reset_connections("Connection closed by server")

    def lose(
        self,
        what: str,
        prefix: str | None = None,
        *,
        is_of_clock: bool = False,
        copied_at: float | None = None,
    ) -> None:
        """Note that data of the server may be wrong or lost from now on.

        Args:
          what: has happened.
          prefix: of the affected keys; None if all keys are affected.
          is_of_clock: whether only its clock was set.
          copied_at: when the copy was made that was loaded, if nothing else has changed.
        """
        loss = Loss(trio.current_time(), what, prefix, is_of_clock, copied_at)
        self.history.losses.append(loss)
        self.history.note(f"Redis: {what}")

    async def works(self) -> None:
        """Wait while it stalls."""
        await trio.sleep_until(self.stalls_until)

    def latency(self) -> float:
        return self._latency * self.random.uniform(0.5, 2) + self.random.uniform(
            0, self.extra_latency
        )

    def reset_connections(self, reason: str) -> None:
        connections, self._connections = self._connections, []
        for connection in connections:
            connection.reset(reason)

    def start_anew(self, data: Database, *, keeps_connections: bool = False) -> None:
        """Restart as a new process with these data."""
        self.data = data
        self._new_replid()
        if keeps_connections:
            if self.random.random() < 0.5:  # Redis 6 replicates scripts, Redis 7 does not
                self._scripts.forget()
        else:
            self._scripts.forget()
            self.reset_connections("Connection reset by peer")

    async def connect(self, host: Host) -> Connection:
        """Open a connection.

        Raises:
          ConnectionLost: the server is down.
        """
        await trio.sleep(2 * self.latency())
        await host.thawed()
        await host.reachable()
        if not self.is_up or self.is_retired:
            raise ConnectionLost("Connection refused")
        connection = Connection(self, host)
        self._connections.append(connection)
        return connection

    def forget_connection(self, connection: Connection) -> None:
        if connection in self._connections:
            self._connections.remove(connection)

    def answer(self, words: list[bytes]) -> Reply:
        """Run the command of a client.

        Raises:
          RedisError: the server's answer is an error.
        """
        name = words[0].upper()
        if name == b"EVALSHA" and self.owner is not None and self.owner() != self.port:
            raise MovedError(f"0 primary:{self.owner()}")
        if name == b"EVALSHA":
            number = int(words[2])
            return self._scripts.run(words[1], words[3 : 3 + number], words[3 + number :])
        if name == b"SCRIPT" and words[1].upper() == b"LOAD":
            return self._scripts.load(words[2])
        return self._execute(words)

    def _execute(self, words: list[bytes]) -> Reply:
        match [word.upper() for word in words[:2]]:
            case [b"INFO", *_]:
                return self._info()
            case [b"CONFIG", b"GET"]:
                return [b"maxmemory-policy", self.policy]
            case [b"ROLE"]:
                return [b"master", 0, []]
            case [b"CLUSTER", b"SLOTS"] if self.owner is not None:
                port = self.owner()
                return [[0, 16383, [b"primary", port, b""], [b"primary", port + 1, b""]]]
            case [b"PING"]:
                return Status(b"PONG")
        return self.data.execute(self.time(), words)

    def _info(self) -> bytes:
        return (
            b"# Server\r\nredis_version:7.2.0\r\n# Memory\r\nmaxmemory:0\r\nmaxmemory_policy:%s\r\n"
            b"# Replication\r\nrole:master\r\nmaster_replid:%s\r\n"
        ) % (self.policy, self._replid)

    def _new_replid(self) -> None:
        self._replid = b"%040x" % self.random.getrandbits(160)


class Connection:
    """Stands in for a connection of coredis's pool, as far as the store's ``Connection`` uses it.

    Each direction delivers in order. As in TCP, a lost message holds up all later messages of its
    direction. Messages that were sent before or while the host is cut off arrive later, also if the
    host has given up.
    """

    def __init__(self, server: SimulatedRedis, host: Host) -> None:
        self._server = server
        self._host = host
        self._broken: str | None = None
        self._is_mute = False
        self._waiting: list[_Request] = []
        self._out, requests = trio.open_memory_channel[_Request](inf)
        self._back, replies = trio.open_memory_channel[_Request](inf)
        server.nursery.start_soon(self._carry_out, requests)
        server.nursery.start_soon(self._carry_back, replies)

    def create_request(
        self,
        command: bytes,
        *arguments: bytes | str | float,
        decode: bool,
        disconnect_on_cancellation: bool,
    ) -> Coroutine[Any, Any, Reply]:
        if self._broken is not None:
            raise ConnectionLost(self._broken)
        assert not decode
        request = _Request([*command.split(), *map(word, arguments)])
        request.due = trio.current_time() + self._server.latency() + self._host.way_latency
        request.is_withheld = self._host.is_frozen
        self._waiting.append(request)
        self._out.send_nowait(request)
        self._host.sends.unpark_all()
        return self._result(request, disconnect_on_cancellation)

    async def _result(self, request: _Request, disconnect_on_cancellation: bool) -> Reply:
        try:
            return await request
        except trio.Cancelled:
            if disconnect_on_cancellation:
                self.close("a request was cancelled")
            raise
        finally:
            if request in self._waiting:
                self._waiting.remove(request)

    def close(self, reason: str) -> None:
        """Close it from the client's side: requests that were sent may still arrive."""
        if self._broken is None:
            self._broken = reason
            self._out.close()
            self._server.forget_connection(self)
            for request in self._waiting:
                request.fail(ConnectionLost(reason))

    def reset(self, reason: str) -> None:
        """Break it: requests that were sent do not arrive any more."""
        self._is_mute = True
        self.close(reason)

    async def _carry_out(self, requests: trio.MemoryReceiveChannel[_Request]) -> None:
        server = self._server
        async for request in requests:
            if request.is_withheld:
                await self._host.thawed()
            await trio.sleep_until(request.due)
            await self._host.reachable()
            await server.works()
            if self._is_mute or server.random.random() < server.loses_requests:
                self._is_mute = True
                continue
            try:
                request.reply = server.answer(request.words)
            except RedisError as error:
                request.error = error
            server.history.note_detail(request.describe)
            request.due = trio.current_time() + server.latency() + self._host.way_latency
            self._back.send_nowait(request)
        self._back.close()

    async def _carry_back(self, replies: trio.MemoryReceiveChannel[_Request]) -> None:
        server, is_mute = self._server, False
        async for request in replies:
            is_mute = is_mute or server.random.random() < server.loses_replies
            await trio.sleep_until(request.due)
            await self._host.reachable()
            await self._host.thawed()
            if not is_mute:
                request.done.set()


class _Request:
    __slots__ = ("done", "due", "error", "is_withheld", "reply", "words")

    def __init__(self, words: list[bytes]) -> None:
        self.words = words
        self.due = 0.0
        self.is_withheld = False
        self.reply: Reply = None
        self.error: RedisError | None = None
        self.done = trio.Event()

    def fail(self, error: RedisError) -> None:
        self.error = error
        self.done.set()

    def describe(self) -> str:
        words = [word for word in self.words if len(word) < 1000][:30]
        shown = b" ".join(words).decode()
        return f"Redis: {shown} -> {self.error or self.reply!r}"

    def __await__(self) -> Generator[Any, Any, Reply]:
        yield from self.done.wait().__await__()
        if self.error is not None:
            raise self.error
        return self.reply


class SimulatedPool:
    """Stands in for coredis's pool: a link takes one connection from it."""

    location = None
    """The address of a real pool, which is also the host of a node that reports no host."""

    def __init__(self, server: SimulatedRedis, host: Host) -> None:
        self._server = server
        self._host = host
        self._connection: Connection | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close("closed")

    async def get_connection(self) -> Connection:
        self._connection = await self._server.connect(self._host)
        return self._connection

    def close(self, reason: str) -> None:
        if self._connection is not None:
            self._connection.close(reason)
