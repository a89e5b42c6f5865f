"""Simulated shards and their processes: thousands of them in one trio loop.

A crash is a cancellation: connections close without a close frame, as those of a killed process.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import trio
from trio_websocket import ConnectionClosed, connect_websocket_url

from tests.fake_discord import TOKEN
from tests.fake_discord.gateway import Gateway, Op
from tests.simulation.ways import Way


@dataclass(frozen=True)
class Wait:
    """When a shard first asked for its turn, and when it had a session (on trio's clock)."""

    shard: int
    asked_at: float
    up_at: float


@dataclass
class Fleet:
    """A bot that starts.

    Args:
      gateway: where the shards start sessions.
      ways: how the shards of each process wait for their turn.
      shards: how many there are.
      second: real seconds per second of Discord's clock.
      crash_at: when some shards crash (:func:`trio.current_time`), once each.
    """

    gateway: Gateway
    ways: Sequence[Way]
    shards: int
    second: float
    crash_at: dict[int, float]
    waits: list[Wait] = field(default_factory=list)
    _asked_at: dict[int, float] = field(default_factory=dict)
    _processes: dict[int, trio.CancelScope] = field(default_factory=dict)

    @property
    def is_up(self) -> bool:
        return len(self.gateway.shards_up) == self.shards and not self.crash_at

    async def run(self) -> None:
        """Keep all processes running until cancelled."""
        async with trio.open_nursery() as nursery:
            for number in range(len(self.ways)):
                nursery.start_soon(self._run_process, number)

    async def kill_process(self) -> None:
        """Crash all shards of a random process; it starts again."""
        random.choice(list(self._processes.values())).cancel()

    async def _run_process(self, number: int) -> None:
        size = -(-self.shards // len(self.ways))
        shards = range(self.shards)[number * size : (number + 1) * size]
        while True:
            connecting = trio.Lock()  # one shard of a process at a time
            with trio.CancelScope() as self._processes[number]:
                async with trio.open_nursery() as nursery:
                    for shard in shards:
                        nursery.start_soon(self._run_shard, shard, self.ways[number], connecting)
            await self._restart()

    async def _run_shard(self, shard: int, way: Way, connecting: trio.Lock) -> None:
        if shard in self.crash_at:
            with trio.move_on_at(self.crash_at[shard]):
                await self._stay_up(shard, way, connecting)
            del self.crash_at[shard]
            await self._restart()
        await self._stay_up(shard, way, connecting)

    async def _restart(self) -> None:
        await trio.sleep(random.uniform(0.5, 2) * self.second)

    async def _stay_up(self, shard: int, way: Way, connecting: trio.Lock) -> None:
        url = self.gateway.discord.gateway_url
        identify = {"op": Op.IDENTIFY, "d": {"token": TOKEN, "shard": [shard, self.shards]}}
        while True:
            async with trio.open_nursery() as connection:
                async with connecting:
                    socket = await connect_websocket_url(connection, url)
                    await socket.get_message()  # HELLO
                # A shard that crashes while it waits keeps its place in the queue.
                self._asked_at.setdefault(shard, trio.current_time())
                async with way.turn(shard):
                    await socket.send_message(json.dumps(identify))
                    try:
                        answer = json.loads(await socket.get_message())
                    except ConnectionClosed:  # the token was reset
                        await trio.sleep_forever()
                if answer["op"] == Op.DISPATCH:
                    self.waits.append(Wait(shard, self._asked_at.pop(shard), trio.current_time()))
                    await trio.sleep_forever()
                connection.cancel_scope.cancel()
            # As Discord demands after an Invalid Session.
            await trio.sleep(random.uniform(1, 5) * self.second)
