"""The real command in a separate process, and clients with real sockets."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import secrets
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from gateway_queue.settings import Settings

PATIENCE = 40.0
"""Seconds after which a waiting test fails. Nothing that a test waits for takes nearly as long."""

GO = b"""{"message": "You're free to connect now! :)"}"""

REQUEST = b"GET / HTTP/1.1\r\nHost: queue\r\n\r\n"

README = Path(__file__).parent.with_name("README.md")

IDLE_SECONDS = 5.0
"""The server closes a connection without a complete request after this time."""

SLACK = 0.001
"""Seconds by which a client may measure a gap too short: clocks and wake-ups are not exact."""


def asking(shard: int, *, confirm: bool = False) -> bytes:
    """Return a request for a shard's turn."""
    parameters = b"&confirm=true" if confirm else b""
    return b"GET /?shard=%d%b HTTP/1.1\r\nHost: queue\r\n\r\n" % (shard, parameters)


def installed(command: str) -> str:
    """Return the path of a command in the same folder as this Python."""
    return str(Path(sys.executable).with_name(command))


def environ(**variables: object) -> dict[str, str]:
    """Return this environment without the server's settings, and with some other variables."""
    unset = {field.name.upper() for field in dataclasses.fields(Settings)}
    unset |= {f"{variable}_FILE" for variable in unset}
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    return kept | {name: str(value) for name, value in variables.items()}


@dataclass
class Server:
    """A running server."""

    process: subprocess.Popen[str]
    port: int = 0
    lines: list[str] = field(default_factory=list)
    """Lines that it has printed to stdout and stderr."""
    clients: list[Client] = field(default_factory=list)

    def connect(self, request: bytes = REQUEST) -> Client:
        """Open a connection and send a request. The connection is closed with the server."""
        self.clients.append(Client(self.port, request))
        return self.clients[-1]

    def ask(self, shard: int) -> Client:
        """Open a connection, and send the request of a shard."""
        return self.connect(asking(shard))

    def get(self, path: str) -> Answer:
        """Request an endpoint, and return its answer."""
        client = Client(self.port, f"GET {path} HTTP/1.1\r\nHost: queue\r\n\r\n".encode())
        try:
            return client.answer()
        finally:
            client.hang_up()

    def status(self) -> dict[str, Any]:
        """Return the document of ``/status``."""
        status: dict[str, Any] = json.loads(self.get("/status").body)
        return status

    def settle(self) -> None:
        """Wait until the server has finished its work after the last answer."""
        self.get("/healthz")

    def peak_memory(self) -> int:
        """Return the server's peak resident memory, in bytes."""
        return self._status("VmHWM") * 1024

    def cpu_seconds(self) -> float:
        """Return how much CPU time it has used."""
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    def seconds_without_cpu(self) -> float:
        """Return for how long the server and this process were ready to run but had no CPU."""
        statistics = [Path(f"/proc/{pid}/schedstat") for pid in (self.process.pid, os.getpid())]
        return sum(int(path.read_text().split()[1]) for path in statistics) / 1e9

    def voluntary_switches(self) -> int:
        """Return how often it has gone to sleep: its voluntary context switches."""
        return self._status("voluntary_ctxt_switches")

    def _status(self, name: str) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (number,) = re.findall(rf"(?m)^{name}:\s+(\d+)", status)
        return int(number)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """Wait for its end and return its exit status."""
        return self.process.wait(PATIENCE)


