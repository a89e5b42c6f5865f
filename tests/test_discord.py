"""The server and Discord's limits, with a stand-in for Get Gateway Bot."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from itertools import pairwise
from pathlib import Path

import pytest

from gateway_queue.discord.api import Api, Discord, Outcome, Unavailable
from tests.fake_discord import TOKEN, FakeDiscord, Trick, after, answer, playing, raw
from tests.harness import SLACK, Server, environ, eventually, first_answers, installed, serving

GATEWAY_QUEUE = installed("gateway-queue")
HYPERCORN = (installed("hypercorn"), "--worker-class", "trio", "--bind", "127.0.0.1:0")


@contextmanager
def serving_with(discord: FakeDiscord, **variables: object) -> Iterator[Server]:
    """Run a server with a token, and check that it never shows the token."""
    hasty = {"WINDOW_SECONDS": 0.05, "HOLD_ON_START": "false", "LOG_LEVEL": "debug"}
    with serving(**discord.variables(**{**hasty, **variables})) as server:
        yield server
        shown = [*server.lines, server.get("/status").body.decode()]
    assert not [line for line in shown if TOKEN in line]


@asynccontextmanager
async def connected(url: str, count: Callable[[Outcome], None]) -> AsyncIterator[Discord]:
    """Open a client of the API until the end of the context."""
    api = Api()
    yield Discord(api, TOKEN, url, count)
    await api.close()


def waiting(server: Server) -> int:
    number = server.status()["waiting"]
    assert isinstance(number, int)
    return number


def test_the_request_to_discord_is_as_documented() -> None:
    with playing(max_concurrency=2) as discord, serving_with(discord) as server:
        eventually(lambda: server.get("/readyz").status == 200)
        status = server.status()
    ((_, path, headers),) = discord.requests
    assert path == "/api/v10/gateway/bot"
    assert headers["authorization"] == f"Bot {TOKEN}"
    assert re.fullmatch(r"DiscordBot \(https://\S+, \d\S*\)", headers["user-agent"])
    assert status["max_concurrency"] == 2
    starts = status["session_starts"]
    assert 86_300 < starts.pop("resets_in") <= 86_400
    assert starts == {"total": 1000, "remaining": 1000, "enforced": True, "source": "discord"}


def test_each_rate_limit_key_has_windows_of_its_own() -> None:
    """48 shards on 16 keys: 3 windows, in each of which all keys release."""
    variables = {"WINDOW_SECONDS": 0.5}
    with playing(max_concurrency=16) as discord, serving_with(discord, **variables) as server:
        clients = [server.ask(shard) for shard in range(48)]
        answers = sorted(first_answers(clients, 48))
    times = [answer.at for _, answer in answers]
    for shard in range(32):
        assert times[shard + 16] - times[shard] >= 0.499
    assert max(times) - min(times) < 1.3


UNAUTHORIZED = {
    "gateway-queue": ((GATEWAY_QUEUE,), 2),
    "module": ((sys.executable, "-m", "gateway_queue"), 2),
    "hypercorn": ((*HYPERCORN, "gateway_queue:app"), None),
}


@pytest.mark.parametrize("way", UNAUTHORIZED)
def test_a_token_that_discord_refuses_ends_the_server(way: str) -> None:
    command, expected = UNAUTHORIZED[way]
    with playing() as discord:
        discord.tricks.append(answer(401))
        ended = subprocess.run(
            command,
            env=environ(PORT=0, **discord.variables()),
            capture_output=True,
            text=True,
            check=False,
            timeout=20,
        )
    assert ended.returncode == expected if expected else ended.returncode != 0
    line = ended.stderr.splitlines()[-1]
    assert line.startswith("Discord rejected DISCORD_TOKEN (401")
    assert TOKEN not in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr


DEEP = b"[" * 100_000
NO_KEYS = b'{"session_start_limit": {"total": 1, "remaining": 1, "reset_after": 1, %s}}'
FAULTS: dict[str, Trick] = {
    "500": answer(500),
    "503": answer(503),
    "403": answer(403),
    "404": answer(404),
    "a redirect": answer(302, location="http://127.0.0.1:1/"),
    "429": answer(429, retry_after="1.5"),
    "429 without a time": answer(429),
    "429 with a strange time": answer(429, retry_after="soon"),
    "no JSON": answer(200, b"<html>"),
    "no text": answer(200, b"\xff\xfe\x00"),
    "nothing": answer(200, b""),
    "a list": answer(200, b"[]"),
    "deep JSON": answer(200, DEEP),
    "another document": answer(200, b'{"url": "wss://x", "shards": 9}'),
    "no concurrency": answer(200, NO_KEYS % b'"max_concurrency": 0'),
    "negative concurrency": answer(200, NO_KEYS % b'"max_concurrency": -1'),
    "a fraction": answer(200, NO_KEYS % b'"max_concurrency": 1.5'),
    "true": answer(200, NO_KEYS % b'"max_concurrency": true'),
    "text for a number": answer(200, NO_KEYS % b'"max_concurrency": "1"'),
    "infinity": answer(200, NO_KEYS % b'"max_concurrency": Infinity'),
    "a closed connection": raw(b""),
    "half an answer": raw(b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n{"),
    "no HTTP": raw(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "wrong compression": answer(200, b"{}", content_encoding="gzip"),
}


# When httpx cannot decompress, it leaves generators to the garbage collector; trio warns of that.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("fault", FAULTS)
async def test_an_unusable_answer_counts_as_no_answer(fault: str) -> None:
    with playing() as fake:
        fake.tricks.append(FAULTS[fault])
        outcomes: list[Outcome] = []
        async with connected(fake.url, outcomes.append) as discord:
            with pytest.raises(Unavailable) as unavailable:
                await discord.session_start_limit()
            assert str(unavailable.value)
            assert unavailable.value.retry_after == (1.5 if fault == "429" else 0)
            assert (await discord.session_start_limit()).total == 1000
            refused = "rate_limited" if fault.startswith("429") else "failed"
            assert outcomes == [refused, "answered"]


@pytest.mark.parametrize("url", ["http://a..b", "http://xn--/", "http://[v1.a]", "http://%zz"])
async def test_an_impossible_host_counts_as_no_answer(url: str) -> None:
    async with connected(url, list[Outcome]().append) as discord:
        with pytest.raises(Unavailable):
            await discord.session_start_limit()


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        *(("7", 7.0), ("0.5", 0.5), ("-1", 0.0), ("1e9", 0.0), ("nan", 0.0), ("9" * 400, 0.0)),
        *(("in an hour", 3600.0), ("an hour ago", 0.0), ("Sun, 31 Feb 2026 25:00:00 GMT", 0.0)),
    ],
)
async def test_retry_after(header: str, seconds: float) -> None:
    dates = {"in an hour": time.time() + 3600, "an hour ago": time.time() - 3600}
    if header in dates:
        header = formatdate(dates[header], usegmt=True)
    with playing() as fake:
        fake.tricks.append(answer(503, retry_after=header))
        async with connected(fake.url, list[Outcome]().append) as discord:
            with pytest.raises(Unavailable) as unavailable:
                await discord.session_start_limit()
    assert unavailable.value.retry_after == pytest.approx(seconds, abs=60 if seconds > 60 else 0)


def byte_by_byte(done: threading.Event) -> Trick:
    """Answer without an end, one byte every 10 ms."""

    def act(request: BaseHTTPRequestHandler) -> None:
        with suppress(OSError):
            request.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
            while not done.wait(0.01):
                request.wfile.write(b" ")

    return act


@pytest.mark.parametrize("begins", [False, True])
async def test_an_answer_that_is_not_complete_in_time_is_given_up(
    monkeypatch: pytest.MonkeyPatch, begins: bool
) -> None:
    monkeypatch.setattr("gateway_queue.discord.api.REQUEST_SECONDS", 0.1)
    with playing() as fake:
        done = threading.Event()
        fake.tricks.append(byte_by_byte(done) if begins else after(done, answer(200)))
        async with connected(fake.url, list[Outcome]().append) as discord:
            with pytest.raises(Unavailable, match="no answer within"):
                await discord.session_start_limit()
        done.set()


@pytest.mark.parametrize("fault", ["503", "429", "no JSON", "a closed connection"])
def test_tickets_are_held_until_discord_has_answered(fault: str) -> None:
    """No shard is released before the limits are known."""
    with playing(max_concurrency=2) as discord:
        discord.tricks.append(FAULTS[fault])
        with serving_with(discord) as server:
            clients = [server.ask(shard) for shard in range(2)]
            eventually(lambda: any("cannot ask Discord" in line for line in server.lines))
            unready = server.get("/readyz")
            assert unready.status == 503
            assert unready.headers["content-type"] == "application/problem+json"
            assert "Discord's limits are not known yet: " in unready.body.decode()
            status = server.status()
            assert status["max_concurrency"] is status["session_starts"] is None
            assert [t["eta"] for t in status["lanes"][0]["tickets"]] == [None, None]
            answers = first_answers(clients, 2)
            assert server.get("/readyz").status == 200
            assert {answer.status for _, answer in answers} == {200}
        first, second = (at for at, *_ in discord.requests)
        pause = 1.5 if fault == "429" else 1.0
        assert pause <= second - first < pause + 1
        assert all(answer.at > second for _, answer in answers)


def test_delays_between_tries_grow_while_discord_is_unreachable() -> None:
    with playing() as discord:
        url = discord.url
    with serving_with(discord, DISCORD_API_URL=url) as server:
        client = server.ask(0)
        eventually(lambda: sum("cannot ask Discord" in line for line in server.lines) == 3)
        retries = [re.findall(r"retry_in=(\S+)", line) for line in server.lines]
        assert [delays[0] for delays in retries if delays] == ["1.0", "2.0", "4.0"]
        assert "ConnectError" in server.get("/readyz").body.decode()
        client.hang_up()


def test_an_answer_that_takes_long_is_waited_for() -> None:
    with playing() as discord:
        slow = threading.Event()
        discord.tricks.append(after(slow, discord.answer_to("/gateway/bot")))
        with serving_with(discord) as server:
            client = server.ask(0)
            eventually(lambda: len(discord.requests) == 1)
            assert server.get("/readyz").status == 503
            assert waiting(server) == 1
            slow.set()
            assert client.answer().status == 200


def test_later_faults_keep_the_last_limits() -> None:
    variables = {"DISCORD_REFRESH_SECONDS": 0.1}
    with playing(max_concurrency=4) as discord, serving_with(discord, **variables) as server:
        eventually(lambda: server.get("/readyz").status == 200)
        discord.tricks.extend([answer(401), answer(500)])
        eventually(lambda: not discord.tricks)
        assert server.get("/readyz").status == 200
        assert server.ask(1).answer().status == 200
        assert server.status()["max_concurrency"] == 4


@pytest.mark.parametrize(("before", "later", "count"), [(1, 4, 200), (8, 2, 100), (8, 12, 300)])
def test_limits_change_while_hundreds_wait(before: int, later: int, count: int) -> None:
    window = 0.1
    with playing(max_concurrency=before) as discord:
        variables = {"DISCORD_REFRESH_SECONDS": 0.2, "WINDOW_SECONDS": window}
        with serving_with(discord, **variables) as server:
            clients = [server.ask(shard) for shard in range(count)]
            eventually(lambda: waiting(server) <= count - 5 * before)
            discord.max_concurrency = later
            answers = first_answers(clients, count)
            assert server.status()["max_concurrency"] == later
    times = {shard: answer.at for shard, answer in answers}
    assert len(times) == count
    assert {answer.status for _, answer in answers} == {200}
    same_lane_throughout = math.lcm(before, later)
    for shard in range(same_lane_throughout):
        lane = [times[shard] for shard in range(shard, count, same_lane_throughout)]
        assert all(latter - former >= window - 0.001 for former, latter in pairwise(lane))


def test_max_concurrency_below_discords_limits_the_releases_of_all_keys() -> None:
    """The keys stay Discord's: shards 0, 16 and 32 have the same one."""
    window, most = 1.0, 3
    settings = {"WINDOW_SECONDS": window, "HOLD_ON_START": "true"}
    shards = [0, 16, 32, 1, 2, 17, 3, 4, 5, 6, 7, 8]
    with (
        playing(max_concurrency=16) as discord,
        serving_with(discord, MAX_CONCURRENCY=most, **settings) as server,
    ):
        clients = []
        for shard in shards:
            clients.append(server.ask(shard))
            server.settle()
        answers = [(shards[number], answer.at) for number, answer in first_answers(clients, 12)]
    times = [at for _, at in answers]
    assert all(
        latter - former >= window - SLACK
        for former, latter in zip(times, times[most:], strict=False)
    )
    for key in range(16):
        lane = [at for shard, at in answers if shard % 16 == key]
        assert all(latter - former >= window - SLACK for former, latter in pairwise(lane))
    # The oldest ticket first, among those whose key is open.
    windows = [{shard for shard, _ in answers[i : i + most]} for i in range(0, len(answers), most)]
    assert windows == [{0, 1, 2}, {16, 17, 3}, {32, 4, 5}, {6, 7, 8}]


