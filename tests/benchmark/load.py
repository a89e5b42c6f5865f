"""The load: thousands of clients in one thread, with raw sockets and epoll."""

from __future__ import annotations

import re
import selectors
import socket
import time
from collections.abc import Callable, Iterable
from itertools import count
from types import TracebackType
from typing import Self

from tests.harness import PATIENCE, SO_TIMESTAMPNS, arrival, asking, reset

GLANCE = 0.05
"""Seconds between two checks of the condition in :meth:`Crowd.watch`."""


class Client:
    """One connection; its request names a shard."""

    __slots__ = ("received", "request", "socket")

    def __init__(self, address: tuple[str, int], shard: int) -> None:
        self.request = asking(shard)
        self.received = b""
        self.socket = socket.socket()
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        self.socket.connect_ex(address)

    def has_whole_answer(self) -> bool:
        head, _, body = self.received.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
        return length is None or len(body) >= int(length[1])


class Crowd:
    """Clients of one server, which leave when they have an answer.

    Args:
      address: host and port of the server.
      keep_asking: whether they ask again instead, each on its connection.
    """

    def __init__(self, address: tuple[str, int], *, keep_asking: bool = False) -> None:
        self._address = address
        self._keep_asking = keep_asking
        self._selector = selectors.EpollSelector()
        self._shards = count()
        self.clients: dict[Client, None] = {}
        """The connected clients, in the order in which they came."""
        self.answers: list[float] = []
        """When each answer began to come to this machine's kernel, on :func:`time.monotonic`."""
        self.refused = 0
        """How many clients were refused, or disconnected without an answer."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for client in self.clients:
            reset(client.socket)  # otherwise its port would be in use for a minute
        self._selector.close()

    def come(self, number: int) -> None:
        """Connect ``number`` clients, as fast as possible."""
        for _ in range(number):
            client = Client(self._address, next(self._shards))
            self.clients[client] = None
            self._selector.register(client.socket, selectors.EVENT_WRITE, client)
            self._look(0)

    def leave(self, clients: Iterable[Client]) -> None:
        """Disconnect some clients, as fast as possible."""
        for client in clients:
            self._end(client)

    def watch(self, until: Callable[[], bool], patience: float = PATIENCE) -> bool:
        """Run the clients until a condition is true or time is up. Return whether it is true."""
        give_up = time.monotonic() + patience
        while not until():
            if time.monotonic() > give_up:
                return False
            self._look(GLANCE)
        return True

    def _look(self, seconds: float) -> None:
        for key, events in self._selector.select(seconds):
            client: Client = key.data
            try:
                if events & selectors.EVENT_WRITE:
                    client.socket.send(client.request)
                    self._selector.modify(client.socket, selectors.EVENT_READ, client)
                else:
                    self._read(client)
            except OSError:
                self._refuse(client)

    def _read(self, client: Client) -> None:
        received, ancillary, *_ = client.socket.recvmsg(65536, 128)
        if not received:
            self._refuse(client)
            return
        if not client.received:
            self.answers.append(arrival(ancillary))
        client.received += received
        if not client.has_whole_answer():
            return
        if self._keep_asking:
            client.received = b""
            client.socket.send(client.request)
        else:
            self._end(client)

    def _refuse(self, client: Client) -> None:
        self.refused += not client.received
        self._end(client)

    def _end(self, client: Client) -> None:
        self._selector.unregister(client.socket)
        client.socket.close()
        del self.clients[client]
