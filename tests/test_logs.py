"""The lines of the log: what is in them, and how often they come."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator

import pytest
import structlog
import trio
from structlog.testing import capture_logs
from structlog.typing import EventDict
from trio.testing import MockClock

from gateway_queue.about import __version__
from gateway_queue.discord.api import BadToken, SessionStartLimit, Unavailable
from gateway_queue.discord.limits import Limits
from gateway_queue.observing.budget_alarm import BudgetAlarm
from gateway_queue.observing.event_log import DEPARTURES_SECONDS, EventLog
from gateway_queue.observing.lines import SELDOM_SECONDS, Limiter, clean
from gateway_queue.queue.events import Abandoned, Released, SlotTooLate
from gateway_queue.settings import Settings
from gateway_queue.store import SessionStarts
from tests.fake_discord import TOKEN, playing
from tests.harness import Server, environ, eventually, installed, serving
from tests.redis_server import redis_server
from tests.running import running


@pytest.fixture
def logged() -> Iterator[list[EventDict]]:
    with capture_logs() as lines:
        yield lines


def lines_with(server: Server, words: str) -> list[str]:
    return [line for line in server.lines if words in line]


def test_the_first_line_says_what_runs() -> None:
    variables = {"MAX_CONCURRENCY": 3, "WINDOW_SECONDS": 7, "AUTH_TOKEN": "s3cret"}
    with serving(LOG_FORMAT="json", **variables) as server:
        first = json.loads(server.lines[0])
        port = server.port
        assert not lines_with(server, "s3cret")
    assert first["event"] == "gateway-queue starts"
    assert first["version"] == __version__
    assert first["addresses"] == [f"127.0.0.1:{port}"]
    assert (first["window"], first["keys"], first["store"]) == (7.0, 3, "memory")
    assert (first["auth_token"], first["session_start_limit"]) == (True, None)


def test_with_a_token_the_keys_are_discords() -> None:
    with (
        playing() as discord,
        serving(DISCORD_TOKEN=TOKEN, DISCORD_API_URL=discord.url) as server,
    ):
        assert "keys='from Discord'" in server.lines[0]
        eventually(lambda: bool(lines_with(server, "Discord session limits")))
        assert "resets_in=" in lines_with(server, "Discord session limits")[0]


def test_an_outage_of_redis_is_one_warning_and_its_end_a_line() -> None:
    with redis_server() as redis, serving(REDIS_URL=redis.url) as server:
        eventually(lambda: server.get("/readyz").status == 200)
        redis.kill()
        eventually(lambda: server.status()["faults"]["store"] is not None)
        eventually(lambda: server.status()["faults"]["store"]["for"] > 1)
        redis.start()
        eventually(lambda: server.get("/readyz").status == 200)
        eventually(lambda: len(lines_with(server, "connected to Redis")) == 2)
        assert len([line for line in lines_with(server, "Redis") if "[warning" in line]) == 1
        assert "after=" in lines_with(server, "connected to Redis")[-1]


class Flaky:
    """A Discord that fails some times, and then answers."""

    def __init__(self, failures: int) -> None:
        self._failures = failures

    async def session_start_limit(self) -> SessionStartLimit:
        await trio.lowlevel.checkpoint()
        self._failures -= 1
        if self._failures == 1:
            raise BadToken
        if self._failures >= 0:
            raise Unavailable(f"failure {self._failures}")
        return SessionStartLimit(1000, 1000, 86_400, 1)


async def test_an_outage_of_discord_is_one_warning_and_its_end_a_line(
    autojump_clock: MockClock, logged: list[EventDict]
) -> None:
    async with running() as queue, trio.open_nursery() as nursery:
        nursery.start_soon(Limits(Flaky(4), queue, Settings()).run)  # type: ignore[arg-type]
        await trio.sleep(30)
        nursery.cancel_scope.cancel()
    (warning,) = [line for line in logged if line["log_level"] == "warning"]
    assert warning["event"] == "cannot ask Discord for its limits"
    assert (warning["reason"], warning["retry_in"]) == ("failure 3", 1)
    (recovery,) = [line for line in logged if line["event"] == "Discord answers again"]
    assert recovery["after"] == 1 + 2 + 4 + 8


def test_a_refusal_names_its_client_and_is_logged_seldom() -> None:
    with serving() as server:
        for number in range(20):
            server.get(f"/?shard=-{number + 1}")
        server.settle()
        (line,) = lines_with(server, "refused")
    assert "client=127.0.0.1:" in line
    assert "status=400" in line


def test_a_client_that_left_is_named_at_debug() -> None:
    with serving(LOG_LEVEL="debug") as server:
        client = server.ask(7)
        eventually(lambda: server.status()["waiting"] == 1)
        port = client.socket.getsockname()[1]
        client.hang_up()
        eventually(lambda: bool(lines_with(server, "client disconnected before its turn")))
        (line,) = lines_with(server, "client disconnected before its turn")
    assert f"client=127.0.0.1:{port}" in line
    assert "shard=7" in line
    assert "waited=" in line


def test_a_client_that_has_its_answer_is_not_logged_as_disconnected() -> None:
    with serving(LOG_LEVEL="debug", HOLD_ON_START="false", WINDOW_SECONDS=0.1) as server:
        server.ask(7).answer()
        confirmed = server.connect(b"GET /?shard=1&confirm=true HTTP/1.1\r\nHost: q\r\n\r\n")
        eventually(lambda: server.status()["released"] == 2)
        confirmed.hang_up()
        eventually(lambda: bool(lines_with(server, "identified")))
        server.settle()
        assert not lines_with(server, "client disconnected before its turn")


async def test_clients_that_left_are_counted_once_per_minute(
    autojump_clock: MockClock, logged: list[EventDict]
) -> None:
    log = EventLog()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(log.run)
        await trio.sleep(1000)
        for _ in range(3):
            log.observe(Abandoned(1))
        await trio.sleep(DEPARTURES_SECONDS + 1)
        log.observe(Abandoned(1))
        await trio.sleep(DEPARTURES_SECONDS + 1)
        await trio.sleep(1000)
        nursery.cancel_scope.cancel()
    assert [line["count"] for line in logged] == [3, 1]


def test_the_log_says_when_a_slow_store_is_fast_again(logged: list[EventDict]) -> None:
    log = EventLog()
    released = Released(1, 0, 0.0, 0.0, 0.0, 0)
    for event in (released, SlotTooLate(), SlotTooLate(), released, released):
        log.observe(event)
    events = [line["event"] for line in logged if line["event"] != "released"]
    slow = "the store is too slow to release tickets"
    assert events == [slow, slow, "the store is fast enough again"]


def test_the_log_says_when_session_starts_are_left_again(logged: list[EventDict]) -> None:
    alarm = BudgetAlarm()
    for used in (9, 10, 10, 2, 3):
        alarm.check(SessionStarts(used, 10, True, 60, 60, "configured"))
    ends = [line for line in logged if line["event"] == "session starts are left again"]
    assert [line["remaining"] for line in ends] == [8]


def test_a_limited_line_counts_the_lines_that_were_dropped() -> None:
    now = 0.0
    limit = Limiter(lambda: now)
    other: EventDict = {"event": "released"}
    assert limit(None, "info", other) is other
    assert limit(None, "warning", {"event": "refused"}) == {"event": "refused"}
    for _ in range(3):
        with pytest.raises(structlog.DropEvent):
            limit(None, "warning", {"event": "refused"})
    now = SELDOM_SECONDS
    assert limit(None, "warning", {"event": "refused"}) == {"event": "refused", "unlogged": 3}


def test_logged_values_are_escaped_and_cut() -> None:
    line = {"event": "a\x1b[2J", "reason": "b" * 10_000, "exception": "c\n\x07", "number": 1}
    cleaned = clean(None, "info", line)
    assert cleaned["event"] == r"a\x1b[2J"
    assert cleaned["reason"] == "b" * 150 + "[9700 characters more]" + "b" * 150
    assert (cleaned["exception"], cleaned["number"]) == ("c\n\\x07", 1)


SPEAKER = """
import logging
import structlog
from gateway_queue.observing import logs
from gateway_queue.settings import Settings
logs.configure(Settings(log_format={log_format!r}))
structlog.stdlib.get_logger("gateway_queue").warning("\\x1b[2J", reason="\\a" * 9000)
logging.getLogger("gateway_queue.hypercorn").error("\\x9b\\r")
"""


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_lines_of_all_loggers_are_clean(log_format: str) -> None:
    code = SPEAKER.format(log_format=log_format)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = done.stderr.splitlines()
    assert first.isprintable()
    assert second.isprintable()
    assert "8700 characters more" in first


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_colours_on_a_terminal_only(no_color: str, coloured: bool) -> None:
    main, terminal = pty.openpty()
    with serving() as server:
        assert not lines_with(server, "\x1b")
    process = subprocess.Popen(
        [installed("gateway-queue")], env=environ(PORT=0, NO_COLOR=no_color), stderr=terminal
    )
    try:
        os.close(terminal)
        text = b""
        while b"starts" not in text:
            text += os.read(main, 1000)
        assert (b"\x1b" in text) is coloured
    finally:
        process.kill()
        process.wait()
        os.close(main)
