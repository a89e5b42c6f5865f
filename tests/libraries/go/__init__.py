"""Libraries in Go."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from tests.libraries import code_block
from tests.libraries.building import BUILDS, Project, program

GO = str(Path(sysconfig.get_path("purelib"), "go", "bin", "go"))
FOLDER = Path(__file__).parent
COMPILER = {
    "GOCACHE": str(BUILDS / "go-cache"),
    "GOFLAGS": "-mod=readonly",
    "GOTOOLCHAIN": "local",
    "CGO_ENABLED": "0",
}
"""Environment variables: it uses what is pinned, and keeps its cache beside the builds."""


def _package_main(*titles: str) -> str:
    return "".join(f"package main\n\n{code_block(title)}" for title in titles)


PROJECT = Project(
    FOLDER,
    commands=[(GO, "build", "-o", "bin/", "./...")],
    recipes={
        "disgo/queue.go": _package_main("Go"),
        "discordgo/queue.go": _package_main("Go"),
        "discordgo/open.go": _package_main("discordgo"),
        "wait/queue.go": _package_main("Go"),
    },
    variables=COMPILER,
)
DISGO = program("disgo", PROJECT, "bin/disgo")
DISCORDGO = program("discordgo", PROJECT, "bin/discordgo")
WAIT = program("wait", PROJECT, "bin/wait")
