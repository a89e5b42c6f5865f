"""The scenarios: each measures some figures of one server. A figure's name says its unit."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

from tests.benchmark.load import Crowd
from tests.benchmark.subjects import Died, Subject, Target
from tests.harness import PATIENCE, free_port

Figures = dict[str, float]

STALLED = 3600.0
"""Seconds of a window that is longer than any measurement, so that no release falls into it."""

WINDOW = 0.1
RELEASES, FEW_RELEASES = 200, 12
"""Numbers of gaps to measure. With 200 gaps, the 99th percentile is not the maximum. Few gaps
are measured if the window of a server is longer than 1 s."""

BUSY_WINDOW = 0.05
"""A short window, because these scenarios last only seconds and need enough gaps."""

RESTART_WINDOW = 2.0

ASKERS = 32
"""Connections: enough to keep the server busy, and too few to delay each other."""

IDLE_SECONDS = PASSTHROUGH_SECONDS = 5.0


def hold(subject: Subject, waiters: int) -> Figures:
    """Let requests stall."""
    with subject(STALLED) as target, Crowd(target.address) as crowd:
        memory, cpu = target.memory(), target.cpu()
        _gather(target, crowd, waiters)
        return {
            "kB a waiter": (target.memory() - memory) / waiters / 1024,
            "CPU µs a waiter": (target.cpu() - cpu) / waiters * 1e6,
        }


def storm(subject: Subject, waiters: int) -> Figures:
    """Connect all clients at once, while others are released."""
    with subject(BUSY_WINDOW) as target, Crowd(target.address) as crowd:
        crowd.come(20)
        _wait_for_answers(target, crowd, 2)
        before, start = len(crowd.answers), time.monotonic()
        _gather(target, crowd, waiters, at_once=waiters)
        taken = time.monotonic() - start
        _wait_for_answers(target, crowd, 1)
        return {
            "refused": crowd.refused,
            "s until all are in": taken,
            **_lateness(crowd.answers[before - 1 :], target.window),
        }


def churn(subject: Subject, waiters: int) -> Figures:
    """Let every second client hang up at once, while others are released."""
    with subject(BUSY_WINDOW) as target, Crowd(target.address) as crowd:
        _gather(target, crowd, waiters)
        _wait_for_answers(target, crowd, 1)
        leavers = list(crowd.clients)[1::2]
        before, cpu = len(crowd.answers), target.cpu()
        crowd.leave(leavers)
        crowd.watch(target.becomes_quiet())
        used = target.cpu() - cpu
        _wait_for_answers(target, crowd, 1)
        answers = crowd.answers[before - 1 :]
        return {
            "refused": crowd.refused,
            "slots unused": sum((b - a) // target.window - 1 for a, b in pairwise(answers)),
            "CPU µs a leaver": used / len(leavers) * 1e6,
            **_lateness(answers, target.window),
        }


def lateness(subject: Subject, waiters: int) -> Figures:
    """Measure the gaps between releases while many clients wait."""
    with subject(WINDOW) as target, Crowd(target.address) as crowd:
        _gather(target, crowd, waiters)
        _wait_for_answers(target, crowd, 1)
        before, cpu = len(crowd.answers), target.cpu()
        releases = min(RELEASES if target.window <= 1 else FEW_RELEASES, waiters // 2)
        _wait_for_answers(target, crowd, releases)
        used = target.cpu() - cpu
        return {
            "CPU µs a release": used / releases * 1e6,
            **_lateness(crowd.answers[before - 1 :], target.window),
        }


def drain(subject: Subject, waiters: int) -> Figures:
    """Stop the server while many clients wait."""
    with subject(STALLED) as target, Crowd(target.address) as crowd:
        assert target.process is not None
        _gather(target, crowd, waiters)
        start = time.monotonic()
        target.process.terminate()
        status = target.process.wait(PATIENCE)
        stopped = time.monotonic() - start
        crowd.watch(lambda: not crowd.clients)
        return {"s": stopped, "exit status": status, "answered": len(crowd.answers)}


def idle(subject: Subject, _: int) -> Figures:
    """Measure the server without clients."""
    with subject(STALLED) as target:
        memory = target.memory()
        time.sleep(1)  # the work that is left from the start does not count
        cpu, wake_ups, start = target.cpu(), target.wake_ups(), time.monotonic()
        time.sleep(IDLE_SECONDS)
        seconds = time.monotonic() - start
        return {
            "CPU %": (target.cpu() - cpu) / seconds * 100,
            "wake-ups a second": (target.wake_ups() - wake_ups) / seconds,
            "MiB": memory / 2**20,
        }


def start(subject: Subject, _: int) -> Figures:
    """Start the server, and wait for its first answer."""
    spawned = time.monotonic()
    with subject(STALLED, MAX_CONCURRENCY=0) as target, Crowd(target.address) as crowd:
        crowd.come(1)
        _wait_for_answers(target, crowd, 1)
        return {"s until the first answer": crowd.answers[0] - spawned}


def restart(subject: Subject, _: int) -> Figures:
    """Kill the server right after a release, and start it again."""
    port = free_port()
    answers: list[float] = []
    for _ in range(2):
        with subject(RESTART_WINDOW, PORT=port) as target, Crowd(target.address) as crowd:
            crowd.come(1)
            _wait_for_answers(target, crowd, 1)
            answers.append(crowd.answers[0])
    before, after = answers
    return {"windows between two releases": (after - before) / target.window}


def passthrough(subject: Subject, _: int) -> Figures:
    """Send request after request on a few connections, each answered at once."""
    with (
        subject(STALLED, MAX_CONCURRENCY=0) as target,
        Crowd(target.address, keep_asking=True) as crowd,
    ):
        crowd.come(ASKERS)
        _wait_for_answers(target, crowd, ASKERS)
        answers, cpu, start = len(crowd.answers), target.cpu(), time.monotonic()
        crowd.watch(lambda: False, PASSTHROUGH_SECONDS)
        answered, seconds = len(crowd.answers) - answers, time.monotonic() - start
        return {
            "requests a second": answered / seconds,
            "CPU µs a request": (target.cpu() - cpu) / answered * 1e6,
        }


Scenario = Callable[[Subject, int], Figures]

SCENARIOS: dict[str, Scenario] = {
    scenario.__name__: scenario
    for scenario in (hold, storm, churn, lateness, drain, idle, start, restart, passthrough)
}

ON_THE_FLOOR = {"hold", "idle", "start", "passthrough"}
"""Scenarios that the floor can run. The others need releases."""

ON_OTHERS = {"hold", "storm", "churn", "lateness", "idle"}
"""Scenarios for a server at a --url. The others start, stop or configure the server."""


def _gather(target: Target, crowd: Crowd, waiters: int, at_once: int = 1000) -> None:
    """Connect clients, and wait until the server has nothing more to do for them.

    If too many connect at once, the kernel drops some connections, and those clients try again.
    """
    others = target.open_files() - len(crowd.clients)
    while waiters > 0:
        crowd.come(min(waiters, at_once))
        waiters -= at_once
        crowd.watch(lambda: target.open_files() - others >= len(crowd.clients))
    crowd.watch(target.becomes_quiet())


def _wait_for_answers(target: Target, crowd: Crowd, number: int) -> None:
    """Wait for ``number`` more answers."""
    number += len(crowd.answers)
    patience = number * target.window + PATIENCE
    if not crowd.watch(lambda: len(crowd.answers) >= number, patience):
        raise Died


def _lateness(answers: Sequence[float], window: float) -> Figures:
    """Return by how much the gaps between answers were longer than the window."""
    late = sorted((latter - former - window) * 1000 for former, latter in pairwise(answers))
    return {
        "ms late, p50": statistics.median(late),
        "ms late, p99": late[math.ceil(0.99 * len(late)) - 1],
        "ms late, max": late[-1],
        "ms late, min": late[0],
    }
