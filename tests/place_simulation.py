"""The effect of places: 200 shards whose clients give up after 30 s and ask again at once.

``python -m tests.place_simulation`` prints the table of the README.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass

import structlog
import trio

from gateway_queue.queue import Queue
from tests.running import on_mock_clock, running

SHARDS = 200
PATIENCE = 30.0
"""Seconds until a client gives up."""
SPREAD = 97.3
"""Seconds in which all shards come, as processes start one after another."""
OVERDUE = 60.0
"""A shard that is released more than this many seconds after its turn counts as overdue."""


@dataclass(frozen=True)
class Outcome:
    """The result of a simulation."""

    order: list[int]
    """The shards as they were released, numbered in the order in which they came."""
    times: list[float]
    """When each of them was released."""

    @property
    def waits(self) -> list[float]:
        """How many seconds each shard has waited since it came."""
        pairs = zip(self.order, self.times, strict=True)
        return [at - arrival(shard) for shard, at in pairs]

    @property
    def out_of_order(self) -> int:
        """Return how many shards were overtaken by a shard that came later."""
        overtaken, latest_to_go = 0, -1
        for shard in self.order:
            overtaken += shard < latest_to_go
            latest_to_go = max(latest_to_go, shard)
        return overtaken

    @property
    def starved(self) -> int:
        """How many shards were released over ``OVERDUE`` seconds after their turn."""
        return sum(
            at - self.times[shard] > OVERDUE
            for shard, at in zip(self.order, self.times, strict=True)
        )


def arrival(shard: int) -> float:
    return SPREAD * shard / SHARDS


def simulate(place_seconds: float) -> Outcome:
    """Run the simulation on the mock clock."""
    outcome = Outcome([], [])

    async def client(queue: Queue, shard: int) -> None:
        await trio.sleep_until(arrival(shard))
        while shard not in outcome.order:
            with trio.move_on_after(PATIENCE):
                async with queue.turn(shard):
                    outcome.order.append(shard)
                    outcome.times.append(trio.current_time())

    async def main() -> None:
        async with running(place_seconds=place_seconds) as queue, trio.open_nursery() as nursery:
            for shard in range(SHARDS):
                nursery.start_soon(client, queue, shard)

    on_mock_clock(main)
    return outcome


def table() -> str:
    """Compare the queue with and without places."""
    lines = [
        "| | without places | with places |",
        "| --- | --- | --- |",
    ]
    plain, kept = simulate(0), simulate(30)
    rows = {
        "all released after": [f"{outcome.times[-1]:,.0f} s" for outcome in (plain, kept)],
        "longest wait": [f"{max(outcome.waits):,.0f} s" for outcome in (plain, kept)],
        "shards overtaken by a later one": [str(o.out_of_order) for o in (plain, kept)],
        f"shards over {OVERDUE:.0f} s behind their turn": [str(o.starved) for o in (plain, kept)],
    }
    lines += [f"| {name} | {' | '.join(figures)} |" for name, figures in rows.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    argparse.ArgumentParser(
        prog="python -m tests.place_simulation",
        description="Compares queues with and without places, on a clock that jumps. This takes "
        "a few seconds.",
    ).parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    print(table())
