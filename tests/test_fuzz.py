"""Requests of all kinds, valid and not: never a 5xx, never a fault in the log."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.harness import Client, Server, serving

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


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(WINDOW_SECONDS=0.0005, HOLD_ON_START="false") as running:
        yield running
        running.settle()
        assert not [line for line in running.lines if "[error" in line or "Traceback" in line]


@given(methods, targets, versions, headers, bodies)
@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_request_gets_a_5xx(
    server: Server, method: str, target: str, version: str, headers: list[str], body: bytes
) -> None:
    head = f"{method} {target} HTTP/{version}\r\nHost: q\r\n{''.join(headers)}\r\n"
    client = Client(server.port, head.encode("latin-1") + body)
    client.socket.settimeout(0.1)  # some of them are only the beginning of a request
    try:
        received = client.socket.recv(65536)
    except (TimeoutError, ConnectionResetError):
        received = b""
    client.hang_up()
    if received.startswith(b"HTTP/1.1 "):
        assert received[9:12] in {b"200", b"400", b"405", b"100", b"101"}
