"""An attacking client delays no release of others, and uses little memory."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress

import h2.config
import h2.connection
import h2.errors
import h2.events
import pytest

from tests.attack import ATTACKS, PREFACE, get, headers, literal, measure, requests, wire
from tests.harness import (
    GO,
    PATIENCE,
    REQUEST,
    Server,
    asking,
    environ,
    eventually,
    installed,
    serving,
    with_open_files,
)
from tests.test_http2 import GET, H2Client

FLOODS = [
    "h2 WINDOW_UPDATE of the connection",
    "h2 WINDOW_UPDATE of a stream",
    "h2 INITIAL_WINDOW_SIZE",
    "h2 SETTINGS",
    "h2 PING",
    "h2 PRIORITY of one stream",
    "h2 empty DATA",
    "h2 DATA of a byte",
    "h2 unknown frames",
    "h2 CONTINUATION of 16 kB",
    "h2 requests, reset",
]

LATE_MAX = 0.2
"""Seconds that a release may be late, without the time for which other processes had the CPU.
Before frames were counted, these attacks made releases 1 to 20 s late."""

ENDED_SECONDS = 2.5
"""The server ends a refused upload, or a stream without credit, within 2 s; 0.5 s is for a busy
machine."""

CONNECTION_MAX = 64_000
"""Bytes that a connection without a ticket may cost."""

SECRET = "cGFzc3dvcmQ"


def h2_client(server: Server) -> H2Client:
    return H2Client.with_prior_knowledge(server.connect(b"").socket)


def path(text: str) -> list[tuple[str, str]]:
    return [*GET[:-1], (":path", text)]


@pytest.mark.parametrize(
    "name",
    [
        "h2 WINDOW_UPDATE, window 0",
        "h2 INITIAL_WINDOW_SIZE",
        "h2 PING, 50 connections",
        "26,000 headers",
        "pipelined /healthz, 50 connections",
        "chunks of a byte, 50 connections",
        "h2 400 with unfinished bodies",
    ],
)
def test_an_attack_delays_no_release(name: str) -> None:
    assert measure(ATTACKS[name], 3.0).worst_with_cpu < LATE_MAX


@pytest.mark.parametrize(
    "name", ["unfinished heads of 126 kB", "pipelined /healthz, 50 connections"]
)
def test_closed_connections_take_no_memory(name: str) -> None:
    attack = ATTACKS[name]
    outcome = measure(attack, 3.0)
    assert outcome.closed > attack.connections
    assert outcome.memory < attack.connections * CONNECTION_MAX


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_of_frames_ends_its_connection(name: str) -> None:
    attack = ATTACKS[name]
    with serving(WINDOW_SECONDS=3600) as server:
        codes: list[int] = []
        # While other frames are on their way, the kernel may drop the last one: it resets a
        # connection that is closed with unread input.
        for _ in range(20):
            client = server.connect(attack.opening)
            with suppress(ConnectionError):
                for _ in range(10):
                    client.socket.sendall(attack.flood)
            goaways = (frame for kind, frame in frames(client.rest()) if kind == 7)
            if codes := [int.from_bytes(frame[4:8]) for frame in goaways]:
                break
        assert codes == [h2.errors.ErrorCodes.ENHANCE_YOUR_CALM]


def frames(received: bytes) -> list[tuple[int, bytes]]:
    """Return the kinds and the payloads of whole frames."""
    found = []
    while len(received) >= 9:
        size = int.from_bytes(received[:3])
        found.append((received[3], received[9 : 9 + size]))
        received = received[9 + size :]
    return found


def test_900_requests_that_end_and_start_again_are_no_flood() -> None:
    with serving(WINDOW_SECONDS=3600) as server:
        client = h2_client(server)
        for _ in range(2):
            streams = [client.ask() for _ in range(900)]
            eventually(lambda: server.status()["waiting"] == 900)
            for stream in streams:
                client.connection.reset_stream(stream)
            client.flush()
            eventually(lambda: server.status()["waiting"] == 0)
        client.ask()
        eventually(lambda: server.status()["waiting"] == 1)


@pytest.mark.parametrize("header", [":path", ":method"])
def test_a_malformed_request_resets_only_its_stream(header: str) -> None:
    with serving(WINDOW_SECONDS=0.5) as server:
        client = h2_client(server)
        good = client.ask()
        client.connection.config.header_encoding = None
        bad = client.ask([(name, "/\xe9" if name == header else value) for name, value in GET])
        client.assert_go(good)
        assert client.resets == [bad]
        assert not [line for line in server.lines if "error" in line]


def test_a_client_that_sends_goaway_gets_its_answers() -> None:
    with serving(WINDOW_SECONDS=0.5) as server:
        client = h2_client(server)
        streams = [client.ask() for _ in range(2)]
        client.socket.sendall(bytes.fromhex("000008070000000000" + "00000000" + "00000000"))
        client.assert_go(*streams)


def test_an_upgrade_behind_a_ticket_is_a_ticket_and_its_headers_are_not_logged() -> None:
    with serving(WINDOW_SECONDS=0.5, AUTH_TOKEN=SECRET) as server:
        head = f"GET / HTTP/1.1\r\nHost: queue\r\nAuthorization: Bearer {SECRET}\r\n"
        upgrade = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAA\r\n"
        client = server.connect(f"{head}\r\n{head}{upgrade}\r\n".encode())
        assert client.answer().body == GO
        assert client.answer().body == GO
        assert SECRET not in "\n".join(server.lines)


def test_hypercorns_command_answers_1100_requests_on_one_connection() -> None:
    """With its default settings, Hypercorn allows 100 streams at a time."""
    command = (installed("hypercorn"), "--worker-class", "trio", "--bind", "127.0.0.1:0")
    with serving(*command, "gateway_queue:app", MAX_CONCURRENCY=0) as server:
        client = h2_client(server)
        for _ in range(11):
            client.assert_go(*(client.ask() for _ in range(100)))


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_an_unread_log_does_not_stop_releases(stop: signal.Signals) -> None:
    """The log fills a pipe, which has room for 64 kB."""
    read_end, write_end = os.pipe()
    port_file = socket.create_server(("127.0.0.1", 0))
    port = port_file.getsockname()[1]
    port_file.close()
    variables = {"PORT": port, "WINDOW_SECONDS": 0.0001, "MARGIN_SECONDS": 0, "LOOP_FREE_STARTS": 0}
    process = subprocess.Popen(
        [installed("gateway-queue")], env=environ(**variables), stderr=write_end, text=True
    )
    server = Server(process, port)
    try:
        eventually(lambda: _listens(port))
        client = server.connect(b"")
        for shard in range(1000):
            client.socket.sendall(asking(shard))
            assert client.answer().body == GO
        os.read(read_end, 2**20)
        client.socket.sendall(asking(0))
        assert client.answer().body == GO
        log = b""
        while b"lines of the log are lost" not in log:  # the line on its way comes first
            log += os.read(read_end, 2**20)
        process.send_signal(stop)
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()
        client.hang_up()
        os.close(read_end)
        os.close(write_end)


def _listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


@pytest.fixture(scope="module", name="stalling")
def stalling_server() -> Iterator[Server]:
    with serving(WINDOW_SECONDS=3600) as running:
        yield running
        assert not [line for line in running.lines if "Traceback" in line or "error" in line]


def test_more_than_100_headers_are_refused(stalling: Server) -> None:
    lines = b"".join(b"X-%d: %d\r\n" % (number, number) for number in range(100))
    assert stalling.connect(REQUEST[:-2] + lines + b"\r\n").answer().status == 431
    client = h2_client(stalling)
    refused = client.ask([*GET, *((f"x-{number}", "") for number in range(100))], end=False)
    client.read_until_ended(refused)
    assert client.statuses[refused] == "431"


def test_a_head_over_32_kib_is_refused(stalling: Server) -> None:
    head = REQUEST[:-2] + b"X: " + b"a" * 33_000
    assert stalling.connect(head).answer().status == 431


def test_a_refused_upload_ends_within_2_seconds(stalling: Server) -> None:
    upload = b"POST /?shard=x HTTP/1.1\r\nHost: queue\r\nContent-Length: 9\r\n\r\n"
    started = time.monotonic()
    client = stalling.connect(upload)
    assert client.answer().status == 400
    assert client.rest() == b""
    assert time.monotonic() - started < ENDED_SECONDS
    h2_upload = h2_client(stalling)
    refused = h2_upload.ask(path("/?shard=x"), end=False)
    while refused not in h2_upload.resets:
        h2_upload.read()
    assert h2_upload.statuses[refused] == "400"


@pytest.mark.parametrize("digits", [101, 5000])
def test_a_shard_of_many_digits_is_refused(stalling: Server, digits: int) -> None:
    request = asking(0).replace(b"=0", b"=" + b"0" * digits)
    assert stalling.connect(request).answer().status == 400


def test_over_100_parameters_are_refused(stalling: Server) -> None:
    request = asking(0).replace(b"?", b"?" + b"a&" * 100)
    assert stalling.connect(request).answer().status == 400


def test_a_half_closed_client_gets_the_answer_of_an_endpoint(stalling: Server) -> None:
    for endpoint in (b"/healthz", b"/status", b"/dashboard", b"/?shard=x"):
        client = stalling.connect(b"")
        client.socket.sendall(REQUEST.replace(b"/ ", endpoint + b" ", 1))
        client.socket.shutdown(socket.SHUT_WR)
        assert b"HTTP/1.1 " in client.rest()


def test_a_half_closed_client_has_no_ticket(stalling: Server) -> None:
    client = stalling.connect()
    client.socket.shutdown(socket.SHUT_WR)
    assert client.rest() == b""


def test_a_request_with_two_lengths_is_the_last_on_its_connection() -> None:
    with serving(MAX_CONCURRENCY=0) as server:
        client = server.connect(
            b"POST / HTTP/1.1\r\nHost: queue\r\nContent-Length: 5\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
        )
        answer = client.answer()
        assert answer.body == GO
        assert answer.headers["connection"] == "close"
        assert client.rest() == b""


def test_a_stream_without_flow_control_credit_is_reset_within_2_seconds() -> None:
    with serving(WINDOW_SECONDS=0.2) as server:
        settings = bytes.fromhex("000006040000000000" + "000400000000")
        client = server.connect(PREFACE[:24] + settings + requests(1)[len(PREFACE) :])
        started = time.monotonic()
        seen: list[tuple[int, bytes]] = []
        while not any(kind == 3 for kind, _ in seen):
            client.received += client.socket.recv(65_536)
            seen = frames(client.received)
        assert time.monotonic() - started < ENDED_SECONDS
        assert not any(kind == 0 for kind, _ in seen)


def test_no_more_tickets_than_max_waiting() -> None:
    with serving(WINDOW_SECONDS=3600, MAX_WAITING=3) as server:
        waiting = [server.connect() for _ in range(3)]
        server.settle()
        for _ in range(3):
            assert server.connect().rest() == b""
        waiting[0].hang_up()
        eventually(lambda: server.status()["waiting"] == 2)
        server.connect()
        eventually(lambda: server.status()["waiting"] == 3)
        assert server.get("/healthz").status == 200
        assert len([line for line in server.lines if "MAX_WAITING" in line]) == 1


@pytest.mark.parametrize("request_of_attackers", [b"", b"G", REQUEST])
def test_health_checks_are_answered_when_descriptors_run_low(request_of_attackers: bytes) -> None:
    with serving(*with_open_files(256, 256), WINDOW_SECONDS=3600) as server:
        for _ in range(300):
            server.connect(request_of_attackers)
        assert server.get("/healthz").status == 200
        assert server.connect(REQUEST.replace(b"/", b"/healthz", 1)).answer().status == 200


@pytest.mark.parametrize(
    "sent",
    [
        REQUEST[:-2] + b"X: " + b"a" * 32_000,
        REQUEST[:-2] + b"a:\r\n" * 98,
        PREFACE,
        PREFACE + wire(headers(1, get() + literal(b"a" * 100, b"b" * 100) * 45, end_headers=False)),
        PREFACE + b"\x00\x40\x00" + b"\x00" * 6 + bytes(16_000),
    ],
)
def test_memory_of_a_connection_without_a_ticket(sent: bytes) -> None:
    count = 400
    with serving(WINDOW_SECONDS=3600) as server:
        server.connect(REQUEST[:-2])
        server.settle()
        before = server.peak_memory()
        clients = [server.connect(sent) for _ in range(count)]
        server.settle()
        assert server.peak_memory() - before < count * CONNECTION_MAX
        assert clients


@pytest.mark.parametrize("endpoint", ["/status", "/dashboard", "/events"])
def test_a_page_of_another_site_cannot_read_a_local_server(endpoint: str) -> None:
    def status(server: Server, host: str) -> int:
        head = f"HEAD {endpoint} HTTP/1.1\r\nHost: {host}\r\n\r\n"
        return server.connect(head.encode()).answer(body=False).status

    with serving() as server:
        for host in ("localhost:5000", "127.0.0.1", "[::1]:80", "queue", "a.localhost", ""):
            assert status(server, host) == 200
        for host in ("evil.example", "127.0.0.1.evil.example:5000"):
            assert status(server, host) == 421
        assert json.loads(server.get("/healthz").body) == {"status": "ok"}
