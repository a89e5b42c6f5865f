"""Measures how late releases are while another client attacks the server.

``python -m tests.attack`` runs all attacks and prints a table; ``--help`` says more.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import selectors
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import cycle, pairwise

from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from tests.harness import PATIENCE, Server, asking, serving

WINDOW = 0.1
"""Seconds between two releases of the shard that measures."""

ATTACKED_SHARD, ATTACKERS_SHARD = 0, 1
"""Their rate limit keys differ, so no attacker has a ticket ahead of the measured client."""

RECONNECT_SECONDS = 0.05
"""Seconds until a disconnected attacker connects again."""

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SettingsFrame(0).serialize()

STREAMS = 890
"""Requests that stall on one connection of HTTP/2."""


@dataclass(frozen=True)
class Attack:
    """What each attacking connection sends."""

    opening: bytes
    flood: bytes = b""
    """Sent again and again."""
    connections: int = 6
    reads: bool = True
    """Whether the attacker reads what the server sends."""
    half_closes: bool = False
    waiting: int = 0
    """Other clients that wait meanwhile."""
    pieces: int = 65_536
    """Bytes in one write."""


def headers(
    stream: int, block: bytes, *, end_stream: bool = True, end_headers: bool = True
) -> Frame:
    frame = HeadersFrame(stream, block)
    frame.flags.add("END_HEADERS") if end_headers else None
    frame.flags.add("END_STREAM") if end_stream else None
    return frame


def literal(name: bytes, value: bytes) -> bytes:
    """Encode a header field that HPACK does not index; name and value have at most 126 bytes."""
    return b"\x00%c%b%c%b" % (len(name), name, len(value), value)


def get(path: bytes = b"/?shard=%d" % ATTACKERS_SHARD) -> bytes:
    """Encode the header block of a request: GET, http, a host and a path."""
    return b"\x82\x86\x01\x05queue\x04%c%b" % (len(path), path)


def continuation(stream: int, block: bytes) -> Frame:
    return ContinuationFrame(stream, block)


def wire(*frames: Frame) -> bytes:
    return b"".join(frame.serialize() for frame in frames)


def requests(count: int = STREAMS, block: bytes = b"", *, end_stream: bool = True) -> bytes:
    """Return what opens a new connection and sends a request on each of its streams."""
    block = block or get()
    opened = (headers(2 * n + 1, block, end_stream=end_stream) for n in range(count))
    return PREFACE + wire(*opened)


def initial_window(size: int) -> Frame:
    return SettingsFrame(0, settings={SettingsFrame.INITIAL_WINDOW_SIZE: size})


def window_update(stream: int) -> Frame:
    return WindowUpdateFrame(stream, 1)


def streams(count: int, *frames: Callable[[int], Frame]) -> bytes:
    """Return the given frames for each of ``count`` new streams."""
    return wire(*(frame(2 * n + 1) for n in range(count) for frame in frames))


def empty_data(stream: int) -> Frame:
    return DataFrame(stream, b"")


def little_data(stream: int) -> Frame:
    return DataFrame(stream, b"x")


def reset(stream: int) -> Frame:
    return RstStreamFrame(stream, error_code=8)


def request(stream: int) -> Frame:
    return headers(stream, get())


def status(stream: int) -> Frame:
    return headers(stream, get(b"/status"))


def head(*lines: bytes, path: bytes = b"/?shard=%d" % ATTACKERS_SHARD) -> bytes:
    return b"\r\n".join((b"POST %b HTTP/1.1" % path, b"Host: queue", *lines, b"", b""))


UPLOAD = head(b"Transfer-Encoding: chunked")
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: queue\r\n\r\n"
STATUS = b"GET /status HTTP/1.1\r\nHost: queue\r\n\r\n"
BAD = b"GET /?shard=x HTTP/1.1\r\nHost: queue\r\n\r\n"
H2_UPGRADE = (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAA")
MANY = 200
OFTEN = 3000

ATTACKS = {
    "none": Attack(b"", connections=0),
    # HTTP/2
    "h2 WINDOW_UPDATE of the connection": Attack(requests(), wire(window_update(0)) * OFTEN),
    "h2 WINDOW_UPDATE, window 0": Attack(
        PREFACE + wire(initial_window(0)) + requests()[len(PREFACE) :],
        wire(window_update(0)) * OFTEN,
    ),
    "h2 WINDOW_UPDATE of a stream": Attack(requests(), wire(window_update(1)) * OFTEN),
    "h2 INITIAL_WINDOW_SIZE": Attack(
        requests(), wire(initial_window(0), initial_window(65_535)) * OFTEN
    ),
    "h2 SETTINGS": Attack(PREFACE, wire(SettingsFrame(0)) * OFTEN),
    "h2 SETTINGS, unread": Attack(PREFACE, wire(SettingsFrame(0)) * OFTEN, reads=False),
    "h2 SETTINGS, 50 connections": Attack(PREFACE, wire(SettingsFrame(0)) * OFTEN, connections=50),
    "h2 PING": Attack(PREFACE, wire(PingFrame(0, b"12345678")) * OFTEN),
    "h2 PING, 50 connections": Attack(
        PREFACE, wire(PingFrame(0, b"12345678")) * OFTEN, connections=50
    ),
    "h2 PRIORITY": Attack(PREFACE, wire(*(PriorityFrame(2 * n + 1) for n in range(OFTEN)))),
    "h2 PRIORITY of one stream": Attack(requests(1), wire(PriorityFrame(1)) * OFTEN),
    "h2 empty DATA": Attack(requests(1, end_stream=False), wire(empty_data(1)) * OFTEN),
    "h2 DATA of a byte": Attack(requests(1, end_stream=False), wire(little_data(1)) * OFTEN),
    "h2 DATA, whole frames": Attack(
        requests(1, end_stream=False), wire(DataFrame(1, bytes(16_000))) * 4
    ),
    "h2 unknown frames": Attack(PREFACE, b"\x00\x00\x00\xbb\x00\x00\x00\x00\x00" * OFTEN),
    "h2 requests, reset": Attack(PREFACE + streams(OFTEN, request, reset)),
    "h2 requests, reset, 50 connections": Attack(
        PREFACE + streams(OFTEN, request, reset), connections=50
    ),
    "h2 /status, reset": Attack(PREFACE + streams(OFTEN, status, reset), waiting=1000),
    "h2 CONTINUATION": Attack(
        PREFACE + wire(headers(1, get(), end_headers=False)), wire(continuation(1, b"")) * OFTEN
    ),
    "h2 CONTINUATION of 16 kB": Attack(
        PREFACE + wire(headers(1, get(), end_headers=False)),
        wire(continuation(1, literal(b"a" * 100, b"b" * 100) * 80)) * 8,
    ),
    "h2 many headers": Attack(requests(MANY, get() + literal(b"a", b"b") * 2000)),
    "h2 header bomb": Attack(requests(MANY, get() + b"\x84" * 15_000)),
    "h2 big headers": Attack(
        requests(MANY, get() + literal(b"a" * 100, b"b" * 100) * 70, end_stream=False)
    ),
    "h2 bad streams": Attack(requests(OFTEN, get(b"/\xe9"))),
    "h2 /healthz": Attack(requests(OFTEN, get(b"/healthz"))),
    "h2 400": Attack(requests(OFTEN, get(b"/?shard=x"))),
    "h2 400 with unfinished bodies": Attack(requests(OFTEN, get(b"/?shard=x"), end_stream=False)),
    "h2 connections of 890 streams": Attack(requests() + b"\x00" * 9, connections=50),
    "h2 prefaces": Attack(PREFACE + b"\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00", connections=50),
    # HTTP/1
    "connections": Attack(b"\r\n\0", connections=50),
    "garbage": Attack(b"", b"\0\1\2\3" * 10_000, connections=50),
    "idle connections": Attack(b"G", connections=1000),
    "unfinished heads of 126 kB": Attack(
        b"GET / HTTP/1.1\r\na: " + b"a" * 126_000, connections=200
    ),
    "26,000 headers": Attack(head(*[b"a:"] * 26_000), connections=20),
    "26,000 headers, unfinished": Attack(
        b"GET / HTTP/1.1\r\n" + b"a:\r\n" * 26_000, connections=50
    ),
    "heads byte by byte": Attack(
        b"GET / HTTP/1.1\r\n", b"a: b\r\n" * 1000, pieces=1, connections=50
    ),
    "empty lines": Attack(b"", b"\r\n" * 30_000, connections=50),
    "chunks of a byte": Attack(UPLOAD, b"1\r\nx\r\n" * 10_000),
    "chunks of a byte, 50 connections": Attack(UPLOAD, b"1\r\nx\r\n" * 10_000, connections=50),
    "chunk extensions": Attack(UPLOAD, b"1;" + b"a" * 60_000 + b"\r\nx\r\n"),
    "trailers": Attack(UPLOAD + b"0\r\n", b"a: b\r\n" * 10_000),
    "upload": Attack(head(b"Content-Length: 99999999999"), bytes(60_000)),
    "upload, 50 connections": Attack(
        head(b"Content-Length: 99999999999"), bytes(60_000), connections=50
    ),
    "pipelined tickets": Attack(b"", asking(ATTACKERS_SHARD) * 1000, connections=50),
    "pipelined /healthz": Attack(b"", HEALTH * 1000),
    "pipelined /healthz, 50 connections": Attack(b"", HEALTH * 1000, connections=50),
    "pipelined /healthz, unread": Attack(b"", HEALTH * 1000, reads=False),
    "pipelined 400": Attack(b"", BAD * 1000),
    "pipelined 400, unread": Attack(b"", BAD * 1000, reads=False),
    "400 with unfinished bodies": Attack(
        head(b"Content-Length: 9", path=b"/?shard=x"), connections=300
    ),
    "expect 100-continue": Attack(b"", head(b"Expect: 100-continue", b"Content-Length: 0") * 100),
    "h2c upgrades": Attack(head(*H2_UPGRADE, b"Content-Length: 0") + head(*H2_UPGRADE)),
    "long queries": Attack(b"", asking(ATTACKERS_SHARD).replace(b"?", b"?a=b&" + b"a&" * 10_000)),
    "leading zeros": Attack(b"", asking(ATTACKERS_SHARD).replace(b"=", b"=" + b"0" * 30_000)),
    "hang-ups": Attack(asking(ATTACKERS_SHARD), half_closes=True, connections=200),
    "unread /status": Attack(STATUS * 10, reads=False, connections=500, waiting=5000),
    "unread /dashboard": Attack(
        STATUS.replace(b"status", b"dashboard") * 10, reads=False, connections=100, waiting=1000
    ),
    "/events": Attack(STATUS.replace(b"status", b"events"), connections=200, waiting=1000),
}


class _Attacker:
    """One attacking connection, which connects again when the server closes it."""

    def __init__(self, port: int, attack: Attack, selector: selectors.BaseSelector) -> None:
        self.port, self.attack, self.selector = port, attack, selector
        self.closed = 0
        self.sent = 0
        self.retry_at = 0.0
        self.socket: socket.socket | None = None
        self._rest = memoryview(b"")

    def connect(self) -> None:
        self.socket = socket.socket()
        if not self.attack.reads:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.socket.connect_ex(("127.0.0.1", self.port))
        self._rest = memoryview(self.attack.opening)
        self.selector.register(self.socket, selectors.EVENT_READ | selectors.EVENT_WRITE, self)

    def work(self, mask: int) -> None:
        assert self.socket is not None
        try:
            if mask & selectors.EVENT_READ and self.attack.reads and not self.socket.recv(65_536):
                raise ConnectionResetError
            if mask & selectors.EVENT_WRITE:
                self._write(self.socket)
        except BlockingIOError:
            pass
        except OSError:
            self.disconnect()

    def _write(self, sock: socket.socket) -> None:
        self._rest = self._rest or memoryview(self.attack.flood)
        if self._rest:
            written = sock.send(self._rest[: self.attack.pieces])
            self.sent += written
            self._rest = self._rest[written:]
        if not self._rest and not self.attack.flood:
            if self.attack.half_closes:
                raise ConnectionResetError
            self.selector.modify(sock, selectors.EVENT_READ, self)
        if not self.attack.reads:
            self.selector.modify(sock, selectors.EVENT_WRITE, self)
            if not self._rest and not self.attack.flood:
                self.selector.unregister(sock)

    def disconnect(self) -> None:
        assert self.socket is not None
        with suppress(KeyError):
            self.selector.unregister(self.socket)
        self.socket.close()
        self.socket = None
        self.closed += 1
        self.retry_at = time.monotonic() + RECONNECT_SECONDS


def _attack(port: int, attack: Attack, seconds: float, report: object) -> None:
    """Attack for some time, in a process of its own."""
    with selectors.DefaultSelector() as selector:
        attackers = [_Attacker(port, attack, selector) for _ in range(attack.connections)]
        give_up = time.monotonic() + seconds
        while (now := time.monotonic()) < give_up:
            for attacker in attackers:
                if attacker.socket is None and attacker.retry_at <= now:
                    attacker.connect()
            for key, mask in selector.select(0.01):
                key.data.work(mask)
        report.put(  # type: ignore[attr-defined]
            (sum(one.closed for one in attackers), sum(one.sent for one in attackers))
        )


@dataclass(frozen=True)
class Outcome:
    """The effect of an attack."""

    releases: int
    p99: float
    """Seconds by which releases were late."""
    worst: float
    worst_with_cpu: float
    """The worst without the time for which the server and the client had no CPU."""
    closed: int
    """Connections of the attackers that the server closed."""
    sent: int
    """Bytes that the attackers sent."""
    memory: int
    """Bytes by which the server's memory grew."""
    cpu: float
    """CPU seconds of the server per second."""


