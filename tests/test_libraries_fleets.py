"""The README's recipes in Node, Go, Rust, Java and Kotlin: fleets that survive chaos.

The recipes in Python are in ``test_libraries.py``, because these libraries resume in another way.
"""

from __future__ import annotations

import pytest

from tests.harness import eventually
from tests.libraries import SHARDS, Library, go, java, node, rust
from tests.libraries.chaos import (
    LONG,
    fleet_after_chaos,
    fleets,
    gets_invalid_sessions_without_the_queue,
)

pytestmark = pytest.mark.timeout(600)  # the first test of a language compiles its libraries

LIBRARIES = (
    *(node.DISCORD_JS, node.DISCORDJS_WS, node.DISCORDENO, node.OCEANIC, node.ERIS),
    *(go.DISGO, go.DISCORDGO),
    *(rust.TWILIGHT, java.DISCORD4J, java.JDA, java.KORD),
)
IN_SCRIPTS_TEST = (node.DISCORD_JS, go.DISGO)


@pytest.mark.parametrize(("library", "max_concurrency"), fleets(LIBRARIES, IN_SCRIPTS_TEST))
def test_no_shard_gets_an_invalid_session(library: Library, max_concurrency: int) -> None:
    with fleet_after_chaos(library, max_concurrency) as fleet:
        released = fleet.queue.status()["released"]
        fleet.reconnect_all()
        eventually(lambda: fleet.gateway.resumed == SHARDS, LONG)
        assert fleet.queue.status()["released"] == released, "a RESUME needs no ticket"


@pytest.mark.libraries
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)
def test_without_the_queue_the_same_fleet_gets_invalid_sessions(library: Library) -> None:
    gets_invalid_sessions_without_the_queue(library)