def test_a_max_concurrency_above_discords_has_no_effect() -> None:
    with (
        playing(max_concurrency=2) as discord,
        serving_with(discord, MAX_CONCURRENCY=8) as server,
    ):
        eventually(lambda: server.get("/readyz").status == 200)
        assert server.status()["max_concurrency"] == 2
        eventually(lambda: any("MAX_CONCURRENCY is higher" in line for line in server.lines))


def test_at_the_end_of_the_budget_tickets_are_held_until_the_reset() -> None:
    # Discord is asked again when six windows are over: after the reset.
    with (
        playing(remaining=5, reset_after=3000) as discord,
        serving_with(discord, WINDOW_SECONDS=0.6) as server,
    ):
        clients = [server.ask(shard) for shard in range(9)]
        first_answers(clients[:5], 5)
        status = server.status()
        assert status["session_starts"]["remaining"] == 0
        assert {t["state"] for t in status["lanes"][0]["tickets"]} == {"waiting"}
        assert status["lanes"][0]["opens_in"] > 0.5
        discord.remaining = 1000
        discord.reset_after = 86_400_000
        later = [client.answer().at for client in clients[5:]]
        assert any("no session start is left today" in line for line in server.lines)
    assert later[0] > discord.requests[0][0] + 3
    assert min(b - a for a, b in pairwise(later)) >= 0.599, "no burst"
    assert len(discord.requests) >= 2, "asked again at the reset"


