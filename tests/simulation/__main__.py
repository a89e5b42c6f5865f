"""The command line: ``scripts/simulate``."""

from __future__ import annotations

import argparse
import gc
import math
import random
import re
import textwrap
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
from tests.simulation.picture import draw
from tests.simulation.report import DISCORDS_WINDOW, Outcome, table
from tests.simulation.server import Server
from tests.simulation.ways import AskQueue, ExpiringLock, OwnPace, Way

NO_QUEUE, LOCK, QUEUE = "no queue", "a lock", "gateway-queue"

WAYS = {
    NO_QUEUE: "each process counts windows by itself, as the libraries do",
    LOCK: "a lock for each key in a Redis that takes no time; it expires by itself, and "
    "every shard tries it every 500 ms",
    QUEUE: "the real server, with confirmed tickets",
}

GUILDS_OF_SHARD = 1000
LARGE_BOT = 150_000
"""Guilds from which on a bot has more session starts."""

LOOK_SECONDS = 0.1

CRASHES_UNTIL = 0.9
"""Share of the start-up with crashes: a crash at its end would make it longer."""


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
        draw(outcomes, options.shards, options.picture)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/simulate",
        description=textwrap.fill(
            "Starts a fleet of simulated shards against a stand-in for Discord, with the real "
            "server and without it, and compares. With the defaults this takes about 8 minutes. "
            "The time is scaled: with --window 1, everything is five times as fast as on Discord, "
            "where the window is 5 s. The table and the picture show seconds of Discord's clock.",
            80,
        ),
        epilog=_explain_ways(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    number, seconds = _whole(1), _seconds
    add("--shards", type=number, default=2000, metavar="N", help="number of shards (2000)")
    add(
        "--processes", type=number, default=8, metavar="N", help="processes that run the shards (8)"
    )
    add("--keys", type=number, default=16, metavar="N", help="rate limit keys (16)")
    add("--window", type=seconds, default=1.0, metavar="S", help="real seconds of a window (1)")
    add(
        "--session-starts",
        type=number,
        metavar="N",
        help="session starts per day; beyond it, Discord resets the token (as Discord grants a bot "
        "with 1,000 guilds per shard: 10000 for 2,000 shards)",
    )
    add(
        "--lock-seconds",
        type=seconds,
        default=5.1,
        metavar="S",
        help="seconds until a lock expires, by Discord's clock (5.1)",
    )
    add(
        "--client-timeout",
        type=seconds,
        default=math.inf,
        metavar="S",
        help="real seconds after which a client asks the queue again (never)",
    )
    add("--crash-rate", type=_share, default=0.2, metavar="P", help="shards that crash once (0.2)")
    times, counts = "how many times a process is killed (0)", _whole(0)
    add("--kill-processes", type=counts, default=0, metavar="N", help=times)
    add(
        "--replicas",
        type=number,
        default=1,
        metavar="N",
        help="replicas of the queue; if more than one, with a Redis (1)",
    )
    times = "how many times the queue, or a replica, is killed (0)"
    add("--kill-queue", type=counts, default=0, metavar="N", help=times)
    add(
        "--ways", nargs="+", choices=[*WAYS], default=[*WAYS], metavar="WAY", help="see below (all)"
    )
    add("--picture", type=Path, metavar="FILE", help="write an SVG of the shards over time")
    add("--seed", type=int, default=0, metavar="N", help="seed of the random numbers (0)")
    return parser


def _explain_ways() -> str:
    lines = [
        textwrap.fill(f"{name:<15}{text}", 80, initial_indent="  ", subsequent_indent=17 * " ")
        for name, text in WAYS.items()
    ]
    return "\n".join(["ways to wait for a turn:", *lines])


def _whole(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not re.fullmatch("[0-9]{1,9}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least}, not {text!r}")
        return int(text)

    return number


def _seconds(text: str) -> float:
    try:
        if (seconds := float(text)) > 0:
            return seconds
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be seconds over 0, not {text!r}")


def _share(text: str) -> float:
    try:
        if 0 <= (share := float(text)) <= 1:
            return share
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, not {text!r}")


def _budget(shards: int) -> int:
    """Return how many sessions a bot of this size may start in a day."""
    guilds = GUILDS_OF_SHARD * shards
    return max(2000, guilds // 1000 * 5) if guilds >= LARGE_BOT else 1000


async def _simulate(way: str, options: argparse.Namespace, progress: Progress) -> Outcome:
    """Start a fleet in one way, until all of its shards are up."""
    random.seed(options.seed)
    second = options.window / DISCORDS_WINDOW
    expected = options.shards / options.keys * options.window
    budget = options.session_starts or _budget(options.shards)
    with (
        playing(max_concurrency=options.keys, total=budget, remaining=budget) as discord,
        ExitStack() as servers,
    ):
        replicas = await _serve(servers, discord, options) if way == QUEUE else []
        gateway = Gateway(discord, options.window, heartbeat_interval=86_400)
        ways = _ways(way, options, replicas)
        fleet = Fleet(gateway, ways, options.shards, second, _crashes(options, expected))
        up = [(time.monotonic(), 0)]
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
            while not (fleet.is_up or gateway.over_budget):
                await trio.sleep(LOOK_SECONDS)
                up.append((time.monotonic(), len(gateway.shards_up)))
                progress.update(task, completed=up[-1][1], invalid=len(gateway.early))
            nursery.cancel_scope.cancel()
    return Outcome(way, gateway, fleet.waits, up)


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
        return [ExpiringLock(options.keys, second, options.lock_seconds)] * options.processes
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
