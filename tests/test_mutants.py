"""Each mutant can be applied to the package."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.mutants import MUTANTS, ROOT, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.why)
def test_each_mutant_can_be_applied(mutant: Mutant, tmp_path: Path) -> None:
    path = tmp_path / mutant.file
    path.parent.mkdir(parents=True)
    shutil.copy(ROOT / "gateway_queue" / mutant.file, path)
    assert mutant.apply(tmp_path)
    if path.suffix == ".py":
        compile(path.read_text(), mutant.file, "exec")


def test_mutants_differ() -> None:
    assert len({(mutant.file, mutant.old, mutant.new) for mutant in MUTANTS}) == len(MUTANTS)