def test_a_limit_without_a_token() -> None:
    with serving(SESSION_START_LIMIT=3, WINDOW_SECONDS=0.05) as server:
        clients = [server.ask(shard) for shard in range(5)]
        first_answers(clients, 3)
        server.settle()
        status = server.status()
        assert status["waiting"] == 2
        assert status["released"] == 3
        starts = status["session_starts"]
        assert 86_000 < starts.pop("resets_in") < 86_400
        expected = {"total": 3, "remaining": 0, "enforced": True, "source": "configured"}
        assert starts == expected
        for ticket in status["lanes"][0]["tickets"]:
            assert ticket["eta"] > 86_000


def test_a_shard_in_a_crash_loop_is_held_and_others_pass() -> None:
    with serving(LOOP_FREE_STARTS=2, WINDOW_SECONDS=0.05) as server:
        for _ in range(2):
            assert server.ask(3).answer().status == 200
        server.ask(3)
        eventually(lambda: any("held" in line for line in server.lines))
        for shard in range(4, 8):
            assert server.ask(shard).answer().status == 200
        (lane,) = server.status()["lanes"]
        (ticket,) = lane["tickets"]
        assert (ticket["shard"], ticket["state"]) == (3, "held")
        assert 10 < ticket["eta"] < 15
        (line,) = [line for line in server.lines if "held" in line]
        assert "warning" in line
        assert "shard=3" in line
        assert "held_for=1" in line


