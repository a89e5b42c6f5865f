"""Runs of many seeds, on all cores."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

from tests.exploration import wire_run
from tests.exploration.invariants import broken
from tests.exploration.run import explore

LONGEST_RUN = 30
"""Seconds of CPU time after which a run counts as endless."""


@dataclass(frozen=True)
class Choice:
    """Which runs to do, and what to check."""

    ignore: frozenset[str] = frozenset()
    """Invariants that are not checked."""
    without: frozenset[str] = frozenset()
    """Kinds of faults that must not happen."""
    http: bool = False
    """Whether clients use HTTP; otherwise they call the queue directly."""


@dataclass(frozen=True)
class Outcome:
    """The result of one seed."""

    seed: int
    virtual_seconds: float
    broken: dict[str, str]
    """Explanations by invariant."""


class NeverEnds(Exception):
    """A run has taken too long."""


def try_seed(seed: int, choice: Choice) -> Outcome:
    """Run a seed, and check the invariants."""
    signal.signal(signal.SIGVTALRM, _give_up)
    signal.setitimer(signal.ITIMER_VIRTUAL, LONGEST_RUN)
    try:
        return (_try_http if choice.http else _try_queue)(seed, choice)
    except Exception as error:  # noqa: BLE001
        return Outcome(seed, 0, {"runs-to-its-end": repr(error)})
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def _try_queue(seed: int, choice: Choice) -> Outcome:
    history = explore(seed, without=choice.without)
    return Outcome(seed, history.ended_at, broken(history, choice.ignore))


def _try_http(seed: int, choice: Choice) -> Outcome:
    history = wire_run.explore(seed)
    return Outcome(seed, history.ended_at, history.broken(choice.ignore))


def try_seeds(seeds: Iterable[int], choice: Choice) -> Iterator[Outcome]:
    """Run seeds on all cores; the outcomes come in the order of the seeds."""
    cores = len(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(cores, context, _prepare) as pool:
        pending = deque[Future[Outcome]]()
        try:
            for seed in seeds:
                pending.append(pool.submit(try_seed, seed, choice))
                if len(pending) > 8 * cores:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _prepare() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.freeze()
    gc.set_threshold(50_000, 50, 1000)


def _give_up(_: int, __: FrameType | None) -> NoReturn:
    raise NeverEnds(f"the run takes more than {LONGEST_RUN} s")
