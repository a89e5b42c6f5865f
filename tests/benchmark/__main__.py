"""Measures a gateway queue from outside: ``scripts/benchmark --help``."""

from __future__ import annotations

import argparse
import re
import resource
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tests.benchmark import peers
from tests.benchmark.report import Report
from tests.benchmark.scenarios import ON_OTHERS, ON_THE_FLOOR, SCENARIOS
from tests.benchmark.subjects import Died, Subject, floor, ours, running

DRAWN = {"hold", "churn", "lateness"}
"""Scenarios of the chart."""

SHORTER, LONGER = 0.1, 1.8
"""The chart also has queues of 0.1 and of 1.8 times ``--waiters``: by default up to 18,000 clients,
which a limit of 20,000 open files allows."""


SECONDS = {
    "hold": 17,
    "storm": 19,
    "churn": 24,
    "lateness": 36,
    "drain": 19,
    "idle": 8,
    "start": 2,
    "restart": 6,
    "passthrough": 7,
}
"""Seconds that one run of each scenario takes with 10,000 waiters on a machine with 2 cores."""

TOTAL = """By default each scenario runs three times, and four of them on the floor as well: about 9
minutes. A chart takes as long again."""


class Measurement(NamedTuple):
    """One run of one scenario."""

    report: Report
    scenario: str
    name: str
    subject: Subject


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, with a progress bar, and then show the medians."""
    options = _parse(arguments)
    # Each waiter has a descriptor here, and one in the server, which inherits the limit.
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

    subjects: dict[str, Subject]
    if options.url:
        subjects = {"server": running(options.url, options.window, options.pid)}
    else:
        subjects = {"server": ours, "floor": floor}
    if options.peers:
        subjects["rust"] = peers.rust
        subjects["go"] = peers.go
    report = Report(options.waiters, options.runs)
    plan = list(_plan(report, options.scenarios, subjects))
    shorter, longer = (
        Report(round(length * options.waiters), options.runs) for length in (SHORTER, LONGER)
    )
    if options.chart:
        drawn = [name for name in options.scenarios if name in DRAWN]
        plan += [*_plan(shorter, drawn, subjects), *_plan(longer, drawn, subjects)]
    _measure(plan)
    Console().print(report.table())
    if options.json:
        report.write(options.json)
    if options.chart:
        from tests.benchmark.chart import draw  # noqa: PLC0415 (see there)

        draw([shorter, report, longer], options.chart)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/benchmark",
        description=textwrap.fill(
            "Measures a gateway queue from outside. Without --url it starts the one of this "
            "checkout for each measurement, and also the floor: a bare ASGI function that only "
            "stalls, under the same server."
        ),
        epilog=_scenarios(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    several = f"any of {', '.join(SCENARIOS)}; all of them by default, and with --url"
    several += f" {', '.join(name for name in SCENARIOS if name in ON_OTHERS)}"
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=several)
    parser.add_argument("--url", help="a server that runs already, such as http://127.0.0.1:5000")
    parser.add_argument(
        "--window", type=float, default=5.0, help="window of that server, in seconds (default: 5)"
    )
    parser.add_argument(
        "--peers",
        action="store_true",
        help="measure queues in Rust (twilight-gateway-queue behind hyper, window 5 s) and Go "
        "(net/http) as well; they are built first",
    )
    parser.add_argument(
        "--pid", type=int, help="process id of that server, if its port is not enough"
    )
    parser.add_argument(
        "--waiters",
        type=_positive,
        default=10_000,
        metavar="N",
        help="requests that stall at a time (default: 10000)",
    )
    parser.add_argument(
        "--runs",
        type=_positive,
        default=3,
        metavar="N",
        help="runs of each scenario, for medians (default: 3)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures of every run")
    parser.add_argument(
        "--chart",
        type=Path,
        metavar="FILE",
        help="draw the CPU time of a client in queues of several lengths, as SVG",
    )
    options = parser.parse_args(arguments)
    if options.peers and options.url:
        parser.error("--peers is for the server of this checkout, not for one at a --url")
    possible = [name for name in SCENARIOS if not options.url or name in ON_OTHERS]
    if impossible := set(options.scenarios) - set(possible):
        parser.error(f"cannot measure {', '.join(sorted(impossible))} here")
    options.scenarios = options.scenarios or possible
    return options


def _positive(text: str) -> int:
    if not re.fullmatch(r"0*[1-9][0-9]{0,8}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, not {text!r}")
    return int(text)


def _scenarios() -> str:
    """Explain each scenario, and how long a run of it takes."""
    lines = [
        f"  {name:<12} {(scenario.__doc__ or '').strip().splitlines()[0]} ({SECONDS[name]} s)"
        for name, scenario in SCENARIOS.items()
    ]
    return "\n".join(
        [
            "scenarios, and how long a run takes with 10,000 requests on a machine with 2 cores:",
            *lines,
            "",
            TOTAL,
        ]
    )


def _plan(
    report: Report, scenarios: Sequence[str], subjects: dict[str, Subject]
) -> Iterator[Measurement]:
    """List what to measure: server and floor in turn, because a machine's speed may change."""
    for _ in range(report.runs):
        for scenario in scenarios:
            for name, subject in subjects.items():
                if name != "floor" or scenario in ON_THE_FLOOR:
                    yield Measurement(report, scenario, name, subject)


def _measure(plan: Sequence[Measurement]) -> None:
    columns = (
        *(TextColumn("{task.description:<20}"), BarColumn()),
        *(MofNCompleteColumn(), TimeRemainingColumn()),
    )
    # The bar is drawn rarely, because it takes CPU time from the clients.
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=1) as progress:
        task = progress.add_task("", total=len(plan))
        for report, scenario, name, subject in plan:
            progress.update(task, description=f"{scenario}, {name}")
            try:
                figures = SCENARIOS[scenario](subject, report.waiters)
            except Died:
                sys.exit(f"the {name} has ended, or answers no client: {scenario}")
            report.add(scenario, name, figures)
            progress.advance(task)


if __name__ == "__main__":
    main()
