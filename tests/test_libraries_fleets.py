"""The README's recipes in Node, Go, Rust, Java and Kotlin: fleets that survive chaos.

Those in Python are in ``test_libraries.py``, for they resume in another way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest

from tests.harness import eventually
from tests.libraries import SHARDS, Library, go, java, node, rust
from tests.libraries.chaos import LONG, fleet_after_chaos, gets_many_without_the_queue

COMPILED = pytest.mark.timeout(600)
"""The first test of a language compiles its libraries."""

IN_NODE = (node.DISCORD_JS, node.DISCORDJS_WS, node.DISCORDENO, node.OCEANIC, node.ERIS)
IN_GO = (go.DISGO, go.DISCORDGO)
WITH_A_TOOLCHAIN = (rust.TWILIGHT, java.DISCORD4J, java.JDA, java.KORD)


def fleets(libraries: Iterable[Library], *marks: pytest.MarkDecorator) -> Iterator[object]:
    for library in libraries:
        yield pytest.param(library, marks=marks, id=library.name)


FLEETS = (
    *fleets(IN_NODE),
    *fleets(IN_GO, COMPILED),
    *fleets(WITH_A_TOOLCHAIN, COMPILED, pytest.mark.toolchain),
)


@pytest.mark.parametrize("max_concurrency", [1, 4])
@pytest.mark.parametrize("library", FLEETS)
def test_no_shard_gets_an_invalid_session(library: Library, max_concurrency: int) -> None:
    with fleet_after_chaos(library, max_concurrency) as fleet:
        released = fleet.queue.status()["released"]
        fleet.reconnect_all()
        eventually(lambda: fleet.gateway.resumed == SHARDS, LONG)
        assert fleet.queue.status()["released"] == released, "a RESUME needs no ticket"


@pytest.mark.parametrize("library", FLEETS)
def test_without_the_queue_the_same_fleet_gets_many(library: Library) -> None:
    gets_many_without_the_queue(library)
