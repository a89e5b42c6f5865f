"""How often Discord refuses an IDENTIFY: real libraries, Discord's window, slow bots and networks.

``scripts/measure-identifies`` prints the table of the README.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from tests.fake_discord.gateway import Gateway, enforcing
from tests.fake_discord.latency import Latency
from tests.harness import Server, eventually, free_port, serving
from tests.libraries import SHARDS, Script, running_bots
from tests.libraries.node import DISCORD_JS, DISCORDENO
from tests.libraries.python import DISCORD_PY, HIKARI

KEYS = 4
PATIENCE = 300.0
"""Seconds that a fleet may take to start."""

FROM_READY = {"counts_from_ready": True, "seconds_to_ready": 0.3}

FIRST, OTHERS = HIKARI, (DISCORD_PY, DISCORD_JS, DISCORDENO)
"""A library for each process. hikari connects ``KEYS`` shards and pauses for 5 s when they are up.
So it comes first: otherwise its pause would fall into the last windows."""

BUSY_PYTHON = """
import asyncio, time
async def be_busy():
    while True:
        end = time.perf_counter() + {slice}
        while time.perf_counter() < end:
            pass
        await asyncio.sleep({slice})
"""
BUSY_NODE = """
setInterval(() => {{
  const end = performance.now() + 1000 * {slice};
  while (performance.now() < end);
}}, 2000 * {slice});
"""
START_BUSY = {
    "discord.py": "async def setup_hook():\n    bot.busy = asyncio.create_task(be_busy())\n"
    "bot.setup_hook = setup_hook\nbot.run",
    "hikari": "@bot.listen()\nasync def start_busy(_: hikari.StartingEvent):\n"
    "    bot.busy = asyncio.create_task(be_busy())\nbot.run",
}


@dataclass(frozen=True)
class Way:
    """How shards ask, and how the stand-in counts."""

    confirm: bool
    margin: float
    """Seconds with a window of 5 s; with another window, in proportion to it."""
    options: dict[str, Any]
    """Options of the stand-in."""


WAYS = {
    "margin 0": Way(confirm=False, margin=0, options={}),
    "margin 0.25 s": Way(confirm=False, margin=0.25, options={}),
    "confirmed": Way(confirm=True, margin=0.25, options={}),
    "confirmed, counted from READY": Way(confirm=True, margin=0.25, options=FROM_READY),
}


@dataclass(frozen=True)
class Conditions:
    """What delays shards."""

    busy: float | None = None
    """Seconds that each process computes at a time, and then pauses."""
    latency: Latency | None = None


CONDITIONS = {
    "idle": Conditions(),
    "30 ± 10 ms to Discord": Conditions(latency=Latency(0.03, 0.01)),
    "150 ± 40 ms to Discord": Conditions(latency=Latency(0.15, 0.04)),
    "busy bots, slices of 50 ms": Conditions(busy=0.05),
    "busy bots, slices of 400 ms": Conditions(busy=0.4),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    options = _parser().parse_args(arguments)
    print(f"| | {' | '.join(options.ways)} |", "|" + " --- |" * (len(options.ways) + 1), sep="\n")
    for name in options.conditions:
        cells = [_measure(CONDITIONS[name], WAYS[way], options.window) for way in options.ways]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def _parser() -> argparse.ArgumentParser:
    names = ", ".join(library.name for library in (FIRST, *OTHERS))
    parser = argparse.ArgumentParser(
        prog="scripts/measure-identifies",
        description=f"Starts {SHARDS} shards on {KEYS} rate limit keys ({names}; a process each) "
        "with the real server, against a stand-in for Discord that enforces its window. A cell "
        "shows how many IDENTIFYs got an Invalid Session, and the speed of the start-up as a share "
        "of the limit. A cell takes about 40 s, the whole table about 15 minutes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--conditions", nargs="+", choices=CONDITIONS, default=list(CONDITIONS), metavar="NAME")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="NAME")
    add("--window", type=float, default=5.0, help="seconds, of the server and of the stand-in")
    return parser


def _measure(conditions: Conditions, way: Way, window: float) -> str:
    """Start a fleet, and return the text of a cell of the table."""
    port = free_port()
    with (
        enforcing(
            window, max_concurrency=KEYS, latency=conditions.latency, **way.options
        ) as gateway,
        ExitStack() as stack,
    ):
        variables = gateway.discord.variables(
            PORT=port, WINDOW_SECONDS=window, MARGIN_SECONDS=way.margin * window / 5
        )
        queue = stack.enter_context(serving(**variables))

        def start(number: int, library: Script) -> None:
            library = _busy(library, conditions.busy)
            bots = running_bots(library, gateway, port, confirm=way.confirm)
            stack.enter_context(bots).start(number)

        start(0, FIRST)
        eventually(lambda: _asked(queue) >= KEYS)
        for number, library in enumerate(OTHERS, 1):
            start(number, library)
        eventually(lambda: len(gateway.shards_up) == SHARDS, PATIENCE)
    return _cell(gateway)


def _asked(queue: Server) -> int:
    status = queue.status()
    return int(status["waiting"]) + int(status["released"])


def _busy(library: Script, seconds: float | None) -> Script:
    """Make a bot compute and pause in turn, ``seconds`` each; with None, change nothing."""
    if seconds is None:
        return library
    if library.name not in START_BUSY:
        return replace(library, start=BUSY_NODE.format(slice=seconds) + library.start)
    start = library.start.replace("bot.run", START_BUSY[library.name])
    return replace(library, start=BUSY_PYTHON.format(slice=seconds) + start)


def _cell(gateway: Gateway) -> str:
    at_least = (SHARDS / KEYS - 1) * gateway.window
    took = gateway.started[-1].at - gateway.started[0].at
    return f"{len(gateway.early)} of {len(gateway.identifies)}, {at_least / took:.0%}"


if __name__ == "__main__":
    main()
