"""The token that every request needs, if one is set."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import GO, Answer, Server, serving

TOKEN = "correct-horse:battery/staple"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(AUTH_TOKEN=TOKEN, WINDOW_SECONDS=0.001, LOOP_FREE_STARTS=0) as running:
        yield running
        assert not [line for line in running.lines if "staple" in line]


def ask(server: Server, path: str, *credentials: str, method: str = "GET") -> Answer:
    headers = "".join(f"Authorization: {one}\r\n" for one in credentials)
    request = f"{method} {path} HTTP/1.1\r\nHost: q\r\n{headers}\r\n"
    return server.connect(request.encode("latin-1")).answer(body=method != "HEAD")


def basic(text: str) -> str:
    return f"Basic {b64encode(text.encode()).decode()}"


GOOD = [
    *(f"Bearer {TOKEN}", f"bearer {TOKEN}", f"BEARER  {TOKEN} "),
    *(basic(f"user:{TOKEN}"), basic(f":{TOKEN}"), basic(f"user:{TOKEN}").replace("Basic", "basic")),
]
BAD = [
    *("", TOKEN, "Bearer", "Bearer ", f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x", "Bearer \xff"),
    *(
        f"Token {TOKEN}",
        f"Bearer {TOKEN.upper()}",
        f"Basic {TOKEN}",
        "Basic",
        "Basic ====",
        "Basic \xe9",
    ),
    *(
        basic(TOKEN),
        basic(f"{TOKEN}:"),
        basic("user:wrong"),
        basic("user"),
        f"Bearer {basic(TOKEN)}",
    ),
]


@pytest.mark.parametrize("path", ["/", "/?shard=0", "/status", "http://host/status"])
@pytest.mark.parametrize("credentials", GOOD)
def test_the_token_is_accepted_on_every_path(server: Server, credentials: str, path: str) -> None:
    answer = ask(server, path, credentials)
    assert answer.status == 200
    assert (answer.body == GO) is ("status" not in path)


@pytest.mark.parametrize("path", ["/", "/?shard=x", "/status", "http://host/status"])
@pytest.mark.parametrize("credentials", BAD)
def test_bad_credentials_are_refused(server: Server, credentials: str, path: str) -> None:
    answer = ask(server, path, credentials)
    assert answer.status == 401
    assert answer.headers["content-type"] == "application/problem+json"
    assert json.loads(answer.body)["status"] == 401
    challenges = answer.raw.lower().count(b"\r\nwww-authenticate: ")
    assert challenges == 2
    assert b'www-authenticate: basic realm="gateway-queue"' in answer.raw.lower()
    assert b'www-authenticate: bearer realm="gateway-queue"' in answer.raw.lower()


def test_no_credentials_and_two_headers_are_refused(server: Server) -> None:
    assert ask(server, "/").status == 401
    assert ask(server, "/", f"Bearer {TOKEN}", f"Bearer {TOKEN}").status == 401
    refused = ask(server, "/", method="HEAD")
    assert (refused.status, refused.body) == (401, b"")
    assert ask(server, "/status", method="POST").status == 401


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_health_checks_need_no_token(server: Server, path: str) -> None:
    assert ask(server, path).status == 200
    assert ask(server, path, "Bearer wrong").status == 200


def test_a_refused_request_takes_no_slot() -> None:
    with serving(AUTH_TOKEN=TOKEN, WINDOW_SECONDS=3600, HOLD_ON_START="false") as server:
        for _ in range(20):
            assert ask(server, "/", "Bearer wrong").status == 401
        assert ask(server, "/", f"Bearer {TOKEN}").body == GO


def test_without_a_token_every_request_is_accepted() -> None:
    with serving(WINDOW_SECONDS=0.001) as server:
        assert ask(server, "/", "Bearer anything").body == GO
        assert ask(server, "/status", "Bearer anything").status == 200


def test_the_token_from_a_file(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(f"{TOKEN}\n")
    with serving(AUTH_TOKEN_FILE=secret, WINDOW_SECONDS=0.001) as server:
        assert ask(server, "/").status == 401
        assert ask(server, "/", f"Bearer {TOKEN}").body == GO
