"""``gateway-queue status``: the state of a server in a terminal, and its exit status."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import trustme

from gateway_queue.settings import Settings
from gateway_queue.terminal import duration, own_server
from tests.harness import (
    PATIENCE,
    environ,
    eventually,
    free_port,
    installed,
    serving,
)

COMMAND = (installed("gateway-queue"), "status")


def status(*arguments: object, **variables: object) -> tuple[int, str]:
    """Run the command, and return its exit status and what it prints."""
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        env=environ(**variables),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_server_that_is_ready() -> None:
    with serving(WINDOW_SECONDS=3000, MAX_CONCURRENCY=2, SESSION_START_LIMIT=3) as server:
        for shard in (1, 3, 5, 4):
            server.ask(shard)
        eventually(lambda: server.status()["waiting"] == 4)
        exit_status, text = status(PORT=server.port)
    first, *lines = text.splitlines()
    assert (exit_status, first) == (0, "Ready")
    assert "window 3000 s, keys 2, store memory" in lines[0]
    assert "4 waiting (0 of them held), 0 away, 0 released" in lines[1]
    assert "3 of 3 left today" in lines[2]
    assert "enough for 3 of 4 waiting, the others after " in lines[2]
    assert [line.split()[:2] for line in lines[-2:]] == [["0", "1"], ["1", "3"]]


def test_a_server_that_is_not_ready() -> None:
    with serving(REDIS_URL=f"redis://127.0.0.1:{free_port()}") as server:
        eventually(lambda: "Unable" in (server.status()["reason"] or ""))
        exit_status, text = status(PORT=server.port)
    assert exit_status == 1
    assert text.startswith("Not ready: Redis cannot be used: ")
    (fault,) = [line for line in text.splitlines() if line.startswith("  store ")]
    assert "next try in" in fault


def test_no_server() -> None:
    port = free_port()
    exit_status, text = status(PORT=port)
    assert exit_status == 1
    assert text.startswith(f"Not ready: no answer from http://127.0.0.1:{port}: ")


@pytest.mark.parametrize(
    "arguments", [("x",), ("-1",), ("1", "2"), ("--url", "localhost:5000"), ("--url", "ftp://h")]
)
def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    exit_status, text = status(*arguments)
    assert exit_status == 2
    assert text.startswith("usage: ")


def test_a_bad_setting_is_wrong_usage() -> None:
    assert status(PORT="http")[0] == 2


def test_a_spent_budget() -> None:
    with serving(SESSION_START_LIMIT=1, HOLD_ON_START="false") as server:
        server.ask(1).answer()
        server.settle()
        exit_status, text = status(PORT=server.port)
    assert exit_status == 0
    assert text.startswith("Ready, but no session start is left today: shards wait until ")


def test_several_bots(tmp_path: Path) -> None:
    (tmp_path / "bots.toml").write_text('[music]\n["customer.42"]\nmax_concurrency = 4\n')
    usual = {"WINDOW_SECONDS": 3000, "REDIS_URL": f"redis://127.0.0.1:{free_port()}"}
    with serving(BOTS_FILE=tmp_path / "bots.toml", WINDOW_SECONDS=3000) as server:
        server.connect(b"GET /?bot=music&shard=7 HTTP/1.1\r\nHost: q\r\n\r\n")
        eventually(lambda: server.get("/status?bot=music").body.count(b'"position"') == 1)
        _, text = status(PORT=server.port)
        of_bot = status("--bot", "music", PORT=server.port)
        of_shard = status("--bot", "music", 7, PORT=server.port)
        unknown = status("--bot", "nobody", PORT=server.port)
    bots = [line.split() for line in text.splitlines()[-4:]]
    assert bots[0] == ["bot", "waiting", "next", "state"]
    assert [(bot[0], bot[1], bot[-1]) for bot in bots[1:]] == [
        ("default", "0", "ready"),
        ("music", "1", "ready"),
        ("customer.42", "0", "ready"),
    ]
    assert of_bot[0] == 0
    assert "1 waiting (0 of them held)" in of_bot[1]
    assert "customer" not in of_bot[1]
    assert "Shard 7 (key 0) waits at place 1 (1 waiting)" in of_shard[1]
    assert unknown[0] == 1
    assert "bot must be the name of one bot of this server" in unknown[1]
    with serving(BOTS_FILE=tmp_path / "bots.toml", **usual) as server:
        exit_status, text = status(PORT=server.port)
    assert exit_status == 1
    assert "Redis cannot be used" in text.splitlines()[-1]


def test_one_shard() -> None:
    with serving(WINDOW_SECONDS=3000, HOLD_ON_START="false") as server:
        server.ask(7).answer()
        server.ask(8)
        eventually(lambda: server.status()["waiting"] == 1)
        server.ask(9)
        eventually(lambda: server.status()["waiting"] == 2)
        identified, waiting, unknown = (status(n, PORT=server.port) for n in (7, 9, 10))
    assert "Shard 9 (key 0) waits at place 2 (2 waiting); waited " in waiting[1]
    assert "Shard 7 (key 0) is not in the queue" in identified[1]
    assert "; 1 session start in the last 24 hours" in identified[1]
    assert "no recent release by this server; 0 session starts" in unknown[1]


def test_a_shard_that_is_held_and_one_that_is_identifying() -> None:
    variables = {"LOOP_FREE_STARTS": 1, "MAX_CONCURRENCY": 2, "CONFIRM_SECONDS": 600}
    with serving(HOLD_ON_START="false", **variables) as server:
        server.ask(7).answer()
        server.ask(7)
        server.connect(b"GET /?shard=4&confirm=true HTTP/1.1\r\nHost: q\r\n\r\n")
        eventually(lambda: server.status()["held"] == 1 and len(server.status()["lanes"]) == 2)
        held, identifying = (status(n, PORT=server.port) for n in (7, 4))
    assert "held because it starts too often" in held[1]
    assert "Shard 4 (key 0) is identifying, for " in identifying[1]


def test_the_command_sends_the_token(tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text("s3cret\n")
    with serving(AUTH_TOKEN="s3cret") as server:
        assert status(PORT=server.port, AUTH_TOKEN="s3cret")[0] == 0
        assert status(PORT=server.port, AUTH_TOKEN_FILE=secret)[0] == 0
        exit_status, text = status(PORT=server.port)
    assert exit_status == 1
    assert "needs a valid token: set AUTH_TOKEN or AUTH_TOKEN_FILE" in text


def test_https_on_this_machine(tmp_path: Path) -> None:
    """The certificate has the name that clients use, and not that of this machine."""
    pem = tmp_path / "server.pem"
    trustme.CA().issue_cert("queue.example").private_key_and_cert_chain_pem.write_to_path(pem)
    settings = {"TLS_CERT_FILE": pem, "TLS_KEY_FILE": pem}
    with serving(**settings) as server:
        assert status(PORT=server.port, **settings)[0] == 0
        assert status("--url", f"https://127.0.0.1:{server.port}")[0] == 0
        assert status("--url", f"http://127.0.0.1:{server.port}")[0] == 1


def test_watching() -> None:
    with serving() as server:
        watching = subprocess.Popen(
            [*COMMAND, "--watch"],
            env=environ(PORT=server.port),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert watching.stdout is not None
        with watching.stdout as output:
            for _ in range(2):
                assert "Ready\n" in iter(output.readline, "")
            watching.send_signal(signal.SIGINT)
            assert watching.wait(PATIENCE) == 0


def test_watching_ends_when_its_output_is_closed() -> None:
    with serving() as server:
        watching = subprocess.Popen(
            [*COMMAND, "--watch"],
            env=environ(PORT=server.port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert watching.stdout is not None
        with watching.stdout as output:
            assert "Ready\n" in iter(output.readline, "")
        assert watching.wait(PATIENCE) == 0
        assert watching.communicate()[1] == ""


@contextmanager
def answering(document: dict[str, Any]) -> Iterator[int]:
    """Run a server that answers each request with this document."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(document).encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def test_control_characters_from_a_server_are_escaped() -> None:
    with serving() as server:
        document = server.status()
    document |= {"ready": False, "reason": "\x1b[2Jgone\n\x07"}
    with answering(document) as port:
        exit_status, text = status(PORT=port)
    assert exit_status == 1
    assert text.splitlines()[0] == r"Not ready: \x1b[2Jgone\n\x07"


def test_a_server_that_is_no_gateway_queue_is_reported() -> None:
    with answering({}) as port:
        exit_status, text = status("--url", f"http://127.0.0.1:{port}/queue/")
    assert exit_status == 1
    assert "is not a gateway queue" in text


def test_the_url_of_the_own_server_follows_host_and_port() -> None:
    assert own_server(Settings(host="0.0.0.0", port=80)) == "http://127.0.0.1:80"
    assert own_server(Settings(host="::")) == "http://[::1]:5000"
    assert own_server(Settings(host="localhost")) == "http://localhost:5000"


def test_durations_are_written_in_words() -> None:
    assert [duration(s) for s in (0.25, 59.9, 60, 3599, 3600, 90_000)] == [
        *("0.2 s", "59.9 s", "1 min", "59 min", "1 h 00 min", "25 h 00 min")
    ]