def measure(attack: Attack, seconds: float, **variables: object) -> Outcome:
    """Attack a server for some time, and measure the releases of another client meanwhile."""
    settings = {"WINDOW_SECONDS": WINDOW, "HOLD_ON_START": "false", "MAX_CONCURRENCY": 4}
    settings |= {"LOOP_FREE_STARTS": 0, "PLACE_SECONDS": 0}
    with serving(**{**settings, **variables}) as server:
        wait_beside = [server.ask(2) for _ in range(attack.waiting)]
        server.settle()
        before, cpu = server.peak_memory(), server.cpu_seconds()
        with _attacking(server, attack, seconds) as outcome:
            late, late_with_cpu = zip(*_lateness(server, seconds), strict=True)
        cpu = (server.cpu_seconds() - cpu) / seconds
        memory = server.peak_memory() - before
        closed, sent = outcome
        assert server.process.poll() is None, server.lines[-1]
        assert not [line for line in server.lines if "Traceback" in line], server.lines[:40]
        del wait_beside
    return Outcome(
        releases=len(late),
        p99=sorted(late)[math.ceil(0.99 * len(late)) - 1],
        worst=max(late),
        worst_with_cpu=max(late_with_cpu),
        closed=closed,
        sent=sent,
        memory=memory,
        cpu=cpu,
    )


