"""HTTP/2: by prior knowledge, by upgrade and over TLS; each stream is a ticket of its own."""

from __future__ import annotations

import selectors
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import h2.config
import h2.connection
import h2.events
import pytest
import trustme

from tests.harness import (
    GO,
    IDLE_SECONDS,
    PATIENCE,
    SLACK,
    Server,
    installed,
    kernel_stamp,
    serving,
)

GET = [(":method", "GET"), (":scheme", "http"), (":authority", "queue"), (":path", "/")]


CHUNK = bytes(16_384)
GIGABYTE = 2**30


class H2Client:
    """One HTTP/2 connection."""

    def __init__(self, sock: socket.socket, connection: h2.connection.H2Connection) -> None:
        self.socket = sock
        self.connection = connection
        self.answers: dict[int, bytes] = {}
        self.ended: list[int] = []
        self.statuses: dict[int, str] = {}
        self.resets: list[int] = []

    @classmethod
    def with_prior_knowledge(cls, sock: socket.socket) -> Self:
        client = cls(sock, h2.connection.H2Connection(h2.config.H2Configuration()))
        client.connection.initiate_connection()
        client.flush()
        return client

    def flush(self) -> None:
        self.socket.sendall(self.connection.data_to_send())

    def ask(self, headers: list[tuple[str, str]] = GET, *, end: bool = True) -> int:
        stream = self.connection.get_next_available_stream_id()
        self.connection.send_headers(stream, headers, end_stream=end)
        self.flush()
        return stream

    def send_data(self, stream: int) -> None:
        """Send a chunk, as soon as the server gives credit for it."""
        while self.connection.local_flow_control_window(stream) < len(CHUNK):
            self.read()
        self.connection.send_data(stream, CHUNK)
        self.flush()

    def read(self) -> None:
        received = self.socket.recv(65536)
        assert received, "closed"
        self.take(received)

    def take(self, received: bytes) -> list[h2.events.Event]:
        events = self.connection.receive_data(received)
        for event in events:
            match event:
                case h2.events.ResponseReceived():
                    self.statuses[event.stream_id] = dict(event.headers)[b":status"].decode()
                case h2.events.DataReceived():
                    self.answers[event.stream_id] = (
                        self.answers.get(event.stream_id, b"") + event.data
                    )
                case h2.events.StreamEnded():
                    self.ended.append(event.stream_id)
                case h2.events.StreamReset():
                    self.resets.append(event.stream_id)
        self.flush()
        return events

    def read_until_ended(self, *streams: int) -> None:
        while not set(streams) <= set(self.ended):
            self.read()

    def assert_go(self, *streams: int) -> None:
        self.read_until_ended(*streams)
        assert {self.statuses[stream] for stream in streams} == {"200"}
        assert {self.answers[stream] for stream in streams} == {GO}


class StampedClient(H2Client):
    """Notes when each response ended, at the earliest and at the latest.

    A read may hold several responses, and the kernel's stamp is that of its last byte. So the
    stamp is exact for a response at the end of a read. Any other one came after the former read.
    """

    def __init__(self, sock: socket.socket, connection: h2.connection.H2Connection) -> None:
        super().__init__(sock, connection)
        self.ended_at: dict[int, tuple[float, float]] = {}
        self._last_read = time.time()

    def read(self) -> None:
        received, ancillary, *_ = self.socket.recvmsg(65536, 128)
        assert received, "closed"
        stamp = kernel_stamp(ancillary)
        events = self.take(received)
        for event in events:
            if isinstance(event, h2.events.StreamEnded):
                earliest = stamp if event is events[-1] else self._last_read
                self.ended_at[event.stream_id] = (earliest, stamp)
        self._last_read = stamp


def connect(server: Server) -> socket.socket:
    return server.connect(b"").socket


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(WINDOW_SECONDS=0.005, HOLD_ON_START="false") as running:
        yield running
        assert not [line for line in running.lines if "Traceback" in line or "error" in line]


def test_900_streams_stall_on_one_connection(server: Server) -> None:
    client = H2Client.with_prior_knowledge(connect(server))
    client.read()  # its settings contain the maximum
    streams = [client.ask() for _ in range(900)]
    client.assert_go(*streams)
    assert client.ended == streams


