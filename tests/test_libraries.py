"""The README's recipes, with the libraries that they are for, against a stand-in for Discord."""

from __future__ import annotations

import signal
import subprocess

import pytest
import trio

from tests.fake_discord.gateway import Gateway, enforcing
from tests.harness import PATIENCE, eventually, free_port, serving
from tests.libraries import (
    DISCORD_JS,
    DISCORD_PY,
    DISCORDENO,
    HIKARI,
    SHARDS,
    recipe,
    running_bots,
)

WINDOW, DISCORDS_WINDOW = 0.5, 0.1
"""Seconds. On an overloaded machine a process takes up to 0.4 s from the answer to its IDENTIFY,
which does not scale with the windows. Other tests hold the queue's exactness."""

FLEETS = {
    "discord.py": (DISCORD_PY, 1),
    "hikari": (HIKARI, 4),
    "discord.js": (DISCORD_JS, 4),
    "discordeno": (DISCORDENO, 4),
}
"""The library, and the number of rate limit keys."""

LONG = 3 * PATIENCE
"""Seconds that a fleet may take to start, on a busy machine."""


def wait_until_all_are_up(gateway: Gateway) -> None:
    eventually(lambda: len(gateway.shards_up) == SHARDS, LONG)


@pytest.mark.parametrize("name", FLEETS)
def test_no_shard_gets_an_invalid_session(name: str) -> None:
    library, keys = FLEETS[name]
    port = free_port()
    with (
        enforcing(DISCORDS_WINDOW, max_concurrency=keys) as gateway,
        running_bots(library, gateway, port) as bots,
    ):
        variables = gateway.discord.variables(PORT=port, WINDOW_SECONDS=WINDOW)
        bots.start_all()
        with serving(**variables) as queue:
            eventually(lambda: len(gateway.shards_up) >= 6, LONG)
            queue.signal(signal.SIGKILL)
            queue.wait()
        with serving(**variables) as queue:
            eventually(lambda: queue.status()["waiting"] > 0)
            bots.kill(3)
            bots.start(3)
            wait_until_all_are_up(gateway)

            bots.kill_all()
            eventually(lambda: not gateway.shards_up)
            bots.start_all()
            wait_until_all_are_up(gateway)

            before = len(gateway.identifies)
            trio.from_thread.run(gateway.reconnect_all, trio_token=gateway.trio_token)
            # Whoever is told so right after its READY may identify anew, in its turn.
            eventually(lambda: gateway.resumed + len(gateway.identifies) - before >= SHARDS, LONG)
            assert gateway.resumed >= SHARDS // 2
    assert gateway.early == []


def test_nobody_starts_when_the_days_starts_are_spent() -> None:
    port = free_port()
    with (
        enforcing(DISCORDS_WINDOW, max_concurrency=4, remaining=20) as gateway,
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


@pytest.mark.parametrize("name", FLEETS)
def test_without_the_queue_the_same_fleet_gets_many(name: str) -> None:
    library, keys = FLEETS[name]
    with (
        enforcing(5, max_concurrency=keys) as gateway,
        running_bots(library, gateway, None) as bots,
    ):
        bots.start_all()
        eventually(lambda: len(gateway.early) >= 6, LONG)


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


@pytest.mark.parametrize("name", ["discord.js", "discordeno"])
def test_a_shard_that_stops_waiting_leaves_the_line(name: str) -> None:
    """Discord ends its connection; discord.py and hikari do not hear of that in the meantime."""
    library, keys = FLEETS[name]
    port = free_port()
    with (
        enforcing(DISCORDS_WINDOW, max_concurrency=keys) as gateway,
        running_bots(library, gateway, port) as bots,
    ):
        variables = gateway.discord.variables(PORT=port, WINDOW_SECONDS=3600)
        with serving(**variables) as queue:
            bots.start(0)
            eventually(lambda: queue.status()["waiting"] > 3)
            trio.from_thread.run(gateway.reconnect_all, trio_token=gateway.trio_token)
            eventually(lambda: queue.status()["abandoned"] > 3)
            eventually(lambda: queue.status()["waiting"] > 3)
