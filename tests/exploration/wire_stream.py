"""In-memory connections that behave as TCP does, and report each byte when it is sent."""

from __future__ import annotations

import math
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import trio

Tap = Callable[[bytes], None]
"""Is called with bytes of the server when it hands them to the connection."""


async def _at_once() -> None:
    pass


class _End(trio.abc.HalfCloseableStream):
    """One end of a connection.

    Args:
      latency: seconds from here to the peer.
      capacity: bytes on the way from here to the peer's reads, beyond which a sender waits.
    """

    peer: _End

    def __init__(self, latency: float, capacity: float) -> None:
        self.latency = latency
        self.eof_at = self.reset_at = math.inf
        """When the peer's FIN and its RST arrive here."""
        self.is_closed = False
        self._capacity = capacity
        self._incoming = deque[tuple[float, bytes]]()
        self._unread = 0
        self._has_sent_eof = False
        self._news = trio.lowlevel.ParkingLot()
        self._busy = set[str]()
        self.thawed: Callable[[], Awaitable[None]] = _at_once
        """Waits while the process is frozen."""

    @property
    def hung_up_at(self) -> float:
        """From when on it is known here that the peer sends nothing more."""
        return min(self.eof_at, self.reset_at)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        with self._alone("receive"):
            await trio.lowlevel.checkpoint_if_cancelled()
            await self.thawed()
            if (data := self._take(max_bytes or 65_536)) is not None:
                await trio.lowlevel.cancel_shielded_checkpoint()
                return data
            while (data := self._take(max_bytes or 65_536)) is None:
                arrives_at = self._incoming[0][0] if self._incoming else math.inf
                await self._sleep(min(arrives_at, self.hung_up_at))
                await self.thawed()
            return data  # without a checkpoint, as trio does after it has waited

    def _take(self, limit: int) -> bytes | None:
        """Return what has arrived, None if nothing has."""
        now = trio.current_time()
        if self.is_closed:
            raise trio.ClosedResourceError
        taken = b""
        while self._incoming and self._incoming[0][0] <= now and len(taken) < limit:
            at, data = self._incoming.popleft()
            if rest := data[limit - len(taken) :]:
                self._incoming.appendleft((at, rest))
            taken += data[: limit - len(taken)]
        if taken:
            self._unread -= len(taken)
            self.peer._wake()  # noqa: SLF001
            return taken
        if self.reset_at <= now:
            raise trio.BrokenResourceError
        return b"" if self.eof_at <= now else None

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        rest = bytes(data)
        with self._alone("send"):
            await trio.lowlevel.checkpoint_if_cancelled()
            while rest:
                await self.thawed()
                self._check_can_send()
                room = self._capacity - self.peer._unread  # noqa: SLF001
                if room > 0:
                    size = int(min(room, len(rest)))
                    self.put(rest[:size])
                    rest = rest[size:]
                else:
                    await self._sleep(self.reset_at)
            await trio.lowlevel.cancel_shielded_checkpoint()

    def _check_can_send(self) -> None:
        if self.is_closed or self._has_sent_eof:
            raise trio.ClosedResourceError
        if self.reset_at <= trio.current_time():
            raise trio.BrokenResourceError

    def put(self, data: bytes) -> None:
        """Send without waiting for room.

        Bytes that arrive at a closed end are lost, and are answered with a reset.
        """
        self._check_can_send()
        now = trio.current_time()
        if self.peer.is_closed:
            self.reset_at = min(self.reset_at, now + self.latency + self.peer.latency)
        else:
            self.peer._incoming.append((now + self.latency, data))  # noqa: SLF001
            self.peer._unread += len(data)  # noqa: SLF001
            self.peer._wake()  # noqa: SLF001

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def send_eof(self) -> None:
        with self._alone("send"):
            await trio.lowlevel.checkpoint()
            self.half_close()

    def half_close(self) -> None:
        """Close the sending side."""
        if not self._has_sent_eof:
            self._check_can_send()
            self._has_sent_eof = True
            self.peer.eof_at = trio.current_time() + self.latency
            self.peer._wake()  # noqa: SLF001

    async def aclose(self) -> None:
        self.close()
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """Close both sides. As with TCP, unread bytes turn this into a reset."""
        if self.is_closed:
            return
        has_unread = bool(self._incoming) and self._incoming[0][0] <= trio.current_time()
        self._end(reset=has_unread)

    def reset(self) -> None:
        """Break the connection."""
        if not self.is_closed:
            self._end(reset=True)

    def _end(self, *, reset: bool) -> None:
        self.is_closed = True
        at = trio.current_time() + self.latency
        if reset:
            self.peer.reset_at = min(self.peer.reset_at, at)
        elif not self._has_sent_eof:
            self.peer.eof_at = at
        if self._incoming:
            self._incoming.clear()
            self._unread = 0
        self._wake()
        self.peer._wake()  # noqa: SLF001

    async def _sleep(self, until: float) -> None:
        """Wait until something changes at this end, but not longer than until some time."""
        with trio.move_on_at(until):
            await self._news.park()

    def _wake(self) -> None:
        self._news.unpark_all()

    @contextmanager
    def _alone(self, what: str) -> Iterator[None]:
        if what in self._busy:
            raise trio.BusyResourceError
        self._busy.add(what)
        try:
            yield
        finally:
            self._busy.remove(what)