def test_no_release_is_early_when_many_keys_share_connections() -> None:
    window, keys, rounds = 0.5, 64, 8
    with serving(WINDOW_SECONDS=window, MAX_CONCURRENCY=keys) as server:
        clients = [StampedClient.with_prior_knowledge(connect(server)) for _ in range(4)]
        tickets = list[tuple[StampedClient, int]]()
        for shard in range(keys * rounds):
            client = clients[(shard + shard // keys) % len(clients)]
            tickets.append((client, client.ask([*GET[:3], (":path", f"/?shard={shard}")])))
        with selectors.DefaultSelector() as selector:
            for client in clients:
                selector.register(client.socket, selectors.EVENT_READ, client)
            while sum(len(client.ended_at) for client in clients) < len(tickets):
                ready = selector.select(PATIENCE)
                assert ready, "no answer came"
                for key, _ in ready:
                    key.data.read()

    times = [client.ended_at[stream] for client, stream in tickets]
    gaps = [
        latest - earliest
        for (earliest, _), (_, latest) in zip(times[:-keys], times[keys:], strict=True)
    ]
    assert min(gaps) >= window - SLACK


def test_an_upgrade(server: Server) -> None:
    sock = connect(server)
    connection = h2.connection.H2Connection(h2.config.H2Configuration())
    settings = connection.initiate_upgrade_connection()
    assert settings is not None
    sock.sendall(
        b"GET / HTTP/1.1\r\nHost: queue\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        b"HTTP2-Settings: " + settings + b"\r\n\r\n"
    )
    received = b""
    while b"\r\n\r\n" not in received:
        received += sock.recv(65536)
    head, _, rest = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101 ")
    client = H2Client(sock, connection)
    client.flush()
    client.take(rest)
    client.assert_go(1, *(client.ask() for _ in range(300)))


@pytest.mark.parametrize("method", ["POST", "BREW", "HEAD", "CONNECT", "OPTIONS"])
def test_any_method_is_a_ticket(server: Server, method: str) -> None:
    client = H2Client.with_prior_knowledge(connect(server))
    headers = [(":method", method), *GET[1:]]
    if method == "CONNECT":
        headers = [(":method", method), (":authority", "queue:80")]
    stream = client.ask(headers)
    client.read_until_ended(stream)
    assert client.statuses[stream] == "200"
    assert client.answers.get(stream, b"") == (b"" if method == "HEAD" else GO)


def test_an_upload_that_outlasts_its_answer_disturbs_no_other_client(server: Server) -> None:
    client = H2Client.with_prior_knowledge(connect(server))
    client.read()
    uploads = [client.ask([(":method", "POST"), *GET[1:]], end=False) for _ in range(3)]
    client.read_until_ended(*uploads)
    for stream in uploads:
        for _ in range(3):
            client.send_data(stream)
        client.connection.end_stream(stream)
        client.flush()
    client.assert_go(*uploads, client.ask())


@pytest.mark.timeout(400)
def test_gigabytes_leave_no_trace_in_memory() -> None:
    with serving(WINDOW_SECONDS=3600) as server:
        client = H2Client.with_prior_knowledge(connect(server))
        client.read()
        stream = client.ask([(":method", "POST"), *GET[1:]], end=False)
        before = server.peak_memory()
        for _ in range(GIGABYTE // len(CHUNK)):
            client.send_data(stream)
        assert server.peak_memory() - before < 8 * 2**20


def test_a_reset_stream_is_a_hang_up_of_that_ticket_alone() -> None:
    window = 1.0
    with serving(WINDOW_SECONDS=window) as server:
        client = H2Client.with_prior_knowledge(connect(server))
        first, second = client.ask(), client.ask()
        server.settle()
        client.connection.reset_stream(first)
        client.flush()
        start = time.monotonic()
        client.assert_go(second)
        assert time.monotonic() - start < 1.5 * window


@pytest.mark.parametrize(
    "headers",
    [
        [(b":method", b"GET"), (b":scheme", b"http"), (b":authority", b"q"), (b":path", b"/\xff")],
        [(b":method", b"\xff"), (b":scheme", b"http"), (b":authority", b"q"), (b":path", b"/")],
        [(b":method", b"GET"), (b":scheme", b"http"), (b":authority", b"q")],
        [
            (b":method", b"GET"),
            (b":scheme", b"http"),
            (b":authority", b"q"),
            (b":path", b"/"),
            (b"", b"x"),
        ],
    ],
)
def test_broken_headers_get_no_response_and_disturb_no_other_connection(
    headers: list[tuple[bytes, bytes]],
) -> None:
    with serving(WINDOW_SECONDS=0.005, HOLD_ON_START="false") as server:
        sock = connect(server)
        config = h2.config.H2Configuration(
            validate_outbound_headers=False, normalize_outbound_headers=False
        )
        client = H2Client(sock, h2.connection.H2Connection(config))
        client.connection.initiate_connection()
        client.connection.send_headers(1, headers, end_stream=True)
        client.flush()
        sock.settimeout(IDLE_SECONDS - 1)  # only the headers can be the reason of the end
        has_ended = False
        while not has_ended:
            received = sock.recv(65536)
            events = client.connection.receive_data(received)
            assert not any(isinstance(event, h2.events.ResponseReceived) for event in events)
            has_ended = not received or any(
                isinstance(event, h2.events.StreamReset) for event in events
            )
        server.settle()


@pytest.mark.parametrize("is_hypercorns", [False, True])
def test_tls(is_hypercorns: bool, tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    certificate.private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    tls = ssl.create_default_context()
    authority.configure_trust(tls)
    pem = str(tmp_path / "server.pem")
    options = ("--certfile", pem, "--keyfile", pem, "gateway_queue:app")
    hypercorn = (installed("hypercorn"), "-c", "python:gateway_queue.server", *options)
    started = (
        serving(*hypercorn, WINDOW_SECONDS=0.01)
        if is_hypercorns
        else serving(TLS_CERT_FILE=pem, TLS_KEY_FILE=pem, WINDOW_SECONDS=0.01)
    )
    with started as server:
        for protocol in ("h2", "http/1.1"):
            tls.set_alpn_protocols([protocol])
            sock = tls.wrap_socket(connect(server), server_hostname="localhost")
            sock.settimeout(PATIENCE)
            assert sock.selected_alpn_protocol() == protocol
            if protocol == "h2":
                client = H2Client.with_prior_knowledge(sock)
                client.assert_go(client.ask())
            else:
                sock.sendall(b"GET / HTTP/1.1\r\nHost: queue\r\n\r\n")
                received = b""
                while GO not in received:
                    received += sock.recv(65536)
                assert received.startswith(b"HTTP/1.1 200 ")
            sock.close()
