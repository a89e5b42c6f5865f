"""Confirmed tickets, on the wire: the window starts when the client closes its response."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from itertools import pairwise

import pytest

from tests.harness import (
    GO,
    PATIENCE,
    SLACK,
    Client,
    Server,
    arrival,
    eventually,
    free_port,
    metric,
    serving,
)
from tests.redis_server import redis_server
from tests.test_http2 import H2Client

WINDOW = 1.0
MARGIN = 0.5
CONFIRM = 2.0


def asking(shard: int, version: str = "1.1", method: str = "GET") -> bytes:
    """Return a request for a confirmed ticket."""
    return b"%s /?shard=%d&confirm=true HTTP/%s\r\nHost: queue\r\n\r\n" % (
        method.encode(),
        shard,
        version.encode(),
    )


def head_and_message(client: Client, message: bytes = GO) -> tuple[bytes, float]:
    """Wait for the head and the message of an unfinished response, and return when they came."""
    at = time.monotonic()
    while not (b"\r\n\r\n" in client.received and message in client.received):
        received, ancillary, *_ = client.socket.recvmsg(65536, 128)
        assert received, f"closed after {client.received!r}"
        client.received += received
        at = arrival(ancillary)
    return client.received, at


def test_without_windows_a_confirmed_ticket_counts_once() -> None:
    with serving(MAX_CONCURRENCY=0, CONFIRM_SECONDS=CONFIRM) as server:
        confirmed, expired = server.connect(asking(0)), server.connect(asking(1))
        head_and_message(confirmed)
        head_and_message(expired)
        assert server.status()["released"] == 2
        confirmed.hang_up()
        while expired.socket.recv(65536):
            pass  # until the server ends the response
        assert server.status()["released"] == 2


@pytest.fixture(params=["memory", "redis"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    settings: dict[str, object] = {
        "WINDOW_SECONDS": WINDOW,
        "MARGIN_SECONDS": MARGIN,
        "CONFIRM_SECONDS": CONFIRM,
        "HOLD_ON_START": "false",
    }
    if request.param == "memory":
        with serving(**settings) as server:
            yield server
        return
    with redis_server() as redis, serving(REDIS_URL=redis.url, **settings) as server:
        eventually(lambda: server.get("/readyz").status == 200)
        yield server


def test_the_response_stays_open_with_the_message_in_it(server: Server) -> None:
    client = server.connect(asking(0))
    answer, _ = head_and_message(client)
    head, _, body = answer.partition(b"\r\n\r\n")
    names = [line.partition(b":")[0].lower() for line in head.split(b"\r\n")[1:]]
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"content-length" not in names
    assert b"transfer-encoding: chunked" in head.lower()
    assert b"content-type: application/json" in head.lower()
    assert body == b"%x\r\n%s\r\n" % (len(GO), GO)
    client.socket.settimeout(0.2)
    with pytest.raises(TimeoutError):
        client.socket.recv(1)


@pytest.mark.parametrize("identify_seconds", [0.0, 0.4, 1.6])
def test_the_next_release_comes_a_window_after_the_confirmation(
    server: Server, identify_seconds: float
) -> None:
    first, second = server.connect(asking(0)), server.connect(asking(1))
    _, answered_at = head_and_message(first)
    time.sleep(max(0.0, answered_at + identify_seconds - time.monotonic()))
    confirmed_at = time.monotonic()
    first.hang_up()
    _, next_at = head_and_message(second)
    assert WINDOW - SLACK <= next_at - confirmed_at < WINDOW + MARGIN


def test_without_a_confirmation_the_server_ends_the_response(server: Server) -> None:
    first, second = server.connect(asking(0)), server.connect(asking(1))
    _, answered_at = head_and_message(first)
    _, ended_at = head_and_message(first, b"\r\n0\r\n\r\n")
    assert ended_at - answered_at >= CONFIRM - SLACK
    _, next_at = head_and_message(second)
    gap = next_at - answered_at
    assert CONFIRM + WINDOW + MARGIN - SLACK <= gap < CONFIRM + WINDOW + 2 * MARGIN
    second.hang_up()
    eventually(lambda: b"gateway_queue_unconfirmed_total 1.0" in server.get("/metrics").body)
    eventually(lambda: b"gateway_queue_identify_seconds_count 1.0" in server.get("/metrics").body)


def test_a_ticket_that_is_not_confirmed_has_the_margin_after_its_answer(server: Server) -> None:
    first, second = server.ask(0), server.ask(1)
    gap = -first.answer().at + second.answer().at
    assert WINDOW + MARGIN - SLACK <= gap < WINDOW + 2 * MARGIN


def test_etas_include_the_usual_time_to_identify(server: Server) -> None:
    first = server.connect(asking(0))
    head_and_message(first)
    others = [server.connect(asking(shard)) for shard in (1, 2, 3)]
    eventually(lambda: server.status()["waiting"] == len(others))
    first.hang_up()
    eventually(lambda: b"gateway_queue_identify_seconds_count 1.0" in server.get("/metrics").body)
    identify_seconds = metric(server, "gateway_queue_identify_seconds_sum")
    (lane,) = server.status()["lanes"]
    etas = [ticket["eta"] for ticket in lane["tickets"]]
    gaps = [later - earlier for earlier, later in pairwise(etas)]
    assert gaps == pytest.approx([WINDOW + identify_seconds] * 2, abs=0.002)


def test_the_status_shows_which_shard_is_identifying(server: Server) -> None:
    client = server.connect(asking(7))
    head_and_message(client)
    (lane,) = server.status()["lanes"]
    assert lane["identifying"]["shard"] == 7
    assert 0 <= lane["identifying"]["for"] < CONFIRM
    assert lane["tickets"] == []
    client.hang_up()
    eventually(lambda: server.status()["lanes"] == [])
    assert server.status()["released"] == 1
    assert server.status()["abandoned"] == 0


def test_http_1_0_gets_the_message_until_close(server: Server) -> None:
    client = server.connect(asking(0, "1.0"))
    answer, _ = head_and_message(client)
    assert b"chunked" not in answer
    assert answer.endswith(b"\r\n\r\n" + GO)


def test_head_gets_its_head_at_once(server: Server) -> None:
    client = server.connect(asking(0, method="HEAD"))
    answer, _ = head_and_message(client, b"")
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b"\r\n\r\n")


def test_a_reset_stream_confirms_in_http_2(server: Server) -> None:
    headers = [(":method", "GET"), (":scheme", "http"), (":authority", "queue")]
    with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as sock:
        client = H2Client.with_prior_knowledge(sock)
        first, second = (
            client.ask([*headers, (":path", f"/?shard={shard}&confirm=true")]) for shard in (0, 1)
        )
        while client.answers.get(first) != GO:
            client.read()
        assert first not in client.ended
        time.sleep(0.5)
        confirmed_at = time.monotonic()
        client.connection.reset_stream(first)
        client.flush()
        while client.answers.get(second) != GO:
            client.read()
        assert WINDOW - SLACK <= time.monotonic() - confirmed_at < WINDOW + MARGIN


@pytest.mark.parametrize(
    ("query", "why"),
    [
        ("confirm=true", "shard"),
        ("shard=1&confirm=yes", "true or false"),
        ("shard=1&confirm=", "true or false"),
        ("shard=1&confirm=true&confirm=false", "twice"),
    ],
)
def test_a_bad_confirmation_is_refused(server: Server, query: str, why: str) -> None:
    refused = server.get(f"/?{query}")
    assert refused.status == 400
    assert refused.headers["content-type"] == "application/problem+json"
    assert why in refused.body.decode()


@pytest.mark.parametrize("query", ["shard=1&confirm=false", "shard=1&confirm=true&confirm=true"])
def test_confirm_false_and_a_repeated_confirm_are_accepted(server: Server, query: str) -> None:
    client = server.connect(b"GET /?%s HTTP/1.1\r\nHost: queue\r\n\r\n" % query.encode())
    answer, _ = head_and_message(client)
    assert (b"content-length" in answer) == ("false" in query)


def test_a_stop_closes_an_open_response(server: Server) -> None:
    client = server.connect(asking(0))
    head_and_message(client)
    started = time.monotonic()
    server.process.terminate()
    assert server.wait() == 0
    assert time.monotonic() - started < 2
    assert not client.rest().endswith(b"0\r\n\r\n")


def test_a_restart_after_a_stop_opens_no_key_early() -> None:
    """A new process does not know which shard is identifying, so it holds for a window."""
    port = free_port()
    settings: dict[str, object] = {"WINDOW_SECONDS": WINDOW, "MARGIN_SECONDS": MARGIN, "PORT": port}
    with serving(**settings, HOLD_ON_START="false") as server:
        _, answered_at = head_and_message(server.connect(asking(0)))
    with serving(**settings) as server:
        assert server.ask(1).answer().at - answered_at >= WINDOW + MARGIN - SLACK
