"""Any request is a ticket: requests that the server accepts, its answers, and odd clients."""

from __future__ import annotations

import json
import socket
import string
import struct
import time
from collections.abc import Iterator

import pytest

from tests.harness import GO, Client, Server, eventually, first_answers, serving

STALLING = 3600


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Run one server for all tests: after a crash, the later tests fail, too."""
    with serving(WINDOW_SECONDS=0.005, HOLD_ON_START="false") as running:
        yield running
        assert not [line for line in running.lines if "Traceback" in line]


@pytest.fixture(scope="module")
def stalling() -> Iterator[Server]:
    """Run a server that releases no ticket for an hour."""
    with serving(WINDOW_SECONDS=STALLING) as running:
        yield running
        assert not [line for line in running.lines if "Traceback" in line]


def request(
    method: str = "GET", target: str = "/", *headers: str, version: str = "1.1", body: bytes = b""
) -> bytes:
    lines = [f"{method} {target} HTTP/{version}", "Host: queue", *headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


METHODS = [
    *("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"),
    *(
        "PROPFIND",
        "BREW",
        "get",
        "PRI",
        "M-SEARCH",
        "_",
        string.punctuation.translate(str.maketrans("", "", '"(),/:;<=>?@[\\]{}')),
    ),
]

TARGETS = [
    *("/", "//", "///a//b/", "/%00", "/%ff%fe", "/%", "*", "/*", "a", "?", "/?", "/?x", "/?x=1&&y"),
    *("/static/x", "/healthz/", "//healthz", "/healthz%20", "/HEALTHZ", "/..", "/../../etc/passwd"),
    *("http://elsewhere/", "http://elsewhere", "https://x:99999/?shard=3", "queue:443", "/#x"),
    *("/" + "a" * 16_000, "/?" + "a" * 16_000, "/?shard=1", "/?shard=1&shard=1", "/?shard=007"),
    *("http://[/", "http://[x", "x://]/?shard=1", "//[/", "http://[::1]:99999999/"),
    *("/?shard=2147483647", "/?Shard=x", "/?%73hard=5", "/?a=%ff&shard=%31"),
]

WEBSOCKET = (
    "Upgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
)

HEADERS = [
    "Expect: 100-continue",
    "Upgrade: websocket\r\nConnection: Upgrade",
    WEBSOCKET,
    "Upgrade: TLS/1.0\r\nConnection: Upgrade",
    "Connection: close",
    "Connection: keep-alive, x",
    "Content-Type: multipart/form-data",
    "Content-Type: application/json",
    "Range: bytes=0-1",
    "If-None-Match: *",
    "Accept: image/png",
    "Cookie: \xff=\xfe",
    "X-Forwarded-For: ; DROP TABLE shards",
    "Authorization: Bearer x",
    "X-Long: " + "a" * 30_000,
    "\r\n".join(f"X-{number}: {number}" for number in range(99)),
]


def assert_go(client: Client, *, body: bool = True) -> None:
    answer = client.answer(body=body)
    assert answer.raw.startswith(b"HTTP/1.1 200 ")
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.body == (GO if body else b"")
    if body:
        assert answer.headers["content-length"] == "45"


@pytest.mark.parametrize("method", METHODS)
def test_any_method_is_a_ticket(server: Server, method: str) -> None:
    client = server.connect(request(method, "queue:80" if method == "CONNECT" else "/"))
    assert_go(client, body=method not in {"HEAD", "CONNECT"})


@pytest.mark.parametrize("target", TARGETS)
def test_any_target_is_a_ticket(server: Server, target: str) -> None:
    assert_go(server.connect(request("GET", target)))


@pytest.mark.parametrize("headers", HEADERS)
def test_any_headers_are_a_ticket(server: Server, headers: str) -> None:
    assert_go(server.connect(request("GET", "/", headers)))


def test_an_answer_comes_in_one_packet(server: Server) -> None:
    client = server.connect()
    assert_go(client)
    info = client.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
    (data_packets,) = struct.unpack_from("I", info, 152)  # tcpi_data_segs_in of linux/tcp.h
    assert data_packets == 1


@pytest.mark.parametrize("connection", ["close", "keep-alive"])
def test_http_1_0(server: Server, connection: str) -> None:
    client = server.connect(f"GET / HTTP/1.0\r\nConnection: {connection}\r\n\r\n".encode())
    assert_go(client)
    assert client.rest() == b""


def test_a_connection_is_used_again(server: Server) -> None:
    client = server.connect()
    for _ in range(3):
        assert_go(client)
        client.socket.sendall(request("POST", "/", "Content-Length: 2", body=b"{}"))
    assert_go(client)


def test_the_next_request_may_come_as_soon_as_the_answer_is_seen(server: Server) -> None:
    """Quart may not have finished the former request by then."""
    request = b"HEAD /status HTTP/1.1\r\nHost: q\r\n\r\n"
    client = server.connect(request)
    for _ in range(20):
        assert client.answer(body=False).status == 200
        client.socket.sendall(request)


def test_a_body_is_read_and_dropped(server: Server) -> None:
    sized = request("POST", "/", "Content-Length: 5", body=b"hello")
    chunked = request(
        "POST", "/", "Transfer-Encoding: chunked", body=b"5\r\nhello\r\n0\r\nx: y\r\n\r\n"
    )
    for sent in (sized, chunked, sized + b"\r\n"):
        assert_go(server.connect(sent))


def test_a_body_is_not_waited_for(server: Server) -> None:
    assert_go(server.connect(request("POST", "/", "Content-Length: 1000000")))
    assert_go(server.connect(request("POST", "/", "Transfer-Encoding: chunked", body=b"5\r\nhe")))


def test_an_upload_that_outlasts_its_turn_gets_the_answer(server: Server) -> None:
    """The client reads only when everything is sent, as most clients do."""
    size, chunk = 100 * 2**20, bytes(2**20)
    client = server.connect(request("POST", "/", f"Content-Length: {size}"))
    for _ in range(size // len(chunk)):
        client.socket.sendall(chunk)
    assert_go(client)
    client.socket.sendall(request())
    assert_go(client)


def test_gigabytes_leave_no_trace_in_memory(stalling: Server) -> None:
    stalling.settle()
    before = stalling.peak_memory()
    client = stalling.connect(request("POST", "/", f"Content-Length: {2**31}"))
    chunk = bytes(2**22)
    for _ in range(2**31 // len(chunk)):
        client.socket.sendall(chunk)
    stalling.settle()
    assert stalling.peak_memory() - before < 8 * 2**20


def test_the_interim_answer_that_a_client_expects_comes_at_once(stalling: Server) -> None:
    client = stalling.connect(request("POST", "/", "Content-Length: 1", "Expect: 100-continue"))
    assert client.socket.recv(12) == b"HTTP/1.1 100"


def test_a_pipelined_request_has_its_own_turn(server: Server) -> None:
    client = server.connect(request() + request("POST", "/", "Content-Length: 1", body=b"x"))
    assert_go(client)
    client.socket.sendall(request())
    assert_go(client)
    assert_go(client)


BAD_SHARDS = [
    *("shard=", "shard", "shard=abc", "shard=-1", "shard=1.5", "shard=+1", "shard=1_0", "shard= 1"),
    *("shard=1&shard=2", "shard=2147483648", "shard=" + "9" * 9000, "shard=%D9%A1", "shard=0x1"),
    *("shard=1%00", "shard=%ff", "a=b&shard=c", "shard=1&shard="),
]


@pytest.mark.parametrize("query", BAD_SHARDS)
def test_a_bad_shard_is_refused_at_once(stalling: Server, query: str) -> None:
    answer = stalling.connect(request("GET", f"/?{query.replace(' ', '%20')}")).answer()
    assert answer.status == 400
    assert answer.headers["content-type"] == "application/problem+json"
    problem = json.loads(answer.body)
    assert problem["status"] == 400
    assert problem["title"] == "Bad Request"
    assert "shard" in problem["detail"]


@pytest.mark.parametrize("host", ["", "no host", "..", "a" * 5000, "[::1", "\xff", "a@b"])
def test_any_host_is_accepted(server: Server, host: str) -> None:
    for path in ("/", "/healthz"):
        sent = f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode("latin-1")
        assert server.connect(sent).answer().status == 200


def test_a_shard_that_hangs_up_and_asks_again_keeps_its_place() -> None:
    with serving(WINDOW_SECONDS=0.5) as server:
        clients = []
        for shard in range(4):
            clients.append(server.ask(shard))
            server.settle()
        clients[1].hang_up()
        eventually(lambda: server.status()["abandoned"] == 1)
        (lane,) = server.status()["lanes"]
        assert [t["state"] for t in lane["tickets"]] == ["waiting", "away", "waiting", "waiting"]
        assert lane["tickets"][1]["eta"] is None
        clients[1] = server.ask(1)
        order = [number for number, _ in first_answers(clients, 4)]
        assert order == [0, 1, 2, 3]


def test_healthz(stalling: Server) -> None:
    for method in ("GET", "HEAD"):
        for target in ("/healthz", "http://queue/healthz", "http://[/healthz", "/healthz?x"):
            assert (
                stalling.connect(request(method, target)).answer(body=method == "GET").status == 200
            )


@pytest.mark.parametrize("method", ["POST", "DELETE", "OPTIONS", "BREW"])
def test_a_wrong_method_on_an_endpoint_is_refused(stalling: Server, method: str) -> None:
    answer = stalling.connect(request(method, "/healthz", "Content-Length: 0")).answer()
    assert answer.status == 405
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["allow"] == "GET, HEAD"
    assert json.loads(answer.body)["status"] == 405


@pytest.mark.parametrize(
    "sent",
    [
        request("GET", "/", "Transfer-Encoding: gzip"),
        request("GET", "/", "Transfer-Encoding: gzip, chunked"),
        request("POST", "/", "Transfer-Encoding: chunked", body=b"nonsense\r\n"),
        request("GET", "/", "Upgrade: h2c", "Connection: Upgrade", "HTTP2-Settings: A"),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(100),
        request() * 5000,
    ],
)
def test_a_request_that_cannot_be_served_is_closed_without_an_answer(
    stalling: Server, sent: bytes
) -> None:
    assert b"HTTP/1.1 " not in stalling.connect(sent).rest().replace(b"HTTP/1.1 101", b"")


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
def test_bytes_that_are_no_request_are_refused(stalling: Server, sent: bytes) -> None:
    assert stalling.connect(sent).answer().status == 400


LEAVERS = [
    request(),
    request("POST", "/", "Content-Length: 1000", body=b"half of it"),
    request("CONNECT", "queue:80"),
    request("GET", "/", "Upgrade: websocket", "Connection: Upgrade"),
    request() + request(),
    request() + b"\r\n",
]


@pytest.mark.parametrize("sent", LEAVERS)
def test_a_hang_up_is_noticed_whatever_was_sent(sent: bytes) -> None:
    """The second client gets the first window, because the first one has left."""
    window = 1.0
    with serving(WINDOW_SECONDS=window) as server:
        leaver = server.connect(sent)
        server.settle()
        client = server.connect()
        server.settle()
        leaver.hang_up()
        start = time.monotonic()
        assert_go(client)
        assert time.monotonic() - start < 1.5 * window
