"""``scripts/measure-redis``, with few shards."""

from __future__ import annotations

import re

import pytest

from tests.scale import main


def test_the_script_measures_what_replicas_cost_redis(capsys: pytest.CaptureFixture[str]) -> None:
    main(["2:4:12", "--seconds", "6"])
    head, _, row = capsys.readouterr().out.splitlines()
    assert head.count("|") == row.count("|")
    assert re.match(
        r"\| 2 \| 4 \| 12 \| \d+ \| [\d.]+ \| \d+ µs \| [\d.]+% \| \d+ \| [\d,]+ \|", row
    )