class ClientEnd(_End):
    """The client's end. Its sends never wait."""

    def __init__(self, latency: float) -> None:
        super().__init__(latency, math.inf)


class ServerEnd(_End):
    """The server's end: what Hypercorn and our connections need of a :class:`trio.SocketStream`.

    Where the code asks the kernel about the connection, it gets a real socket in the same state.
    """

    def __init__(self, latency: float, capacity: int, name: tuple[str, int]) -> None:
        super().__init__(latency, capacity)
        self.tap: Tap = lambda _: None
        self.on_close: Callable[[], None] = lambda: None
        self.socket = SimpleNamespace(
            family=socket.AF_INET,
            fileno=self._fileno,
            getpeername=lambda: name,
            getsockname=lambda: ("192.0.2.1", 5000),
        )
        self._stand_in: tuple[socket.socket, socket.socket] | None = None
        self._is_marked = False
        """Whether the real socket has something to read, as this end has."""

    def setsockopt(self, *_: object) -> None:
        """Accept any option."""

    def put(self, data: bytes) -> None:
        super().put(data)
        self.tap(data)

    def _fileno(self) -> int:
        if self.is_closed:
            return -1
        if self._stand_in is None:
            self._stand_in = socket.socketpair()
        here, there = self._stand_in
        now = trio.current_time()
        is_readable = bool(self._incoming) and self._incoming[0][0] <= now
        if is_readable and not self._is_marked and there.fileno() >= 0:
            there.send(b"!")
        elif not is_readable and self._is_marked:
            here.recv(1)
        self._is_marked = is_readable
        if self.reset_at <= now:
            there.close()
        elif self.eof_at <= now and there.fileno() >= 0:
            there.shutdown(socket.SHUT_WR)
        return here.fileno()

    def _end(self, *, reset: bool) -> None:
        super()._end(reset=reset)
        for one in self._stand_in or ():
            one.close()
        self.on_close()


def connection(
    number: int, *, up: float = 0.0, down: float = 0.0, capacity: int = 65_536
) -> tuple[ClientEnd, ServerEnd]:
    """Return the two ends of a new connection.

    Args:
      number: names the client.
      up: seconds from the client to the server.
      down: seconds from the server to the client.
      capacity: bytes that the server can send before the client reads them.
    """
    client = ClientEnd(up)
    server = ServerEnd(down, capacity, ("192.0.2.2", 1024 + number % 60_000))
    client.peer, server.peer = server, client
    return client, server