@contextmanager
def serving(*command: str, **variables: object) -> Iterator[Server]:
    """Run a server on a free port, with some settings, until the end of the context."""
    process = subprocess.Popen(
        command or [installed("gateway-queue")],
        # Most tests measure the window alone. Tests of the margin set it.
        env=environ(**{"PORT": 0, "MARGIN_SECONDS": 0, **variables}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    server = Server(process)
    listening = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        with process.stdout as output:
            for line in output:
                server.lines.append(line.rstrip())
                if found := re.search(r"Running on https?://\S+:(\d+)", line):
                    server.port = int(found[1])
                    listening.set()
        listening.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert listening.wait(PATIENCE)
        assert server.port, server.lines
        yield server
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with the workers of Hypercorn
        process.wait()
        reader.join()
        for client in server.clients:
            client.hang_up()


@dataclass(frozen=True)
class Answer:
    """An answer as it came over the wire."""

    raw: bytes
    at: float
    """When this machine's kernel received its end, on :func:`time.monotonic`."""

    @property
    def status(self) -> int:
        return int(self.raw.split(b" ", 2)[1])

    @property
    def headers(self) -> dict[str, str]:
        head, _, _ = self.raw.partition(b"\r\n\r\n")
        pairs = (line.split(b":", 1) for line in head.split(b"\r\n")[1:])
        return {name.decode().lower(): value.strip().decode() for name, value in pairs}

    @property
    def body(self) -> bytes:
        return self.raw.partition(b"\r\n\r\n")[2]


SO_TIMESTAMPNS = 35
"""Linux's socket option for arrival times; the socket module has no name for it."""


def kernel_stamp(ancillary: list[tuple[int, int, bytes]]) -> float:
    """Return when the last byte of a read arrived, on :func:`time.time`.

    The kernel starts to add timestamps a moment after the first socket enables them. Without one,
    return the current time.
    """
    for _, kind, data in ancillary:
        if kind == SO_TIMESTAMPNS:
            seconds, nanoseconds = struct.unpack("ll", data)
            return float(seconds + nanoseconds / 1e9)
    return time.time()


def arrival(ancillary: list[tuple[int, int, bytes]]) -> float:
    """Return when data arrived, on :func:`time.monotonic`, even if it was read much later."""
    now = time.monotonic()
    return now - (time.time() - kernel_stamp(ancillary))


class Client:
    """One connection with a plain socket. It sends exactly the bytes that the test names."""

    def __init__(self, port: int, request: bytes) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        self.received = b""
        self.socket.sendall(request)

    def answer(self, *, body: bool = True) -> Answer:
        """Wait for one final answer, and skip interim ones."""
        arrived = time.monotonic()
        while True:
            head, end, rest = self.received.partition(b"\r\n\r\n")
            if end and head.startswith(b"HTTP/1.1 1"):
                self.received = rest
                continue  # the final answer may be in the same read
            if end:
                length = int(re.findall(rb"(?i)\r\ncontent-length: (\d+)", head)[0]) if body else 0
                if len(rest) >= length:
                    self.received = rest[length:]
                    return Answer(head + end + rest[:length], arrived)
            received, ancillary, *_ = self.socket.recvmsg(65536, 128)
            assert received, f"closed after {self.received!r}"
            self.received += received
            arrived = arrival(ancillary)

    def rest(self) -> bytes:
        """Wait for the end of the connection, and return what comes until then."""
        try:
            while received := self.socket.recv(65536):
                self.received += received
        except ConnectionResetError:
            pass
        return self.received

    def hang_up(self) -> None:
        self.socket.close()

    def reset(self) -> None:
        """Hang up with a RST."""
        reset(self.socket)


def reset(sock: socket.socket) -> None:
    """Close a connection with a RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def first_answers(clients: list[Client], count: int) -> list[tuple[int, Answer]]:
    """Wait for the first answers to many clients.

    Returns:
      The answers in the order in which they came, each with the number of its client.
    """
    answers: list[tuple[int, Answer]] = []
    with selectors.DefaultSelector() as selector:
        for number, client in enumerate(clients):
            selector.register(client.socket, selectors.EVENT_READ, number)
        while len(answers) < count:
            ready = selector.select(PATIENCE)
            assert ready, "no answer came"
            for key, _ in ready[: count - len(answers)]:
                answers.append((key.data, clients[key.data].answer()))
                selector.unregister(key.fileobj)
    return sorted(answers, key=lambda answer: answer[1].at)


def eventually(condition: Callable[[], bool], patience: float = PATIENCE) -> None:
    """Wait until a condition is true, such as one that another process changes."""
    give_up = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def free_port() -> int:
    """Return a free port for a server that is started again on the same port.

    It is below the ports that the kernel gives to clients, so no client takes it in the meantime.
    So is the port of a Redis cluster's bus, which is higher by 10,000.
    """
    while True:
        port = 10_000 + secrets.randbelow(12_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def with_open_files(soft: int, hard: int | None = None) -> tuple[str, ...]:
    """Return the command with other limits of open files. None keeps the hard limit."""
    code = (
        "import resource, os, sys; name = resource.RLIMIT_NOFILE; "
        f"hard = {hard} or resource.getrlimit(name)[1]; "
        f"resource.setrlimit(name, ({soft}, hard)); os.execv(sys.argv[1], sys.argv[1:])"
    )
    return (sys.executable, "-c", code, installed("gateway-queue"))


def allow_10_000_connections() -> None:
    """Let this process, and the servers that it starts, open 10,000 sockets."""
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert limit >= 11_000, "raise the hard limit of open files: ulimit -Hn 20000"
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))


def open_files(server: Server) -> int:
    """Count the descriptors that a server holds."""
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))


def metric(server: Server, name: str) -> float:
    """Return one value of a server's metrics."""
    found = re.search(rf"(?m)^{name} (\S+)$", server.get("/metrics").body.decode())
    assert found, name
    return float(found[1])
