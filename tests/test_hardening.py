"""Malicious and broken clients do not disturb the others."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable

import h2.connection
import h2.errors
import pytest

from tests.harness import (
    GO,
    IDLE_SECONDS,
    REQUEST,
    Client,
    Server,
    allow_10_000_connections,
    eventually,
    open_files,
    serving,
    with_open_files,
)
from tests.test_http2 import H2Client


def assert_serves(server: Server) -> None:
    assert server.connect().answer().body == GO


def wait_until_closed(clients: list[Client], seconds: float) -> None:
    """Wait until the server has closed all connections without an answer."""
    give_up = time.monotonic() + seconds
    for client in clients:
        client.socket.settimeout(max(0.01, give_up - time.monotonic()))
        assert client.rest() == b""


def test_10_000_connections_that_send_nothing_delay_no_release_and_are_closed() -> None:
    allow_10_000_connections()
    window = 0.05
    with serving(WINDOW_SECONDS=window) as server:
        idle = [server.connect(b"") for _ in range(10_000)]
        first = server.connect().answer()
        without_cpu = server.seconds_without_cpu()
        answers = [server.connect().answer() for _ in range(19)]
        without_cpu = server.seconds_without_cpu() - without_cpu
        assert {answer.status for answer in (first, *answers)} == {200}
        # To close the silent connections, which may happen meanwhile, takes 1 s of CPU time.
        assert answers[-1].at - first.at - without_cpu < 19 * window + 2
        wait_until_closed(idle, IDLE_SECONDS + 15)
        assert_serves(server)


def test_heads_that_never_end_are_disconnected() -> None:
    """Over HTTP/1.1, HTTP/2, and before the protocol is known."""
    headers_without_end = b"\x00\x00\x01\x01\x00\x00\x00\x00\x01\x82"
    beginnings = [
        *(b"G", b"GET / HTTP/1.1\r\nHost: q\r\n", b"PRI * HTTP/2.0\r\n\r\n"),
        *(preface_with(b""), preface_with(headers_without_end)),
    ]
    with serving(WINDOW_SECONDS=0.05) as server:
        slow = [server.connect(beginning) for beginning in beginnings for _ in range(20)]
        start = time.monotonic()
        closed = set[Client]()
        while len(closed) < 40 and time.monotonic() < start + IDLE_SECONDS + 5:
            for client in slow[:40]:
                try:
                    client.socket.sendall(b"X")
                except OSError:
                    closed.add(client)
            assert_serves(server)
        assert len(closed) == 40
        for client in slow[40:]:
            assert b"HTTP/1.1" not in client.rest()
        assert_serves(server)


def preface_with(frame: bytes) -> bytes:
    connection = h2.connection.H2Connection()
    connection.initiate_connection()
    return connection.data_to_send() + frame


def test_a_request_with_a_header_line_of_30_kb_is_a_ticket() -> None:
    with serving(WINDOW_SECONDS=0.001) as server:
        line = b"X-Long: " + b"a" * 30_000
        assert_serves(server)
        before = server.peak_memory()
        for _ in range(200):
            client = server.connect(b"GET / HTTP/1.1\r\nHost: q\r\n" + line + b"\r\n\r\n")
            assert client.answer().body == GO
            client.hang_up()
        assert server.peak_memory() - before < 8 * 2**20


def test_garbage_disturbs_no_other_client() -> None:
    with serving(WINDOW_SECONDS=0.001) as server:
        tls = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + os.urandom(500)
        for garbage in [tls, *(os.urandom(size) for size in (1, 100, 10_000, 1_000_000))]:
            for _ in range(20):
                client = server.connect(b"")
                try:
                    client.socket.sendall(garbage)
                    client.socket.shutdown(socket.SHUT_WR)
                except OSError:
                    continue  # closed before it was sent completely
                assert client.rest()[:12] in {b"", b"HTTP/1.1 400", b"HTTP/1.1 431"}
            assert_serves(server)
        assert not [line for line in server.lines if "Traceback" in line or "[error" in line]


def test_a_client_that_never_reads_delays_others_only_briefly() -> None:
    """It requests more answers than the kernel has room for."""
    with serving(WINDOW_SECONDS=0.0005) as server, socket.socket() as unread:
        unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        unread.connect(("127.0.0.1", server.port))
        unread.sendall(REQUEST * 2000)
        waits = [0.0]
        start = time.monotonic()
        while max(waits) < 0.5 and time.monotonic() < start + 10:
            asked_at = time.monotonic()
            client = server.connect()
            waits.append(client.answer().at - asked_at)
            client.hang_up()
        assert 0.5 < max(waits) < 1.2


def test_a_client_without_flow_control_credit_delays_others_only_briefly() -> None:
    """In HTTP/2, a client can forbid the server to send a body."""
    window = 1.0
    with serving(WINDOW_SECONDS=window) as server:
        unread = H2Client.with_prior_knowledge(server.connect(b"").socket)
        unread.connection.update_settings({4: 0})  # SETTINGS_INITIAL_WINDOW_SIZE
        unread.ask()
        server.settle()
        start = time.monotonic()
        assert server.connect().answer().at - start < 2 * window + 1 + 0.5


def test_streams_that_come_and_go_leave_nothing_behind() -> None:
    with serving(WINDOW_SECONDS=3600) as server:
        client = H2Client.with_prior_knowledge(server.connect(b"").socket)

        def come_and_go(times: int) -> None:
            for _ in range(times):
                streams = [client.ask() for _ in range(100)]
                for stream in streams:
                    client.connection.reset_stream(stream, h2.errors.ErrorCodes.CANCEL)
                client.flush()
                server.settle()

        come_and_go(10)
        before = server.peak_memory()
        come_and_go(14)  # with more, the server ends the connection because of a flood
        assert server.peak_memory() - before < 4 * 2**20
        eventually(lambda: server.status()["waiting"] == 0)


def test_descriptors_that_run_out_come_back() -> None:
    """80 clients send a request to a server that may have 64 files open."""
    with serving(*with_open_files(64, 64), WINDOW_SECONDS=0.01) as server:
        waiting = [server.connect() for _ in range(80)]
        while waiting:
            client = waiting.pop()
            try:
                first = client.socket.recv(12)
            except ConnectionResetError:
                first = b""
            if first:
                assert first == b"HTTP/1.1 200"
            else:
                waiting.insert(0, server.connect())
            client.hang_up()
        assert_serves(server)
        complaints = [line for line in server.lines if "too few descriptors" in line]
        assert 1 <= len(complaints) <= 3
        assert not [line for line in server.lines if "Traceback" in line]


@pytest.mark.parametrize("leave", [Client.hang_up, Client.reset])
def test_connections_that_come_and_go_leave_nothing_behind(
    leave: Callable[[Client], None],
) -> None:
    with serving(WINDOW_SECONDS=3600) as server:

        def come_and_go(times: int) -> None:
            for number in range(times):
                clients = [server.ask(number % 1000) for _ in range(10)]
                for client in clients:
                    leave(client)

        come_and_go(40)
        server.settle()
        before = server.peak_memory()
        come_and_go(300)
        server.settle()
        assert server.peak_memory() - before < 6 * 2**20
        eventually(lambda: server.status()["waiting"] == 0)
        assert open_files(server) < 30
