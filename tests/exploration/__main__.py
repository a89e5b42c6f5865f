"""The command line: ``scripts/explore``."""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Iterable, Sequence

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.exploration import wire_run
from tests.exploration.invariants import INVARIANTS, broken
from tests.exploration.pool import Choice, Outcome, try_seeds
from tests.exploration.run import explore
from tests.exploration.scenario import ALL_KINDS


def main(arguments: Sequence[str] | None = None) -> int:
    """Explore what the command line asks for, and return the exit status."""
    options = _options(arguments)
    names = _names(http=options.http)
    ignore = set(options.ignore)
    if options.only:
        ignore |= set(names) - set(options.only)
    choice = Choice(frozenset(ignore), frozenset(options.without), options.http)
    if options.replay is not None:
        return _replay(options.replay, choice)
    failed = _explore(options, choice)
    if not failed:
        print("every invariant holds")
        return 0
    for name in names:
        seeds = [outcome.seed for outcome in failed if name in outcome.broken]
        if seeds and options.go_on:
            print(f"{name}: {len(seeds)} seeds, the first is {seeds[0]}")
    mode = "--http " if options.http else ""
    print(f"an invariant does not hold: scripts/explore {mode}--replay {failed[0].seed}")
    return 1


def _explore(options: argparse.Namespace, choice: Choice) -> list[Outcome]:
    """Run seeds with a progress bar, and return the failed ones."""
    first, number = options.first, options.seeds
    started_at, ends_at = time.monotonic(), math.inf
    seeds: Iterable[int] = itertools.count(first)
    if options.minutes is None:
        seeds = range(first, first + number)
    else:
        number, ends_at = None, started_at + 60 * options.minutes
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("seeds, {task.fields[speed]:.0f} x real time,"),
        TimeElapsedColumn(),
    )
    failed: list[Outcome] = []
    virtual = 0.0
    in_time = itertools.takewhile(lambda _: time.monotonic() < ends_at, seeds)
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=number, speed=0)
        for outcome in try_seeds(in_time, choice):
            virtual += outcome.virtual_seconds
            speed = virtual / (time.monotonic() - started_at)
            progress.update(bar, advance=1, speed=speed)
            if outcome.broken:
                failed.append(outcome)
                for name, why in outcome.broken.items():
                    print(f"seed {outcome.seed}: {name}: {why}", flush=True)
                if not options.go_on:
                    break
    return failed


def _replay(seed: int, choice: Choice) -> int:
    """Print the history of a seed."""
    if choice.http:
        wire_history = wire_run.explore(seed)
        lines, failed = wire_history.lines, wire_history.broken(choice.ignore)
    else:
        history = explore(seed, without=choice.without, full=True)
        lines, failed = history.lines, broken(history, choice.ignore)
    print("\n".join(lines))
    for name, why in failed.items():
        print(f"{name}: {why}")
    holds = "an invariant does not hold" if failed else "every invariant holds"
    print(f"{holds}: seed {seed}")
    return int(bool(failed))


def _names(*, http: bool) -> tuple[str, ...]:
    """Return the names of what is checked in a mode."""
    return wire_run.RULES if http else tuple(INVARIANTS)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = _parser()
    options = parser.parse_args(arguments)
    names = _names(http=options.http)
    if unknown := {*options.only, *options.ignore} - set(names):
        parser.error(f"no such RULE: {', '.join(sorted(unknown))}; rules: {', '.join(names)}")
    if options.http and options.without:
        parser.error("--without cannot be used with --http, which simulates no faults")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/explore",
        description="Runs the queue with simulated clients, replicas, Redis and Discord, and with "
        "faults that a seed chooses, and checks that the rules hold. 1,000 seeds take about "
        "4 minutes on 2 cores, and less than a minute with --http. The exit status is 1 if a rule "
        "is broken; the last line then names the seed.",
    )
    add = parser.add_argument
    add("--seeds", type=int, default=1000, metavar="N", help="number of seeds (1000)")
    add("--from", type=int, default=0, metavar="S", dest="first", help="the first seed (0)")
    add("--minutes", type=float, metavar="M", help="run for M minutes, instead of --seeds")
    add("--replay", type=int, metavar="SEED", help="print the full history of one seed")
    add("--go-on", action="store_true", help="do not end at the first seed that breaks a rule")
    add("--http", action="store_true", help="simulate clients of HTTP/1 and HTTP/2, and no faults")
    names = f"{', '.join(_names(http=False))}; with --http {', '.join(_names(http=True))}"
    add("--only", nargs="+", default=[], metavar="RULE", help=f"check only these: {names}")
    add("--ignore", nargs="+", default=[], metavar="RULE", help="do not check these")
    kinds = f"do not simulate these: {', '.join(ALL_KINDS)}"
    add("--without", nargs="+", choices=ALL_KINDS, default=[], metavar="FAULT", help=kinds)
    return parser


if __name__ == "__main__":
    sys.exit(main())
