"""The README's recipes for Rust, with their libraries, against a stand-in for Discord."""

from __future__ import annotations

import subprocess
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass

import pytest

from tests.fake_discord import playing
from tests.harness import SLACK, Server, eventually, serving
from tests.libraries.rust import PERMITS

pytestmark = [pytest.mark.libraries, pytest.mark.timeout(600)]


@dataclass(frozen=True)
class Permit:
    """When a shard that was enqueued may identify."""

    shard: int
    waited: float
    """Seconds since the start of the program."""


def permits(queue: Server, *shards: int) -> list[Permit]:
    """Enqueue shards at the same time, and return their permits in the order of their arrival."""
    command = [*PERMITS.command(queue.port, confirm=True), *map(str, shards)]
    output = subprocess.run(
        command, cwd=PERMITS.folder, check=True, capture_output=True, text=True, timeout=60
    ).stdout
    lines = (line.split() for line in output.splitlines())
    return [Permit(int(shard), float(waited)) for shard, waited in lines]


class TestTwilightsOwnSuite:
    """The tests that twilight-gateway-queue has for its own queues, with the queue of the recipe.

    The test of the order of keys in one window is left out: keys are independent here.
    """

    WINDOW = 2.0
    """Seconds, longer than the delays of a busy machine."""

    def queue(self, **variables: object) -> AbstractContextManager[Server]:
        return serving(WINDOW_SECONDS=self.WINDOW, HOLD_ON_START="false", **variables)

    def test_the_same_id_is_serial(self) -> None:
        with self.queue() as queue:
            first, second = permits(queue, 0, 0)
        assert second.waited - first.waited >= self.WINDOW - SLACK

    def test_different_ids_are_parallel(self) -> None:
        with self.queue(MAX_CONCURRENCY=2) as queue:
            assert max(permit.waited for permit in permits(queue, 1, 0)) < self.WINDOW

    def test_a_bucket_gives_one_permit_per_window(self) -> None:
        with self.queue(MAX_CONCURRENCY=4) as queue:
            *others, last = permits(queue, 0, 1, 3, 3)
        assert {permit.shard for permit in others} == {0, 1, 3}
        assert max(permit.waited for permit in others) < self.WINDOW
        assert last.shard == 3
        assert last.waited >= self.WINDOW - SLACK

    def test_without_a_concurrency_it_is_instant(self) -> None:
        with self.queue(MAX_CONCURRENCY=0) as queue:
            assert max(permit.waited for permit in permits(queue, 0, 0)) < self.WINDOW

    def test_a_new_concurrency_fills_its_buckets(self) -> None:
        with (
            playing(max_concurrency=1) as discord,
            self.queue(**discord.variables(DISCORD_REFRESH_SECONDS=0.1)) as queue,
        ):
            eventually(lambda: bool(discord.requests))
            discord.max_concurrency = 2
            eventually(lambda: queue.status()["max_concurrency"] == 2)
            first, second = permits(queue, 0, 1)
        assert second.waited - first.waited < self.WINDOW

    def test_the_reset_refills_the_permits(self) -> None:
        with (
            playing(remaining=0, total=1, reset_after=3000) as discord,
            self.queue(**discord.variables()) as queue,
        ):
            eventually(lambda: queue.status()["session_starts"] is not None)
            asked, resets_in = time.monotonic(), queue.status()["session_starts"]["resets_in"]
            discord.remaining, discord.reset_after = 1, 86_400_000
            permits(queue, 0)
        assert time.monotonic() - asked >= resets_in - SLACK
