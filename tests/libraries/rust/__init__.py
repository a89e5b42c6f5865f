"""Libraries in Rust."""

from __future__ import annotations

from pathlib import Path

from tests.libraries import code_block
from tests.libraries.building import Project, program

TOOLCHAINS = {"cargo": "install Rust 1.89 or later with rustup (https://rustup.rs)"}

PROJECT = Project(
    Path(__file__).parent,
    commands=[("cargo", "build", "--locked", "--quiet")],
    recipes={"src/queue.rs": code_block("twilight")},
    variables={},
)
TWILIGHT = program("twilight", PROJECT, "target/debug/twilight")
PERMITS = program("permits", PROJECT, "target/debug/permits")
