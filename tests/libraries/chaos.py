"""The crashes and restarts that every library has to survive without an Invalid Session."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product

import pytest
import trio

from tests.fake_discord.gateway import Gateway, enforcing
from tests.harness import PATIENCE, Server, eventually, free_port, metric, serving
from tests.libraries import (
    PROCESSES,
    SHARDS,
    Library,
    all_are_confirmed,
    running_bots,
    slots_wasted,
    waiting_shards,
)

WINDOW = 0.25
"""Seconds: the queue's window and Discord's own. The time that a shard takes to identify does not
scale with it, but confirmed tickets do not depend on that time."""
MARGIN = 1.0
"""Seconds that a restarted queue holds longer: a shard may identify after its queue was killed."""
LONG = 5 * PATIENCE
"""Seconds that a fleet may take to start, on a busy machine."""


def fleets(libraries: Iterable[Library], in_scripts_test: Iterable[Library]) -> list[object]:
    """Return pairs of a library and ``max_concurrency``, the parameters of a test.

    Args:
      libraries: each runs with one key and with several.
      in_scripts_test: those that ``scripts/test`` runs too, with several keys, which takes less
        time; all other fleets are left to ``scripts/test-libraries``.
    """
    short = [(library, 4) for library in in_scripts_test]
    return [
        pytest.param(
            *fleet,
            marks=() if fleet in short else pytest.mark.libraries,
            id=f"{fleet[0].name}-{fleet[1]}",
        )
        for fleet in product(libraries, (1, 4))
    ]


@dataclass(frozen=True)
class Fleet:
    """A fleet whose shards have all identified."""

    gateway: Gateway
    queue: Server

    def reconnect_all(self) -> None:
        """Let Discord ask every shard to reconnect and resume."""
        trio.from_thread.run(self.gateway.reconnect_all, trio_token=self.gateway.trio_token)


def wait_until_all_are_up(gateway: Gateway) -> None:
    eventually(lambda: len(gateway.shards_up) == SHARDS, LONG)


def a_waiting_shard(queue: Server) -> int:
    """Wait until a shard waits for its turn, and return its number."""
    found: list[int] = []

    def look() -> bool:
        found.extend(waiting_shards(queue))
        return bool(found)

    eventually(look)
    return found[0]


@contextmanager
def fleet_after_chaos(library: Library, max_concurrency: int) -> Iterator[Fleet]:
    """Kill the queue, a process whose shard waits, and all processes, and start them again.

    In the end no IDENTIFY may have been early, counted from READY: then none is early by the
    arrival of IDENTIFY either. Each answer must have led to an IDENTIFY, and no slot may have been
    wasted.
    """
    port = free_port()
    with (
        enforcing(
            WINDOW, max_concurrency=max_concurrency, counts_from_ready=True, seconds_to_ready=0.05
        ) as gateway,
        running_bots(library, gateway, port) as bots,
    ):
        variables = gateway.discord.variables(
            PORT=port, WINDOW_SECONDS=WINDOW, MARGIN_SECONDS=MARGIN
        )
        bots.start_all()
        with serving(**variables) as queue:
            eventually(lambda: len(gateway.shards_up) >= 6, LONG)
            queue.signal(signal.SIGKILL)
            queue.wait()
        with serving(**variables) as queue:
            number = a_waiting_shard(queue) * PROCESSES // SHARDS
            bots.kill(number)
            bots.start(number)
            wait_until_all_are_up(gateway)

            bots.kill_all()
            eventually(lambda: not gateway.shards_up)
            bots.start_all()
            wait_until_all_are_up(gateway)
            eventually(lambda: all_are_confirmed(queue))
            assert metric(queue, "gateway_queue_unconfirmed_total") == 0
            assert slots_wasted(queue, WINDOW) == 0
            yield Fleet(gateway, queue)
    assert gateway.early == []


def gets_invalid_sessions_without_the_queue(library: Library) -> None:
    """Start the fleet without the queue, and wait for Invalid Sessions."""
    with (
        enforcing(5) as gateway,
        running_bots(library, gateway, None) as bots,
    ):
        bots.start_all()
        eventually(lambda: len(gateway.early) >= 6, LONG)
