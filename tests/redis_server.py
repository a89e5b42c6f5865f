"""A real Redis server for the tests, and a proxy that delays or breaks connections to it."""

from __future__ import annotations

import re
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

from tests.harness import PATIENCE, eventually, free_port


@dataclass
class RedisServer:
    """A Redis server that keeps nothing on disk."""

    folder: Path
    options: tuple[str, ...] = ()
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None
    config: Path | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, or start it again, without data."""
        listen = ("--bind", "127.0.0.1", "--port", str(self.port))
        kept = ("--save", "", "--repl-diskless-sync-delay", "0")
        if self.config is not None:
            arguments = [str(self.config), *listen, *self.options]  # a sentinel keeps no data
        else:
            arguments = [*listen, *kept, *self.options]
        self.process = subprocess.Popen(
            ["redis-server", *arguments],
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
        )
        eventually(self._answers)

    def _answers(self) -> bool:
        # Without credentials the answer is NOAUTH, which also shows that it runs.
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as connection:
            connection.sendall(b"PING\r\n")
            return bool(connection.recv(100))
        return False

    def kill(self) -> None:
        """End it with SIGKILL."""
        assert self.process is not None
        self.signal(signal.SIGKILL)
        self.process.wait(PATIENCE)

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def command(self, *words: str) -> str:
        """Run a command, and return its reply as Redis sends it."""
        line = " ".join(words).encode() + b"\r\n"
        with socket.create_connection(("127.0.0.1", self.port), PATIENCE) as connection:
            connection.sendall(line + b"QUIT\r\n")
            received = b""
            while part := connection.recv(65536):
                received += part
        return received.decode().removesuffix("+OK\r\n").strip()

    def calls(self) -> int:
        """Return how many commands replicas have sent: EVALSHA and PING, not those of scripts."""
        calls = re.findall(r"cmdstat_(\w+):calls=(\d+)", self.command("INFO", "commandstats"))
        return sum(int(number) for name, number in calls if name in {"evalsha", "ping"})


@contextmanager
def redis_server(*options: str) -> Iterator[RedisServer]:
    """Run Redis until the end of the context."""
    with TemporaryDirectory() as folder:
        server = RedisServer(Path(folder), options)
        try:
            server.start()
            yield server
        finally:
            server.kill()


HELD_BACK_SECONDS = 0.5


def _connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), PATIENCE)


class Proxy:
    """A TCP proxy between a replica and Redis.

    Args:
      target: the port of Redis; it can be changed for later connections.
      delay: seconds by which it delays data, in each direction.
    """

    def __init__(self, target: int, delay: float = 0.0) -> None:
        self.target = target
        self.delay = delay
        self.swallows_answers_to: bytes | None = None
        """Cut a connection when the answer comes to a request with these bytes in it."""
        self.holds_back: bytes | None = None
        """Cut a client that sends a request with these bytes, and forward the request later."""
        self.keeps_clients = False
        """When the target changes, connect clients to it without closing their connections."""
        self.cuts = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        self._thread.join()

    def cut(self) -> None:
        """Reset all connections."""
        for connection in self._open:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _cut_and_pass_on(self, client: socket.socket, server: socket.socket, data: bytes) -> None:
        client.shutdown(socket.SHUT_RDWR)
        self.cuts += 1
        time.sleep(HELD_BACK_SECONDS)
        server.sendall(data)
        server.recv(65536)

    def _accept(self) -> None:
        threads: list[threading.Thread] = []
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threads.append(threading.Thread(target=self._forward, args=(client,)))
                threads[-1].start()
        for thread in threads:
            thread.join()

    def _forward(self, client: socket.socket) -> None:
        """Forward data in both directions, after the delay."""
        with ExitStack() as stack:
            stack.enter_context(client)
            try:
                server = _connect(self.target)
            except OSError:
                return
            stack.enter_context(server)
            connected_to = self.target
            self._open += [client, server]
            other = {client: server, server: client}
            under_way: list[tuple[float, socket.socket, bytes]] = []
            doomed = False
            with suppress(OSError):
                while True:
                    wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
                    ready, _, _ = select.select([client, server], [], [], wait)
                    for source in ready:
                        data = source.recv(65536)
                        if not data or (doomed and source is server):
                            self.cuts += doomed
                            return
                        if self.holds_back is not None and self.holds_back in data:
                            self._cut_and_pass_on(client, server, data)
                            return
                        if self.keeps_clients and self.target != connected_to:
                            connected_to = self.target
                            server = stack.enter_context(_connect(connected_to))
                            self._open.append(server)
                            other = {client: server, server: client}
                        wanted = self.swallows_answers_to
                        doomed |= source is client and wanted is not None and wanted in data
                        under_way.append((time.monotonic() + self.delay, other[source], data))
                    while under_way and under_way[0][0] <= time.monotonic():
                        _, target, data = under_way.pop(0)
                        target.sendall(data)
