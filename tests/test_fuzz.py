"""Requests of all kinds, valid and not: never a 5xx, never a fault in the log."""

from __future__ import annotations

import selectors
import socket
from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.harness import Client, Server, eventually, open_files, serving

TOKEN = st.text("!#$%&'*+-.^_`|~0123456789abcXYZ", min_size=1, max_size=6)
VISIBLE = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=20)

methods = st.sampled_from(["GET", "POST", "HEAD", "CONNECT", "PRI"]) | TOKEN
targets = st.builds(
    str.__add__,
    st.sampled_from(["/", "/?shard=", "http://", "*", "//", "/%", "/healthz", "http://x/healthz?"]),
    VISIBLE,
)
header_names = st.sampled_from(
    [
        "Connection",
        "Content-Length",
        "Expect",
        "Host",
        "HTTP2-Settings",
        "Sec-WebSocket-Key",
        "TE",
        "Trailer",
        "Transfer-Encoding",
        "Upgrade",
    ]
)
header_values = st.sampled_from(
    [
        "",
        "!",
        "-1",
        "0",
        "100-continue",
        "5",
        "5, 5",
        "9" * 20,
        "AAMAAABkAAQAAP__",
        "chunked",
        "close",
        "gzip",
        "h2c",
        "identity",
        "keep-alive",
        "Upgrade, HTTP2-Settings",
        "websocket",
        "ÿ",
    ]
)
headers = st.lists(st.builds("{}: {}\r\n".format, header_names, header_values), max_size=4)
versions = st.sampled_from(["1.1", "1.1", "1.1", "1.0", "2.0", "0.9"])
bodies = st.sampled_from(
    [b"", b"hello", b"5\r\nhello\r\n0\r\n\r\n", b"zz\r\n", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"]
) | st.binary(max_size=40)


requests = st.builds(
    "{} {} HTTP/{}\r\nHost: q\r\n{}\r\n".format, methods, targets, versions, headers.map("".join)
)
EXAMPLES, REQUESTS = 200, 50
"""10,000 requests in all."""
QUIET_SECONDS = 0.02
"""Seconds without an answer until the test goes on: incomplete requests get no answer."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Run a server for all examples, and check that it keeps nothing of them."""
    variables = {"WINDOW_SECONDS": 0.0001, "HOLD_ON_START": "false", "LOOP_FREE_STARTS": 0}
    with serving(**variables, PLACE_SECONDS=0.1) as running:
        yield running
        running.settle()
        assert not [line for line in running.lines if "[error" in line or "Traceback" in line]
        eventually(lambda: not running.status()["lanes"] and open_files(running) <= 20)
        # 20,000 stalled requests need 500 MiB. Garbage that was not collected yet needs less than a
        # third of that.
        assert running.peak_memory() < 200 * 2**20


@given(st.lists(st.tuples(requests, bodies), min_size=REQUESTS, max_size=REQUESTS))
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_request_gets_a_5xx(server: Server, asked: list[tuple[str, bytes]]) -> None:
    clients = [Client(server.port, head.encode("latin-1") + body) for head, body in asked]
    for answer in answers_until_quiet(clients):
        if answer.startswith(b"HTTP/1.1 "):
            assert answer[9:12] in {b"200", b"400", b"405", b"100", b"101"}
    for client in clients:
        client.hang_up()


def answers_until_quiet(clients: list[Client]) -> Iterator[bytes]:
    """Read from each client at most once, and yield what comes."""
    with selectors.DefaultSelector() as selector:
        for client in clients:
            selector.register(client.socket, selectors.EVENT_READ)
        while ready := selector.select(QUIET_SECONDS):
            for key, _ in ready:
                selector.unregister(key.fileobj)
                assert isinstance(key.fileobj, socket.socket)
                with suppress(ConnectionResetError):
                    yield key.fileobj.recv(65536)
