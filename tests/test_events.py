"""Server-sent events, without a browser."""

from __future__ import annotations

import http.client
import signal
import socket
import time
import zlib
from collections.abc import Iterator
from contextlib import aclosing

import pytest
import trio
from trio.testing import MockClock

from gateway_queue.web.dashboard.events import INTERVAL, Feeds
from tests.harness import Answer, Client, Server, eventually, open_files, serving
from tests.test_http2 import GET, H2Client, connect

LISTEN = b"GET /events HTTP/1.1\r\nHost: queue\r\n\r\n"
SNAPSHOT = b'<main id="live"'

Received = list[tuple[float, bytes]]


class Numbered:
    """Writes the number of an event, and fails for one of them."""

    def __init__(self, failing: int | None = None) -> None:
        self.number = 0
        self._failing = failing

    async def write(self, _: str) -> str:
        await trio.lowlevel.checkpoint()
        self.number += 1
        if self.number == self._failing:
            raise RuntimeError("an error of the page")
        return f"event\n{self.number}"


def event(number: int) -> bytes:
    return b"data: event\ndata: %d\n\n" % number


async def listen(feeds: Feeds[str], received: Received, pause: float) -> None:
    """Listen, and pause after each event."""
    async with aclosing(feeds.listen("bot")) as listening:
        async for one in listening:
            received.append((trio.current_time(), one))
            await trio.sleep(pause)


async def test_one_event_per_second_while_a_page_is_open(autojump_clock: MockClock) -> None:
    numbered = Numbered()
    quick, slow = Received(), Received()
    async with trio.open_nursery() as nursery:
        feeds = Feeds(numbered.write, nursery)
        await trio.sleep(50)
        assert numbered.number == 0
        with trio.move_on_after(3.5 * INTERVAL):
            async with trio.open_nursery() as listeners:
                listeners.start_soon(listen, feeds, quick, 0.0)
                listeners.start_soon(listen, feeds, quick, 0.0)
                listeners.start_soon(listen, feeds, slow, 1.5 * INTERVAL)
        await trio.sleep(50)
        assert numbered.number == 4
        nursery.cancel_scope.cancel()
    all_events = [(50 + second * INTERVAL, event(second + 1)) for second in range(4)]
    assert quick == [one for one in all_events for _ in range(2)]
    assert slow == [all_events[0], all_events[2]]


async def test_a_fault_of_the_page_costs_one_event(autojump_clock: MockClock) -> None:
    received = Received()
    async with trio.open_nursery() as nursery:
        feeds = Feeds(Numbered(failing=2).write, nursery)
        with trio.move_on_after(3.5 * INTERVAL):
            await listen(feeds, received, 0.0)
        nursery.cancel_scope.cancel()
    assert [one for _, one in received] == [event(1), event(3), event(4)]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(WINDOW_SECONDS=3600) as running:
        yield running
        assert not [line for line in running.lines if "Traceback" in line or "error" in line]


def read_events(listener: Client, count: int) -> None:
    """Read until ``count`` events have arrived."""
    while listener.received.count(SNAPSHOT) < count:
        received = listener.socket.recv(65536)
        assert received, "closed"
        listener.received += received


def test_all_listeners_get_the_same_events(server: Server) -> None:
    began = time.monotonic()
    listeners = [server.connect(LISTEN) for _ in range(3)]
    for listener in listeners:
        read_events(listener, 3)
    assert time.monotonic() - began >= 2 * INTERVAL - 0.1
    first = listeners[0].received
    head = first.partition(b"\r\n\r\n")[0].lower()
    assert b"content-type: text/event-stream" in head
    assert b"cache-control: no-store" in head
    last_event = first.rpartition(SNAPSHOT)[2]
    assert all(last_event[:100] in listener.received for listener in listeners)


def test_events_are_compressed(server: Server) -> None:
    """Each event can be read when it comes."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("GET", "/events", headers={"Accept-Encoding": "br, gzip"})
    response = connection.getresponse()
    inflate = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    text, size = b"", 0
    while text.count(SNAPSHOT) < 2:
        part = response.read1()
        text, size = text + inflate.decompress(part), size + len(part)
    connection.close()
    assert text.endswith(b"\n\n")
    assert response.headers["content-encoding"] == "gzip"
    assert size < len(text) / 2


def test_events_come_over_http2(server: Server) -> None:
    client = H2Client.with_prior_knowledge(connect(server))
    stream = client.ask([*GET[:-1], (":path", "/events")])
    while client.answers.get(stream, b"").count(SNAPSHOT) < 2:
        client.read()
    assert client.statuses[stream] == "200"


def ask(server: Server, method: str, path: str, *, body: bool = True) -> Answer:
    return server.connect(f"{method} {path} HTTP/1.1\r\nHost: q\r\n\r\n".encode()).answer(body=body)


@pytest.mark.parametrize("path", ["/dashboard", "/events"])
def test_head_ends_at_once_and_other_methods_are_refused(server: Server, path: str) -> None:
    head = server.connect(f"HEAD {path} HTTP/1.1\r\nHost: q\r\n\r\n".encode())
    assert head.answer(body=False).status == 200
    head.socket.sendall(b"GET /healthz HTTP/1.1\r\nHost: q\r\n\r\n")
    assert head.answer().body == b'{"status":"ok"}\n'
    refused = ask(server, "POST", path)
    assert refused.status == 405
    assert refused.headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize("path", ["/dashboard", "/events"])
def test_the_page_and_its_events_require_the_token(path: str) -> None:
    with serving(AUTH_TOKEN="secret") as server:
        refused = ask(server, "GET", path)
    assert refused.status == 401
    assert b'www-authenticate: Basic realm="gateway-queue"' in refused.raw


def test_a_page_that_closes_is_forgotten() -> None:
    with serving() as server:
        idle = open_files(server)
        listeners = [server.connect(LISTEN) for _ in range(20)]
        read_events(listeners[-1], 1)
        eventually(lambda: open_files(server) == idle + 20)
        for listener in listeners:
            listener.hang_up()
        eventually(lambda: open_files(server) == idle)


def test_a_page_that_does_not_read_is_dropped() -> None:
    """Other listeners do not wait for it, and the server keeps no data for it."""
    with serving(WINDOW_SECONDS=3600) as server, socket.socket() as unread:
        idle = open_files(server)
        for shard in range(100):  # a long queue makes large events
            server.ask(shard)
        other = server.connect(LISTEN)
        read_events(other, 1)
        eventually(lambda: open_files(server) == idle + 101)
        memory = server.peak_memory()
        unread.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)  # makes small buffers
        unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        unread.connect(("127.0.0.1", server.port))
        unread.sendall(LISTEN)
        eventually(lambda: open_files(server) == idle + 102)
        eventually(lambda: open_files(server) == idle + 101)
        other.received = b""
        read_events(other, 2)
        assert server.peak_memory() - memory < 2**20


def test_stopping_does_not_wait_for_listeners() -> None:
    with serving() as server:
        listeners = [server.connect(LISTEN) for _ in range(20)]
        read_events(listeners[-1], 1)
        began = time.monotonic()
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert time.monotonic() - began < 2
        for listener in listeners:
            listener.rest()
