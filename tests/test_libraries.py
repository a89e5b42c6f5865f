"""The README's recipes, with the libraries that they are for, against a stand-in for Discord."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import trio

from tests.fake_discord.gateway import Gateway, enforcing
from tests.fake_discord.latency import Latency
from tests.harness import GO, PATIENCE, Server, eventually, free_port, serving
from tests.libraries import PROCESSES, SHARDS, Library, Script, recipe, running_bots
from tests.libraries.chaos import (
    LONG,
    fleet_after_chaos,
    fleets,
    gets_invalid_sessions_without_the_queue,
    wait_until_all_are_up,
)
from tests.libraries.node import DISCORD_JS, DISCORDENO
from tests.libraries.python import DISCORD_PY, DISNAKE, HIKARI, NEXTCORD, PY_CORD

WINDOW = 0.5
"""Seconds, of the queue and of the stand-in. The time that a shard takes to identify does not scale
with it, but confirmed tickets do not depend on that time."""

DISCORDS_WINDOW, DISCORDS_MARGIN = 5.0, 0.25
"""Seconds of Discord's window, and of the default margin."""

KEYS = 4

FLEETS = {library.name: library for library in (DISCORD_PY, HIKARI)}
FORKS = {library.name: library for library in (PY_CORD, DISNAKE, NEXTCORD)}
FLEETS_AND_FORKS: dict[str, Library] = {**FLEETS, **FORKS}

FROM_READY: dict[str, Any] = {"counts_from_ready": True, "seconds_to_ready": 0.05}
"""The stricter way to count: an IDENTIFY that is early by its arrival is early by READY too."""


@pytest.mark.timeout(300)  # forks are installed first
@pytest.mark.parametrize(
    ("library", "max_concurrency"), fleets(FLEETS_AND_FORKS.values(), [DISCORD_PY])
)
def test_no_shard_gets_an_invalid_session(library: Library, max_concurrency: int) -> None:
    with fleet_after_chaos(library, max_concurrency) as fleet:
        gateway = fleet.gateway
        before = len(gateway.identifies)
        fleet.reconnect_all()
        # A shard that reconnects right after its READY may identify anew, in its turn.
        eventually(lambda: gateway.resumed + len(gateway.identifies) - before >= SHARDS, LONG)
        assert gateway.resumed >= SHARDS // 2


@dataclass(frozen=True)
class Conditions:
    """The conditions of a fleet with Discord's window and the queue's defaults."""

    library: Library
    options: dict[str, Any]
    """Options of the stand-in."""


def starts_without_invalid_session(conditions: Conditions) -> bool:
    port = free_port()
    with (
        enforcing(DISCORDS_WINDOW, max_concurrency=KEYS, **conditions.options) as gateway,
        running_bots(conditions.library, gateway, port) as bots,
    ):
        variables = gateway.discord.variables(PORT=port, MARGIN_SECONDS=DISCORDS_MARGIN)
        with serving(**variables):
            bots.start_all()
            wait_until_all_are_up(gateway)
    return gateway.early == []


@pytest.mark.libraries
def test_with_discords_own_window_no_shard_gets_an_invalid_session() -> None:
    """Four fleets at the same time, over slow networks."""
    fleets = [
        Conditions(DISCORD_PY, {"latency": Latency(0.03, 0.01)}),
        Conditions(HIKARI, {"latency": Latency(0.15, 0.04)}),
        Conditions(DISCORD_JS, {"latency": Latency(0.15, 0.04), **FROM_READY}),
        Conditions(DISCORDENO, {"latency": Latency(0.03, 0.01), **FROM_READY}),
    ]
    with ThreadPoolExecutor(len(fleets)) as threads:
        assert all(threads.map(starts_without_invalid_session, fleets))


def test_no_shard_starts_when_the_days_starts_are_spent() -> None:
    port = free_port()
    with (
        enforcing(WINDOW, max_concurrency=KEYS, remaining=20) as gateway,
        running_bots(DISCORDENO, gateway, port) as bots,
    ):
        variables = gateway.discord.variables(PORT=port, WINDOW_SECONDS=WINDOW)
        with serving(**variables, DISCORD_REFRESH_SECONDS=0.5) as queue:
            bots.start_all()
            eventually(lambda: len(gateway.shards_up) == 20, LONG)
            eventually(lambda: any(lane["opens_in"] > 60 for lane in queue.status()["lanes"]))
            gateway.discord.remaining = gateway.discord.total  # the next day
            wait_until_all_are_up(gateway)
    assert gateway.over_budget == 0
    assert gateway.early == []


