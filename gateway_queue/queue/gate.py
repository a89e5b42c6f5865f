"""Decides which lane claims next, when the store limits the releases of all keys together."""

from __future__ import annotations

import math
from typing import NoReturn

import trio

from gateway_queue.queue.lane import Lane, Order

SETTLE_SECONDS = 0.001
"""Lanes whose keys open at the same moment enter the gate within this time."""

RETURN_TURNS = 3
"""A lane that the store has refused enters the gate again within this number of turns of the event
loop. How many seconds these take depends on how busy the machine is."""


class Gate:
    """Lets one lane at a time claim its key: the lane with the oldest ticket first."""

    def __init__(self) -> None:
        self._waiting: dict[Lane, trio.Event] = {}
        self._opens_at = -math.inf
        self._refused: Order = (math.inf, 0)
        """The order of the ticket that the store refused last."""
        self._changed = trio.Event()
        self._admits_next = trio.Event()

    async def run(self) -> NoReturn:
        """Let lanes claim, one at a time, until cancelled."""
        while True:
            await self._until_open()
            lane = min(self._waiting, key=_oldest)
            self._admits_next = trio.Event()
            self._waiting.pop(lane).set()
            await self._admits_next.wait()
            for _ in range(RETURN_TURNS):
                await trio.lowlevel.checkpoint()

    async def _until_open(self) -> None:
        """Wait until a lane has entered and the store may grant a claim."""
        while not self._waiting or trio.current_time() < self._opens_at:
            with trio.move_on_at(self._opens_at if self._waiting else math.inf):
                await self._changed.wait()
            self._changed = trio.Event()
            await trio.sleep(SETTLE_SECONDS)

    async def enter(self, lane: Lane) -> None:
        """Wait until it is the lane's turn to claim. The caller calls admit_next() afterwards.

        A lane whose ticket is older than the one refused last claims at once, so that the store
        knows the oldest ticket that waits.
        """
        self._waiting[lane] = admitted = trio.Event()
        if _oldest(lane) < self._refused:
            self._opens_at = -math.inf
        self._changed.set()
        await admitted.wait()

    def admit_next(self) -> None:
        """Let the next lane claim."""
        self._admits_next.set()

    def close(self, refused: Order, seconds: float) -> None:
        """Let no lane claim for some seconds, unless its ticket is older than the refused one."""
        self._refused = refused
        self._opens_at = trio.current_time() + max(seconds, SETTLE_SECONDS)

    def open(self) -> None:
        """Let lanes claim again."""
        self._opens_at = -math.inf
        self._changed.set()


def _oldest(lane: Lane) -> Order:
    first = lane.first()
    return (math.inf, 0) if first is None else first.order
