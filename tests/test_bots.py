"""Several bots on one server: none delays, changes or reveals another one."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
import trio
from trio.testing import MockClock

from gateway_queue.bots import Bots
from gateway_queue.discord.api import Api
from gateway_queue.settings import Settings
from tests.fake_discord import answer, playing
from tests.harness import (
    GO,
    SLACK,
    Client,
    Server,
    allow_10_000_connections,
    environ,
    eventually,
    first_answers,
    free_port,
    installed,
    serving,
)
from tests.redis_server import RedisServer, redis_server


class BotServer:
    """A server with a file of bots."""

    def __init__(self, server: Server, path: Path) -> None:
        self.server = server
        self._path = path

    def ask(self, bot: str, query: str = "", token: str | None = None) -> Client:
        """Ask for a turn."""
        return self.request(f"/?bot={bot}{query}", token)

    def request(self, path: str, token: str | None = None) -> Client:
        line = f"Authorization: Bearer {token}\r\n" if token else ""
        return self.server.connect(f"GET {path} HTTP/1.1\r\nHost: q\r\n{line}\r\n".encode())

    def write(self, text: str, line: str = "read BOTS_FILE") -> None:
        """Change the file, send SIGHUP, and wait for the line of the log that follows."""
        before = self.count(line)
        self._path.write_text(text)
        self.server.signal(signal.SIGHUP)
        eventually(lambda: self.count(line) > before)

    def count(self, text: str) -> int:
        return sum(text in line for line in self.server.lines)

    def status(self, query: str = "") -> dict[str, object]:
        status: dict[str, object] = json.loads(self.server.get(f"/status{query}").body)
        return status


@contextmanager
def serving_bots(folder: Path, text: str, **variables: object) -> Iterator[BotServer]:
    path = folder / "bots.toml"
    path.write_text(text)
    usual = {"WINDOW_SECONDS": 0.1, "HOLD_ON_START": "false", "LOOP_FREE_STARTS": 0}
    with serving(BOTS_FILE=path, **{**usual, **variables}) as server:
        yield BotServer(server, path)
        assert not [line for line in server.lines if "Traceback" in line]


def test_10_000_tickets_of_a_bot_that_waits_for_an_hour_delay_no_other(tmp_path: Path) -> None:
    allow_10_000_connections()
    text = "[slow]\nwindow_seconds = 3600\n[fast]\nwindow_seconds = 0.2\n"
    with serving_bots(tmp_path, text) as bots:
        slow = [bots.ask("slow", f"&shard={number}") for number in range(10_000)]
        assert slow[0].answer().body == GO
        answers = [bots.ask("fast").answer() for _ in range(5)]
        assert all(b.at - a.at >= 0.2 - SLACK for a, b in pairwise(answers))
        assert answers[-1].at - answers[0].at < 2
        assert bots.server.connect().answer().body == GO
        eventually(lambda: bots.status("?bot=slow&shard=0")["waiting"] == 9_999)
        for client in slow:
            client.socket.close()
        answers = [bots.ask("fast").answer() for _ in range(5)]
        assert all(b.at - a.at >= 0.2 - SLACK for a, b in pairwise(answers))
        eventually(lambda: bots.status("?bot=slow&shard=0")["waiting"] == 0)


def test_the_bot_parameter_works_in_every_ticket(tmp_path: Path) -> None:
    text = "[a]\nmax_concurrency = 4\n"
    with serving_bots(tmp_path, text, MAX_CONCURRENCY=1) as bots:
        assert bots.request("/?shard=5&b%6ft=%61").answer().body == GO
        client = bots.ask("a", "&shard=6&confirm=true")
        while GO not in client.received:
            client.received += client.socket.recv(65536)
        (lane,) = json.loads(bots.server.get("/status?bot=a").body)["lanes"]
        assert (lane["rate_limit_key"], lane["identifying"]["shard"]) == (2, 6)
        assert bots.status()["lanes"] == []
        assert bots.ask("default").answer().body == GO
        assert (bots.status()["released"], bots.status("?bot=a")["released"]) == (1, 2)


UNKNOWN = [
    "bot=other",
    "bot=",
    "bot=A",
    "bot=a&bot=b",
    "bot=a%00",
    "bot=a&bot=",
    "bot=" + "x" * 999,
]


@pytest.mark.parametrize("query", UNKNOWN)
@pytest.mark.parametrize(
    "path", ["/", "/any?shard=1&confirm=true&", "/status", "/dashboard", "/events"]
)
def test_an_unknown_bot_is_an_error_that_names_no_other(
    several: BotServer, path: str, query: str
) -> None:
    found = several.request(f"{path}{'' if path.endswith('&') else '?'}{query}").answer()
    assert found.status == 400
    assert found.headers["content-type"] == "application/problem+json"
    assert "bot" in json.loads(found.body)["detail"]
    assert b"alpha" not in found.body
    assert b"beta" not in found.body


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BotServer]:
    with serving_bots(tmp_path_factory.mktemp("several"), "[alpha]\n[beta]\n[a]\n[b]\n") as bots:
        yield bots


def test_without_the_file_no_output_names_a_bot() -> None:
    with serving(HOLD_ON_START="false", LOG_FORMAT="json") as server:
        assert server.connect().answer().body == GO
        assert "bot" not in server.status()
        assert "bots" not in server.status()
        assert b"bot=" not in server.get("/metrics").body
        assert b"Bots" not in server.get("/dashboard").body
        server.settle()
        assert not [line for line in server.lines if '"bot"' in line]
        assert server.get("/?bot=default").body == GO
        assert server.get("/?bot=other").status == 400


def test_the_status_of_the_default_bot_lists_all_bots(tmp_path: Path) -> None:
    text = "[idle]\n[busy]\nwindow_seconds = 3600\nsession_start_limit = 9\n"
    with serving_bots(tmp_path, text) as bots:
        bots.ask("busy").answer()
        bots.ask("busy")
        bots.server.settle()
        listed = bots.status()["bots"]
        assert isinstance(listed, list)
        assert [bot["bot"] for bot in listed] == ["default", "idle", "busy"]
        assert [bot["waiting"] for bot in listed] == [0, 0, 1]
        assert [bot["ready"] for bot in listed] == [True] * 3
        assert listed[1]["next_release"] is None
        assert 3000 < listed[2]["next_release"] <= 3600
        assert listed[2]["session_starts"]["remaining"] == 8
        own = bots.status("?bot=busy")
        assert own["bot"] == "busy"
        assert "bots" not in own
        page = bots.server.get("/dashboard").body.decode()
        assert '<a href="dashboard?bot=busy">busy</a>' in page
        assert "8 of 9" in page
        page = bots.server.get("/dashboard?bot=busy").body.decode()
        assert "Gateway queue: busy" in page
        page_of_idle = bots.server.get("/dashboard?bot=idle").body.decode()
        assert 'data-ask="?bot=idle&amp;shard=0"' in page_of_idle
        assert "idle" not in page


def test_events_are_those_of_the_bot_until_it_is_gone(tmp_path: Path) -> None:
    with serving_bots(tmp_path, "[a]\nwindow_seconds = 3600\n") as bots:
        bots.ask("a").answer()
        bots.ask("a")
        bots.server.settle()
        listeners = [bots.request("/events?bot=a"), bots.request("/events")]
        for listener in listeners:
            while b"</main>" not in listener.received:
                listener.received += listener.socket.recv(65536)
        assert b'data-waiting="1"' in listeners[0].received
        assert b'data-waiting="0"' in listeners[1].received
        bots.write("")
        assert b"</main>" in listeners[0].rest()


def test_metrics_and_log_lines_name_the_bot(tmp_path: Path) -> None:
    with serving_bots(tmp_path, "[a]\n", LOG_FORMAT="json") as bots:
        bots.ask("a", "&shard=1").answer()
        bots.server.ask(2).answer()
        bots.server.settle()
        metrics = bots.server.get("/metrics").body.decode()
        for bot in ("a", "default"):
            name = f'{{bot="{bot}",rate_limit_key="0"}}'
            assert f"gateway_queue_released_total{name} 1.0" in metrics
            assert f"gateway_queue_waiting{name} 0.0" in metrics
            assert f'gateway_queue_ready{{bot="{bot}"}} 1.0' in metrics
            assert f'gateway_queue_wait_seconds_count{{bot="{bot}"}} 1.0' in metrics
        assert metrics.count("# TYPE gateway_queue_waiting gauge") == 1
        assert metrics.count("\ngateway_queue_build_info{") == 1
        lines = [json.loads(line) for line in bots.server.lines if line.startswith("{")]
        released = {line["bot"]: line["shard"] for line in lines if line["event"] == "released"}
        assert released == {"a": 1, "default": 2}


def test_discord_can_be_down_for_one_bot(tmp_path: Path) -> None:
    unreachable = f"http://127.0.0.1:{free_port()}/api"
    with playing(max_concurrency=2) as discord:
        text = f"""
        [down]
        discord_token = "down"
        discord_api_url = "{unreachable}"
        [up]
        discord_token = "up"
        discord_api_url = "{discord.url}"
        """
        with serving_bots(tmp_path, text) as bots:
            held = bots.ask("down")
            assert bots.ask("up").answer().body == GO
            assert bots.server.connect().answer().body == GO
            assert bots.status("?bot=up")["max_concurrency"] == 2
            eventually(lambda: "Connect" in str(bots.status("?bot=down")["reason"]))
            assert bots.status("?bot=down")["ready"] is False
            assert bots.server.get("/readyz").status == 200
            assert b'gateway_queue_ready{bot="down"} 0.0' in bots.server.get("/metrics").body
            assert bots.status("?bot=down")["waiting"] == 1
            # Each bot asks with its own token, and the token of the other one is not sent here.
            assert {headers["authorization"] for _, _, headers in discord.requests} == {"Bot up"}
            assert held.received == b""


def test_a_rejected_token_in_the_file_affects_only_its_bot(tmp_path: Path) -> None:
    with playing() as bad, playing() as good:
        bad.tricks.extend([answer(401)] * 2)
        text = f"[a]\ndiscord_token = 'wrong'\ndiscord_api_url = '{bad.url}'\n"
        with serving_bots(tmp_path, text, LOG_FORMAT="json") as bots:
            eventually(lambda: "401" in str(bots.status("?bot=a")["reason"]))
            held = bots.ask("a")
            assert bots.server.connect().answer().body == GO
            eventually(lambda: bots.count("rejected") > 0)
            assert bots.count("rejected") == 1
            assert '"bot": "a"' in next(line for line in bots.server.lines if "rejected" in line)
            bots.write(f"[a]\ndiscord_token = 'right'\ndiscord_api_url = '{good.url}'\n")
            assert held.answer().body == GO
        assert len(bad.requests) == 1  # a rejected token is not tried again


def test_many_bots_do_not_ask_discord_all_at_once(tmp_path: Path) -> None:
    bots = "\n".join(f"[bot{number}]\ndiscord_token = 'token{number}'" for number in range(80))
    with playing() as discord, serving_bots(tmp_path, bots, DISCORD_API_URL=discord.url):
        eventually(lambda: len(discord.requests) >= 80)
        times = sorted(at for at, _, _ in discord.requests)
        # At 20 per second, 40 requests take 2 s; 1 s of it allows for a busy machine.
        assert all(b - a > 1 for a, b in zip(times, times[40:], strict=False))


async def test_the_refreshes_of_many_bots_are_spread(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bots.toml"
    path.write_text("\n".join(f"[bot{one}]\ndiscord_token = 'token{one}'" for one in range(100)))
    asked: list[float] = []

    async def get(_: Api, url: str, headers: dict[str, str]) -> httpx.Response:
        asked.append(trio.current_time())
        limit = {"total": 9, "remaining": 9, "reset_after": 86_400_000, "max_concurrency": 1}
        return httpx.Response(200, json={"session_start_limit": limit})

    monkeypatch.setattr(Api, "get", get)
    settings = Settings(
        bots_file=str(path), discord_refresh_seconds=300, hold_on_start=False, window_seconds=0.1
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(Bots(settings, refuse_token=lambda: None).run)
        start = trio.current_time()
        await trio.sleep(599)
        nursery.cancel_scope.cancel()
    # The first refreshes, after 6 windows each, are not counted.
    refreshes = [at - start for at in asked if at - start > 1]
    tenths = [sum(part <= at / 30 < part + 1 for at in refreshes) for part in range(1, 20)]
    assert min(tenths) >= 8
    assert max(tenths) <= 12


# --- the file changes -----------------------------------------------------------------------------


def test_bots_come_and_go(tmp_path: Path) -> None:
    with serving_bots(
        tmp_path, "[stays]\nwindow_seconds = 3600\n[goes]\nwindow_seconds = 3600\n"
    ) as bots:
        assert bots.ask("stays").answer().body == GO
        assert bots.ask("goes").answer().body == GO
        stays, goes = bots.ask("stays"), bots.ask("goes")
        bots.server.settle()
        bots.write("[stays]\nwindow_seconds = 3600\n[comes]\n")
        assert goes.rest() == b""  # without an answer, which could be taken for a permission
        assert bots.ask("goes").answer().status == 400
        assert bots.ask("comes").answer().body == GO
        assert bots.status("?bot=stays")["waiting"] == 1
        assert stays.received == b""


@pytest.mark.parametrize("mistake", ["[a]\nwindow_seconds = 0", "[", "[default]", None])
def test_a_broken_file_changes_nothing(tmp_path: Path, mistake: str | None) -> None:
    with serving_bots(tmp_path, "[a]\nwindow_seconds = 3600\n") as bots:
        assert bots.ask("a").answer().body == GO
        waiting = bots.ask("a")
        bots.server.settle()
        if mistake is None:
            (tmp_path / "bots.toml").unlink()
            bots.server.signal(signal.SIGHUP)
            eventually(lambda: bots.count("BOTS_FILE has a mistake") > 0)
        else:
            bots.write(mistake, "BOTS_FILE has a mistake")
        assert bots.count("BOTS_FILE has a mistake") == 1
        assert bots.count("read BOTS_FILE") == 1  # at the start
        assert bots.status("?bot=a")["waiting"] == 1
        assert waiting.received == b""
        bots.write("[a]\nwindow_seconds = 3600\n[b]\n")
        assert bots.ask("b").answer().body == GO
        assert bots.status("?bot=a")["waiting"] == 1


def test_a_changed_bot_keeps_its_tickets_and_windows(tmp_path: Path) -> None:
    with serving_bots(tmp_path, "[a]\nwindow_seconds = 0.5\nplace_seconds = 0\n") as bots:
        clients = [bots.ask("a", f"&shard={number}") for number in range(5)]
        first, second = (clients[number].answer() for number in range(2))
        assert second.at - first.at >= 0.5 - SLACK
        bots.write("[a]\nwindow_seconds = 1.5\nmax_concurrency = 1\n")
        changed_at = time.monotonic()
        third, fourth = (clients[number].answer() for number in range(2, 4))
        assert third.at - second.at >= 1.5 - SLACK
        assert fourth.at - third.at >= 1.5 - SLACK
        assert third.at - changed_at < 1.5 + 1
        assert bots.count("Traceback") == 0


def test_a_bot_that_returns_still_has_its_identifying_shard(tmp_path: Path) -> None:
    text = "[a]\nwindow_seconds = 0.5\n"
    with serving_bots(tmp_path, text) as bots:
        identifying = bots.ask("a", "&shard=1&confirm=true")
        while GO not in identifying.received:
            identifying.received += identifying.socket.recv(65536)
        bots.write("")
        bots.write(text)
        following = bots.ask("a", "&shard=2")
        time.sleep(1)  # two windows
        closed_at = time.monotonic()
        identifying.hang_up()
        assert following.answer().at - closed_at >= 0.5 - SLACK


def test_a_changed_token_holds_tickets_until_discord_has_answered(tmp_path: Path) -> None:
    with playing(max_concurrency=16) as former, playing(max_concurrency=1) as other:
        bot = "[a]\ndiscord_token = '{}'\ndiscord_api_url = '{}'\n"
        with serving_bots(tmp_path, bot.format("former", former.url), WINDOW_SECONDS=0.2) as bots:
            eventually(lambda: bots.status("?bot=a")["max_concurrency"] == 16)
            other.tricks.extend([answer(503)])
            bots.write(bot.format("other", other.url))
            clients = [bots.ask("a", f"&shard={number}") for number in range(4)]
            answers = [found for _, found in first_answers(clients, 4)]
            assert bots.status("?bot=a")["max_concurrency"] == 1
            assert all(b.at - a.at >= 0.2 - SLACK for a, b in pairwise(answers))


# --- tokens ---------------------------------------------------------------------------------------


def test_a_bots_own_token_opens_only_this_bot(tmp_path: Path) -> None:
    text = "[a]\nauth_token = 'for.a'\n[b]\nauth_token = 'for.b'\n[c]\n"
    with serving_bots(tmp_path, text, AUTH_TOKEN="for.all") as bots:
        for bot in ("a", "b", "c", "default"):
            assert bots.ask(bot, token="for.all").answer().body == GO
            assert bots.ask(bot, token="for.a").answer().status == (200 if bot == "a" else 401)
            assert bots.ask(bot).answer().status == 401
        assert bots.ask("unknown", token="for.a").answer().status == 401
        assert bots.ask("unknown", token="for.all").answer().status == 400
        for path, status in {
            "/status?bot=a": 200,
            "/dashboard?bot=a": 200,
            "/status": 401,
            "/status?bot=b": 401,
            "/metrics": 401,
            "/metrics?bot=a": 401,
        }.items():
            assert bots.request(path, "for.a").answer().status == status
        released = bots.request("/status?bot=a", "for.all").answer()
        assert json.loads(released.body)["released"] == 2


def test_a_bots_own_token_is_required_also_if_the_server_has_none(tmp_path: Path) -> None:
    with serving_bots(tmp_path, "[a]\nauth_token = 'for.a'\n[b]\n") as bots:
        assert bots.ask("a").answer().status == 401
        assert bots.ask("a", token="for.a").answer().body == GO
        assert bots.ask("b").answer().body == GO


# --- costs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [(), (installed("hypercorn"), "-c", "python:gateway_queue.server", "gateway_queue:app")],
)
def test_a_wrong_file_ends_the_start_before_a_socket_is_bound(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    path = tmp_path / "bots.toml"
    path.write_text("[a]\nwindow_seconds = 'soon'\n")
    found = subprocess.run(
        command or (installed("gateway-queue"),),
        env=environ(BOTS_FILE=path, PORT=free_port()),
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )
    assert found.returncode == 2
    (line,) = found.stderr.splitlines()
    for part in (str(path), "[a]", "window_seconds", "'soon'", "a number"):
        assert part in line
    assert "Running" not in found.stdout


def test_500_idle_bots_cost_under_10_mb_and_no_wake_ups(tmp_path: Path) -> None:
    memory = []
    for number in (0, 500):
        text = "\n".join(f"[bot{one}]" for one in range(number))
        with serving_bots(tmp_path, text, HOLD_ON_START="true") as bots:
            assert bots.server.connect().answer().body == GO
            bots.server.settle()
            memory.append(bots.server.peak_memory())
            time.sleep(6)  # Hypercorn closes the connections after 5 s
            before = bots.server.voluntary_switches()
            time.sleep(2)  # the time of the measurement
            assert bots.server.voluntary_switches() == before
    assert memory[1] - memory[0] < 10_000_000


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


def test_replicas_share_the_windows_of_each_bot_over_one_connection(
    tmp_path: Path, redis: RedisServer
) -> None:
    text = "[a]\nwindow_seconds = 0.5\n[b]\nwindow_seconds = 0.8\n"
    variables = {"REDIS_URL": redis.url, "WINDOW_SECONDS": 0.5, "MARGIN_SECONDS": 0}
    with ExitStack() as stack:
        replicas = [
            stack.enter_context(serving_bots(tmp_path, text, **variables)) for _ in range(2)
        ]
        for replica in replicas:
            eventually(lambda replica=replica: replica.status()["ready"])  # type: ignore[misc]
        connections = re.findall(r"cmd=evalsha", redis.command("CLIENT", "LIST"))
        asked = [
            (bot, replicas[number % 2].ask(bot, f"&shard={number}"))
            for number in range(6)
            for bot in ("a", "b", "default")
        ]
        answered: dict[str, list[float]] = {"a": [], "b": [], "default": []}
        for number, found in first_answers([client for _, client in asked], len(asked)):
            answered[asked[number][0]].append(found.at)
    for bot, window in {"a": 0.5, "b": 0.8, "default": 0.5}.items():
        gaps = [after - before for before, after in pairwise(answered[bot])]
        assert min(gaps) >= window - SLACK
        assert answered[bot][-1] - answered[bot][0] < 5 * window + 1.5
    assert len(connections) <= 2
    assert redis.command("EXISTS", "{gateway-queue}:bot:a:state") == ":1"


def test_idle_bots_share_one_command_per_second(tmp_path: Path) -> None:
    text = "\n".join(f"[bot{number}]" for number in range(200))
    with redis_server() as server, serving_bots(tmp_path, text, REDIS_URL=server.url) as bots:
        eventually(lambda: bool(bots.status("?bot=bot199")["ready"]))
        assert first_answers([bots.ask("bot7", "&shard=1")], 1)

        def commands() -> int:
            before = server.calls()
            time.sleep(3)  # the time of the measurement
            return server.calls() - before

        eventually(lambda: commands() <= 6)
        assert first_answers([bots.ask("bot7", "&shard=2")], 1)


def test_when_redis_is_lost_no_bot_is_early(tmp_path: Path) -> None:
    text = "[a]\nwindow_seconds = 1\n"
    with redis_server() as server:
        variables = {"REDIS_URL": server.url, "WINDOW_SECONDS": 1, "MARGIN_SECONDS": 0}
        with serving_bots(tmp_path, text, **variables) as bots:
            clients = [
                bots.ask(bot, f"&shard={one}") for one in range(2) for bot in ("a", "default")
            ]
            before = dict(first_answers(clients, 2))
            assert sorted(before) == [0, 1]
            server.kill()
            eventually(lambda: not bots.status("?bot=a")["ready"])
            assert not bots.status()["ready"]
            server.start()
            after = dict(first_answers(clients[2:], 2))
            for number in (0, 1):
                assert after[number].at - before[number].at >= 1 - SLACK