@pytest.mark.libraries
@pytest.mark.timeout(300)
@pytest.mark.parametrize("library", FLEETS_AND_FORKS.values(), ids=FLEETS_AND_FORKS)
def test_without_the_queue_the_same_fleet_gets_invalid_sessions(library: Library) -> None:
    gets_invalid_sessions_without_the_queue(library)


def test_a_shell_script_asks_again_until_it_is_its_turn() -> None:
    port = free_port()
    shell = subprocess.Popen(["sh", "-c", recipe("Shell", port)])
    try:
        with serving(PORT=port, WINDOW_SECONDS=0.1) as server:
            eventually(lambda: server.status()["released"] == 1)
            assert shell.wait(PATIENCE) == 0
    finally:
        shell.kill()
        shell.wait()


@contextmanager
def one_process(library: Library, *, hold: bool = True, **options: Any) -> Iterator[Process]:
    """Start one process of a fleet. The queue releases one shard per key, or none if it holds."""
    port = free_port()
    with (
        enforcing(WINDOW, max_concurrency=KEYS, **options) as gateway,
        running_bots(library, gateway, port) as bots,
    ):
        variables = gateway.discord.variables(PORT=port, WINDOW_SECONDS=3600, HOLD_ON_START=hold)
        with serving(**variables) as queue:
            bots.start(0)
            yield Process(gateway, queue)


@dataclass(frozen=True)
class Process:
    """One process of a fleet, of ``SHARDS / PROCESSES`` shards."""

    gateway: Gateway
    queue: Server

    def let_discord(self, act: Callable[[], Awaitable[None]]) -> None:
        """Run a method of the gateway."""
        trio.from_thread.run(act, trio_token=self.gateway.trio_token)


@pytest.mark.parametrize("name", FLEETS)
def test_a_shard_whose_connection_ends_leaves_the_queue(name: str) -> None:
    with one_process(FLEETS[name]) as process:
        eventually(lambda: process.queue.status()["waiting"] >= KEYS, LONG)
        process.let_discord(process.gateway.close_all)
        eventually(lambda: process.queue.status()["abandoned"] >= KEYS, LONG)
        eventually(lambda: process.queue.status()["waiting"] >= KEYS, LONG)
        assert process.gateway.identifies == []


