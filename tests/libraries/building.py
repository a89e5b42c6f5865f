"""Bots in compiled languages: built once, and again only when a source or a recipe has changed."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.harness import environ
from tests.libraries import HERE

BUILDS = HERE / ".build"
"""A folder for each language, with the caches of its compiler."""


@dataclass(frozen=True)
class Project:
    """Programs in one language, which are built together.

    Args:
      folder: with their sources, a manifest and what pins the versions of all packages.
      commands: build them, in a copy of the folder.
      recipes: files with code of the README, by their paths in that copy.
      variables: environment variables of the commands.
    """

    folder: Path
    commands: Sequence[Sequence[str]]
    recipes: Mapping[str, str]
    variables: Mapping[str, str]

    @property
    def copy(self) -> Path:
        """Where they are built."""
        return BUILDS / self.folder.name

    def build(self) -> Path:
        """Build the programs unless they are up to date, and return the folder."""
        with _locked(self.copy):
            files = self._sources() | {path: text.encode() for path, text in self.recipes.items()}
            stamp, digest = self.copy / "built-from", self._digest(files)
            if stamp.exists() and stamp.read_text() == digest:
                return self.copy
            for path, data in files.items():
                _write(self.copy / path, data)
            for command in self.commands:
                subprocess.run(command, cwd=self.copy, env=environ(**self.variables), check=True)
            stamp.write_text(digest)
        return self.copy

    def _sources(self) -> dict[str, bytes]:
        files = (path for path in self.folder.rglob("*") if path.is_file())
        return {
            str(path.relative_to(self.folder)): path.read_bytes()
            for path in files
            if "__pycache__" not in path.parts and path.suffix != ".py"
        }

    def _digest(self, files: Mapping[str, bytes]) -> str:
        digest = hashlib.sha256(repr(self.commands).encode())
        for path, data in sorted(files.items()):
            digest.update(f"{path} {len(data)} ".encode() + data)
        return digest.hexdigest()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes of the tests from building in the same folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write(path: Path, data: bytes) -> None:
    """Write a file. An unchanged file keeps its time, because compilers compare times."""
    if not path.exists() or path.read_bytes() != data:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


@dataclass(frozen=True)
class Program:
    """A bot that is built before it is started. It finds the queue by the variable QUEUE."""

    name: str
    project: Project
    arguments: tuple[str, ...]
    """The command, which runs in the folder of the build."""
    folder: Path

    def command(self, port: int | None, *, confirm: bool) -> Sequence[str]:
        assert confirm, "the recipe is built as it is in the README"
        self.project.build()
        queue = "" if port is None else f"http://127.0.0.1:{port}"
        return ["env", f"QUEUE={queue}", *self.arguments]


def program(name: str, project: Project, *arguments: str) -> Program:
    """Return a program of a project, by the command that runs in the folder of the build."""
    return Program(name, project, arguments, project.copy)


def missing(toolchains: Mapping[str, str]) -> list[str]:
    """Name the commands that this machine lacks, and how to get each of them."""
    return [f"{command}: {how}" for command, how in toolchains.items() if not shutil.which(command)]
