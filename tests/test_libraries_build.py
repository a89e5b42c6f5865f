"""How the bots are built."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.libraries import building
from tests.libraries.building import Project, missing

COUNT = "from pathlib import Path; Path('log').write_text(Path('code').read_text()); "
COUNT += "open('runs', 'a').write('.')"


def test_a_project_is_built_again_only_after_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "BUILDS", tmp_path / "builds")
    folder = tmp_path / "language"
    folder.mkdir()
    command = [(sys.executable, "-c", COUNT)]
    for code, runs in [("a", 1), ("a", 1), ("b", 2)]:
        copy = Project(folder, command, recipes={"code": code}, variables={}).build()
        assert (copy / "log").read_text() == code
        assert len((copy / "runs").read_text()) == runs


def test_missing_toolchains_are_named_with_how_to_get_them() -> None:
    commands = {"sh": "is there", "no-such-command": "install it"}
    assert missing(commands) == ["no-such-command: install it"]