def test_behind_a_gateway_proxy_every_request_is_answered_at_once() -> None:
    """Also with a token, and while Discord cannot be reached."""
    variables = {"DISCORD_TOKEN": TOKEN, "DISCORD_API_URL": "http://127.0.0.1:1"}
    with serving(MAX_CONCURRENCY=0, WINDOW_SECONDS=3600, **variables) as server:
        for _ in range(100):
            assert server.ask(3).answer().status == 200
        status = server.status()
        assert (status["max_concurrency"], status["waiting"]) == (0, 0)
        assert server.get("/readyz").status == 200


def test_status_lists_waiting_shards_by_key() -> None:
    with serving(MAX_CONCURRENCY=2, WINDOW_SECONDS=100) as server:
        clients = [server.ask(shard) for shard in (5, 2, 7)] + [server.connect()]
        clients.append(server.ask(9))
        eventually(lambda: waiting(server) == 5)
        clients[0].hang_up()
        eventually(lambda: waiting(server) == 4)
        status = server.status()
        lanes = {lane["rate_limit_key"]: lane for lane in status["lanes"]}
        assert {key: lane["waiting"] for key, lane in lanes.items()} == {0: 2, 1: 2}
        assert [t["shard"] for t in lanes[0]["tickets"]] == [2, None]
        assert [t["shard"] for t in lanes[1]["tickets"]] == [5, 7, 9]
        assert [t["position"] for t in lanes[1]["tickets"]] == [1, 2, 3]
        away, first, second = lanes[1]["tickets"]
        assert (away["state"], away["eta"]) == ("away", None)
        assert first["eta"] == lanes[1]["opens_in"] < 100
        assert second["eta"] == pytest.approx(first["eta"] + 100)
        assert 0 <= second["waited"] <= first["waited"] < 20
        assert status["abandoned"] == 1
        assert list(status) == [
            *("version", "started_at", "ready", "reason", "faults", "window_seconds"),
            *("max_concurrency", "store", "waiting", "held", "away", "released", "abandoned"),
            *("starts_used", "session_starts", "lanes"),
        ]
        assert status["store"] == "memory"
        assert server.get("/status").headers["cache-control"] == "no-store"
        assert any("request without ?shard=" in line for line in server.lines)


def test_a_secret_from_a_file(tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text(f"{TOKEN}\n")
    with playing() as discord:
        variables = {"DISCORD_TOKEN_FILE": secret, "DISCORD_API_URL": discord.url}
        with serving(**variables) as server:
            eventually(lambda: server.get("/readyz").status == 200)
    assert discord.requests[0][2]["authorization"] == f"Bot {TOKEN}"
