"""Gateway queues in other languages, to measure in the same run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.benchmark.subjects import Target, started
from tests.libraries.building import Project
from tests.libraries.go import COMPILER, GO

FOLDER = Path(__file__).parent

RUST = Project(
    FOLDER / "rust_peer",
    commands=[("cargo", "build", "--locked", "--release", "--quiet")],
    recipes={},
    variables={},
)
RUST_WINDOW = 5.0
"""Seconds; twilight-gateway-queue has no setting for it."""

GO_PEER = Project(
    FOLDER / "go_peer",
    commands=[(GO, "build", "-o", "peer", ".")],
    recipes={},
    variables=COMPILER,
)


@contextmanager
def rust(_: float, **variables: object) -> Iterator[Target]:
    """Start twilight-gateway-queue behind hyper."""
    command = str(RUST.build() / "target/release/rust_peer")
    with started(command, window=RUST_WINDOW, **variables) as target:
        yield target


@contextmanager
def go(window: float, **variables: object) -> Iterator[Target]:
    """Start a queue on Go's net/http."""
    command = str(GO_PEER.build() / "peer")
    with started(command, window=window, **variables) as target:
        yield target