@contextmanager
def _attacking(server: Server, attack: Attack, seconds: float) -> Iterator[list[int]]:
    context = multiprocessing.get_context("fork")
    report = context.Queue()
    process = context.Process(target=_attack, args=(server.port, attack, seconds, report))
    process.start()
    outcome: list[int] = []
    try:
        yield outcome
        outcome += report.get(timeout=PATIENCE)
    finally:
        process.kill()
        process.join()


def _lateness(server: Server, seconds: float) -> list[tuple[float, float]]:
    """Keep two clients waiting, and return by how many seconds each release came late.

    The second number of each release does not count the time for which there was no CPU.
    """
    clients = [server.ask(ATTACKED_SHARD) for _ in range(3)]
    times, without_cpu = list[float](), list[float]()
    give_up = time.monotonic() + seconds
    for client in cycle(clients):
        times.append(client.answer().at)
        without_cpu.append(server.seconds_without_cpu())
        if times[-1] > give_up:
            break
        client.socket.sendall(asking(ATTACKED_SHARD))
    # The first three requests may arrive in another order.
    times.sort()
    late = [later - earlier - WINDOW for earlier, later in pairwise(times)]
    # A client that had no CPU asked late, which delays a release two answers later.
    before = [without_cpu[0]] * 2 + without_cpu
    waits = [later - earlier for earlier, later in zip(before, without_cpu[1:], strict=False)]
    return [(seconds, seconds - wait) for seconds, wait in zip(late, waits, strict=True)]


DESCRIPTION = f"""Attacks a server in {len(ATTACKS)} ways, and prints how late its releases are
meanwhile. An attack takes about 4 s longer than --seconds, all of them about
{len(ATTACKS) * 12 // 60} minutes."""


def main() -> None:
    """Run attacks and print their table."""
    parser = argparse.ArgumentParser(prog="scripts/attack", description=DESCRIPTION)
    parser.add_argument("--seconds", type=float, default=8.0, help="for each attack (default: 8)")
    parser.add_argument("attacks", nargs="*", help="run only attacks whose names contain this")
    options = parser.parse_args()
    names = [
        name
        for name in ATTACKS
        if not options.attacks or any(part in name for part in options.attacks)
    ]
    print("| attack | connections | releases | p99 late | worst | closed | grew by | CPU |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in names:
        attack = ATTACKS[name]
        outcome = measure(attack, options.seconds)
        print(
            f"| {name} | {attack.connections} | {outcome.releases} | {outcome.p99 * 1000:.1f} ms "
            f"| {outcome.worst * 1000:.1f} ms | {outcome.closed} | {outcome.memory / 1e6:.1f} MB "
            f"| {outcome.cpu:.0%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
