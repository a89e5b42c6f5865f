"""``scripts/measure-identifies``, with one cell and a short window."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest


def measure(*arguments: str) -> str:
    """Return the last row of the table."""
    command = [sys.executable, "-m", "tests.identifies", *arguments]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return ended.stdout.splitlines()[-1]


@pytest.mark.libraries
def test_a_cell_counts_invalid_sessions_and_identifies() -> None:
    row = measure("--conditions", "idle", "--ways", "confirmed", "--window", "0.5")
    assert re.fullmatch(r"\| idle \| 0 of 24, \d+% \|", row)
