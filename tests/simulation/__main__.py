"""The command line: ``scripts/simulate``."""

from __future__ import annotations

import argparse
import gc
import math
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path

import trio
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.fake_discord import FakeDiscord, playing
from tests.fake_discord.gateway import Gateway
from tests.redis_server import redis_server
from tests.simulation.fleet import Fleet
from tests.simulation.report import Outcome, draw, table
from tests.simulation.server import Server
from tests.simulation.ways import AskQueue, NaiveLock, OwnPace, Way

NO_QUEUE, LOCK, QUEUE = "no queue", "a naive lock", "gateway-queue"

DISCORDS_WINDOW = 5
"""Seconds."""

BUDGET = 1_000_000
"""Session starts of a day: as many as it takes, so that they can be counted."""

CRASHES_UNTIL = 0.9
"""Of the start-up: a crash at its end would make it longer."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate what the command line asks for."""
    options = _parser().parse_args(arguments)
    gc.disable()  # it would stop all clients at once for a quarter of a second
    columns = (
        TextColumn("{task.description:13}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("shards up, {task.fields[invalid]} Invalid Sessions,"),
        TimeElapsedColumn(),
    )
    with Progress(*columns) as progress:
        outcomes = [trio.run(_simulate, way, options, progress) for way in options.ways]
    print(table(outcomes))
    if options.picture:
        draw(outcomes, options.picture)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/simulate",
        description="Starts a fleet of simulated shards against a stand-in for Discord, with the "
        "real server and without it. Time is scaled: with a window that is a tenth of Discord's, "
        "all else is ten times as fast.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--shards", type=int, default=2000, help="number of shards")
    add("--processes", type=int, default=8, help="number of processes that they live in")
    add("--keys", type=int, default=16, help="number of rate limit keys, Discord's max_concurrency")
    add("--window", type=float, default=0.5, help="seconds between two starts of one key")
    add("--client-timeout", type=float, default=math.inf, help="seconds until a client asks again")
    add("--crash-rate", type=float, default=0.2, help="part of the shards that crash once")
    add("--kill-processes", type=int, default=0, help="how often a process is killed")
    add("--replicas", type=int, default=1, help="of the queue; if more than one, on a Redis")
    add("--kill-queue", type=int, default=0, help="how often the queue, or a replica, is killed")
    ways = (NO_QUEUE, LOCK, QUEUE)
    add("--ways", nargs="+", choices=ways, default=ways, help="how the shards wait")
    add("--picture", type=Path, help="where to write an SVG of the starts over time")
    add("--seed", type=int, default=0, help="of the random numbers")
    return parser


async def _simulate(way: str, options: argparse.Namespace, progress: Progress) -> Outcome:
    """Start a fleet in one way, until all of its shards are up."""
    random.seed(options.seed)
    second = options.window / DISCORDS_WINDOW
    expected = options.shards / options.keys * options.window
    with (
        playing(max_concurrency=options.keys, total=BUDGET, remaining=BUDGET) as discord,
        ExitStack() as servers,
    ):
        replicas = await _serve(servers, discord, options) if way == QUEUE else []
        gateway = Gateway(discord, options.window, heartbeat_interval=86_400)
        ways = _ways(way, options, replicas)
        fleet = Fleet(gateway, ways, options.shards, second, _crashes(options, expected))
        began_at = time.monotonic()
        async with trio.open_nursery() as nursery:
            await nursery.start(gateway.run)
            nursery.start_soon(fleet.run)
            nursery.start_soon(_often, options.kill_processes, expected, fleet.kill_process)
            if replicas:
                victims = cycle(replicas)
                nursery.start_soon(
                    _often, options.kill_queue, expected, lambda: next(victims).kill()
                )
            task = progress.add_task(way, total=options.shards, invalid=0)
            while not fleet.is_up:
                await trio.sleep(0.1)
                up, invalid = len(gateway.shards_up), len(gateway.early)
                progress.update(task, completed=up, invalid=invalid)
            nursery.cancel_scope.cancel()
    return Outcome(way, gateway, fleet.waits, began_at, options.window)


async def _serve(
    stack: ExitStack, discord: FakeDiscord, options: argparse.Namespace
) -> list[Server]:
    """Run servers that have already held their first window."""
    scale = options.window / DISCORDS_WINDOW
    settings = {
        "WINDOW_SECONDS": options.window,
        "MARGIN_SECONDS": 0.25 * scale,
        "CONFIRM_SECONDS": 15 * scale,
        "PLACE_SECONDS": 30 * scale,
    }
    if options.replicas > 1:
        settings["REDIS_URL"] = stack.enter_context(redis_server()).url
    servers = [Server(stack, **discord.variables(**settings)) for _ in range(options.replicas)]
    await trio.sleep(2 * options.window)
    return servers


def _ways(way: str, options: argparse.Namespace, replicas: Sequence[Server]) -> Sequence[Way]:
    """Return how the shards of each process wait."""
    second = options.window / DISCORDS_WINDOW
    if replicas:
        ports = [replica.port for replica in replicas]
        return [AskQueue(ports, options.client_timeout, second)] * options.processes
    if way == LOCK:
        return [NaiveLock(options.keys, second)] * options.processes
    return [OwnPace(options.keys, options.window) for _ in range(options.processes)]


def _crashes(options: argparse.Namespace, expected: float) -> dict[int, float]:
    """Choose which shards crash, and when."""
    crashing = random.sample(range(options.shards), int(options.crash_rate * options.shards))
    now = trio.current_time()
    return {shard: now + random.uniform(0, CRASHES_UNTIL * expected) for shard in crashing}


async def _often(times: int, expected: float, act: Callable[[], Awaitable[None]]) -> None:
    """Do something a number of times in the course of the start-up."""
    for _ in range(times):
        await trio.sleep(expected / (times + 1))
        await act()


if __name__ == "__main__":
    main()
