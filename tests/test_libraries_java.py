"""The README's recipes for Java and Kotlin, with their libraries, against Discord's stand-in."""

from __future__ import annotations

import pytest

from tests.harness import eventually
from tests.libraries import SHARDS
from tests.libraries.building import Program
from tests.libraries.chaos import LONG, fleet_after_chaos, gets_many_without_the_queue
from tests.libraries.java import DISCORD4J, JDA, KORD

FLEETS = {library.name: library for library in (DISCORD4J, JDA, KORD)}

pytestmark = [pytest.mark.toolchain, pytest.mark.timeout(600)]

every_library = pytest.mark.parametrize("library", FLEETS.values(), ids=FLEETS)


@pytest.mark.parametrize("max_concurrency", [1, 4])
@every_library
def test_no_shard_gets_an_invalid_session(library: Program, max_concurrency: int) -> None:
    with fleet_after_chaos(library, max_concurrency) as fleet:
        released = fleet.queue.status()["released"]
        fleet.reconnect_all()
        eventually(lambda: fleet.gateway.resumed == SHARDS, LONG)
        assert fleet.queue.status()["released"] == released, "a RESUME needs no ticket"


@every_library
def test_without_the_queue_the_same_fleet_gets_many(library: Program) -> None:
    gets_many_without_the_queue(library)