@pytest.mark.parametrize("name", FLEETS)
def test_shards_resume_while_others_wait(name: str) -> None:
    with one_process(FLEETS[name], hold=False) as process:
        eventually(lambda: len(process.gateway.shards_up) == KEYS, LONG)
        eventually(lambda: process.queue.status()["waiting"] == SHARDS // PROCESSES - KEYS, LONG)
        process.let_discord(process.gateway.reconnect_all)
        eventually(lambda: process.gateway.resumed == KEYS, LONG)
        eventually(lambda: process.queue.status()["abandoned"] == SHARDS // PROCESSES - KEYS, LONG)
        assert len(process.gateway.identifies) == KEYS


DEAD_AFTER = {
    "discord.py": replace(
        DISCORD_PY,
        start=DISCORD_PY.start.replace("shard_ids=", "heartbeat_timeout=3.0, shard_ids="),
    ),
    "hikari": HIKARI,
}
"""discord.py finds a dead connection after ``heartbeat_timeout``, hikari after two heartbeats."""


@pytest.mark.parametrize("name", DEAD_AFTER)
def test_dead_connections_are_found_while_shards_wait_and_later(name: str) -> None:
    with one_process(DEAD_AFTER[name], hold=False, heartbeat_interval=1.0) as process:
        eventually(lambda: process.queue.status()["waiting"] == SHARDS // PROCESSES - KEYS, LONG)
        process.gateway.acknowledges = False
        eventually(lambda: process.gateway.resumed >= KEYS, LONG)
        eventually(lambda: process.queue.status()["abandoned"] >= SHARDS // PROCESSES - KEYS, LONG)


PRESENCE_AT_ONCE = """
class AtOnce(discord.client.DiscordWebSocket):
    async def identify(self):
        await super().identify()  # no other task runs before the change
        await self.change_presence(status=discord.Status.idle)

discord.client.DiscordWebSocket = discord.shard.DiscordWebSocket = AtOnce
bot.run"""

PRESENCE_WHEN_CONNECTED = """
@bot.event
async def on_shard_connect(shard_id):
    if shard_id == shards[0]:
        while len(bot.shards) < len(shards):  # connected; they wait until they may identify
            await asyncio.sleep(0.01)
        await bot.change_presence(status=discord.Status.idle)

import asyncio
bot.run"""


@pytest.mark.parametrize(
    "change", [PRESENCE_AT_ONCE, PRESENCE_WHEN_CONNECTED], ids=["at once", "when connected"]
)
def test_a_waiting_shard_sends_a_change_of_presence_only_after_its_identify(change: str) -> None:
    """Discord closes a connection that sends anything before the IDENTIFY."""
    start = DISCORD_PY.start.replace("bot.run", change)
    port = free_port()
    with (
        enforcing(WINDOW) as gateway,
        running_bots(replace(DISCORD_PY, start=start), gateway, port) as bots,
    ):
        variables = gateway.discord.variables(PORT=port, WINDOW_SECONDS=WINDOW)
        with serving(**variables) as queue:
            bots.start(0)
            eventually(lambda: gateway.presences == SHARDS // PROCESSES)
            assert queue.status()["abandoned"] == 0


def test_discord_py_sends_the_token_of_the_queue() -> None:
    port = free_port()
    change = f"""
discord_py.use_queue(discord, "http://127.0.0.1:{port}", auth_token="0123456789abcdef")
bot.run"""
    start = DISCORD_PY.start.replace("bot.run", change)
    with (
        enforcing(WINDOW, max_concurrency=KEYS) as gateway,
        running_bots(replace(DISCORD_PY, start=start), gateway, port) as bots,
        serving(
            PORT=port, WINDOW_SECONDS=WINDOW, AUTH_TOKEN="0123456789abcdef", MAX_CONCURRENCY=KEYS
        ),
    ):
        bots.start(0)
        eventually(lambda: len(gateway.shards_up) == SHARDS // PROCESSES)


def with_one_shard(library: Script, head: str = "") -> Script:
    """Return a library whose first process has one shard; ``head`` is code that runs first."""
    return replace(library, start=head + library.start.replace("_ids=shards", "_ids=shards[:1]"))


def next_request(listener: socket.socket) -> socket.socket:
    """Wait for the next request to a queue that the test imitates, and return its connection."""
    connection, _ = listener.accept()
    assert connection.recv(65536).startswith(b"POST /?shard=0&confirm=true HTTP/1.1\r\n")
    return connection


@contextmanager
def one_shard_asking(library: Library) -> Iterator[tuple[socket.socket, Gateway]]:
    """Let a shard ask a queue that the test imitates."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE)
        with (
            enforcing(WINDOW) as gateway,
            running_bots(library, gateway, listener.getsockname()[1]) as bots,
        ):
            bots.start(0)
            yield listener, gateway


HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
MESSAGE = b"%x\r\n%s\r\n" % (len(GO), GO)
ERRORS = {
    "no answer": b"",
    "503": b"HTTP/1.1 503 Busy\r\ncontent-length: 2\r\n\r\n{}",
    "no message": HEAD,
    "an empty message": HEAD + b"0\r\n\r\n",
}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("name", FLEETS)
def test_a_shard_asks_again_a_second_after_an_error_and_confirms(name: str, error: str) -> None:
    with one_shard_asking(with_one_shard(FLEETS[name])) as (listener, gateway):
        with next_request(listener) as first:
            first.sendall(ERRORS[error])
        failed = time.monotonic()
        with next_request(listener) as second:
            assert time.monotonic() - failed > 0.9
            assert gateway.identifies == []
            second.sendall(HEAD + MESSAGE)
            assert second.recv(1) == b""
            assert gateway.shards_up == {0}


def test_a_shard_on_discord_py_asks_again_at_once_after_its_own_timeout() -> None:
    shorten = """
import aiohttp
discord_py._TIMEOUT = aiohttp.ClientTimeout(total=None, sock_read=0.1)
"""
    with one_shard_asking(with_one_shard(DISCORD_PY, shorten)) as (listener, _):
        first = next_request(listener)
        asked = time.monotonic()
        connections = [first, *(next_request(listener) for _ in range(4))]
        waited = time.monotonic() - asked
        for connection in connections:
            connection.close()
    assert waited < 15, "four errors would take 1 + 2 + 4 + 8 s"
