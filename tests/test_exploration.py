"""The rules of the queue hold in simulated runs, with faults, that a seed chooses."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest

from tests.exploration.invariants import broken
from tests.exploration.run import explore

pytestmark = pytest.mark.simulation

ROOT = Path(__file__).parent.parent

FIXED_SEEDS = (
    0,
    1,
    2,
    3,
    5,
    7,
    13,
    24,
    27,
    32,
    64,
    91,
    129,
    267,
    271,
    305,
    350,
    399,
    474,
    200237,
    300188,
    800205,
    830882,
    831147,
    840949,
    842628,
    843141,
    860788,
    900929,
    913636,
    1300496,
    8001702,
    9000477,
    63000321,
)
"""Seeds of one bot. Add each seed that has found a fault."""

SEEDS_OF_SEVERAL_BOTS = (77000, 77012, 77018, 77019, 77029)
"""The last three have a bot with many clients."""

FIXED_SEEDS_WITH_UNSTEADY_CLOCK = (219, 531, 991, 5894)

FIXED_SEEDS_WITH_ALL = (
    1529,
    4003,
    5004,
    101512099,
    960509823,
    960512545,
    1129021325,
    1129104088,
    1129800581,
)

FIXED_SEEDS_WITH_BOTS = (
    5000005,
    11000153,
    21000027,
    41000388,
    72000528,
    136335152,
    333646925,
    639189395,
    810001462,
    810002017,
    810002182,
    810002264,
    810003903,
    820000678,
    820001277,
    820001313,
    850001632,
    850006519,
    860000129,
    860001517,
)
"""Seeds of runs with one bot or several. Those in ``FIXED_SEEDS`` are older than several bots."""

SECONDS = 30.0
"""How many seconds to try fresh seeds."""


STANDBYS = frozenset({"sentinels", "cluster"})
NEWER = STANDBYS | {"unsteady-clock"}


@pytest.mark.parametrize(
    ("seed", "without"),
    [
        *product(FIXED_SEEDS_WITH_ALL, [frozenset()]),
        # Kinds of faults that are newer than a seed would change the history that found a fault.
        *product(FIXED_SEEDS_WITH_UNSTEADY_CLOCK, [STANDBYS]),
        *product(FIXED_SEEDS_WITH_BOTS, [NEWER]),
        *product(FIXED_SEEDS, [NEWER | {"bots"}]),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_rules_hold_with_fixed_seed(seed: int, without: frozenset[str]) -> None:
    found = broken(explore(seed, without=without))
    options = " ".join(["", "--without", *sorted(without)]) if without else ""
    assert not found, f"scripts/explore --replay {seed}{options}"


@pytest.mark.parametrize("seed", SEEDS_OF_SEVERAL_BOTS)
def test_rules_hold_for_each_of_several_bots(seed: int) -> None:
    history = explore(seed)
    assert len(history.records) > 1
    assert all(record.answers for record in history.records)
    assert not broken(history), f"scripts/explore --replay {seed}"


def test_rules_hold_with_fresh_seeds() -> None:
    first = random.SystemRandom().randrange(10**6, 10**9)
    ends_at = time.monotonic() + SECONDS
    seed = first
    while time.monotonic() < ends_at:
        assert not broken(explore(seed)), f"scripts/explore --replay {seed}"
        seed += 1


@pytest.mark.parametrize("seed", [1, 24])
def test_same_seed_gives_same_history(seed: int) -> None:
    first, second = explore(seed, full=True), explore(seed, full=True)
    assert first.lines == second.lines


@pytest.mark.parametrize("seed", [24, 32])
def test_same_seed_gives_same_history_in_another_process(seed: int) -> None:
    histories = [
        subprocess.run(
            [sys.executable, "-m", "tests.exploration", "--replay", str(seed)],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            stdout=subprocess.PIPE,
            check=False,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert histories[0] == histories[1]
    assert histories[0].count(b"\n") > 100
