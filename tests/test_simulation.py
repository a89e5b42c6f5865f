"""``scripts/simulate``, with a small fleet."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from tests.simulation.fleet import Wait
from tests.simulation.report import overtaken

pytestmark = pytest.mark.simulation


def simulate(*arguments: str) -> dict[str, dict[str, str]]:
    """Return the rows of the table, by way."""
    ended = subprocess.run(
        [sys.executable, "-m", "tests.simulation", *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [re.split(r" *\| *", line)[1:-1] for line in ended.stdout.splitlines() if "|" in line]
    return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}


def test_only_the_queue_gives_no_invalid_session_and_survives_chaos(tmp_path: Path) -> None:
    picture = tmp_path / "starts.svg"
    fleet = "--shards 96 --window 0.5 --client-timeout 1"
    chaos = "--crash-rate 0.2 --kill-processes 1 --kill-queue 1"
    ways = ["--ways", "no queue", "gateway-queue", "--picture", str(picture)]
    table = simulate(*fleet.split(), *chaos.split(), *ways)
    assert int(table["no queue"]["Invalid Sessions"]) > 20
    assert table["gateway-queue"]["Invalid Sessions"] == "0"
    svg = ET.parse(picture).getroot()
    assert svg.tag == "{http://www.w3.org/2000/svg}svg"
    assert "gateway-queue" in "".join(svg.itertext())


def test_replicas_that_are_killed_give_no_invalid_session() -> None:
    fleet = "--shards 48 --window 0.5 --ways gateway-queue"
    table = simulate(*fleet.split(), "--replicas", "2", "--kill-queue", "1")
    assert table["gateway-queue"]["Invalid Sessions"] == "0"


def test_a_bot_without_a_queue_spends_its_session_starts() -> None:
    fleet = "--shards 96 --keys 4 --session-starts 60 --window 0.2"
    row = simulate(*fleet.split(), "--ways", "no queue")["no queue"]
    assert row["all shards up after"].startswith("never: token reset after ")
    assert 0 < int(row["Invalid Sessions"]) <= 60


def test_overtaken_shards() -> None:
    waits = [Wait(0, 0, 9), Wait(1, 0.5, 8), Wait(2, 3, 7), Wait(3, 4, 10), Wait(4, 9, 9.5)]
    assert overtaken(waits, window=1) == 3


@pytest.mark.parametrize(
    "arguments", [("--shards", "0"), ("--keys", "0"), ("--window", "0"), ("--crash-rate", "2")]
)
def test_an_option_out_of_range_is_refused(arguments: tuple[str, str]) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.simulation", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert f"not '{arguments[1]}'" in ended.stderr
