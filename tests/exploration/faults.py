"""The faults of a run: each of them starts, lasts for some time, and ends."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import NoReturn

import trio

from gateway_queue.store.redis.servers import OVERLAP_SECONDS
from tests.exploration.discord import SimulatedDiscord
from tests.exploration.fleet import Fleet
from tests.exploration.primaries import Primaries, SimulatedSentinel
from tests.exploration.record import Record
from tests.exploration.redis_data import Database
from tests.exploration.redis_server import SimulatedRedis
from tests.exploration.scenario import DISCORD_FAULTS

CONNECTED_SECONDS = 1.5
"""Seconds until all processes are connected to Redis.

A process with ``HOLD_ON_START=false`` assumes that nothing was released before its start. So until
it is connected, Redis must not lose what other processes release.
"""


class Faults:
    """Starts the faults of a bot's scenario, at times that its seed chooses.

    Faults of processes and of Redis affect all bots, so only the first bot's scenario starts them.
    """

    def __init__(
        self, record: Record, fleet: Fleet, primaries: Primaries, discord: SimulatedDiscord
    ) -> None:
        scenario = record.scenario
        self._random = random.Random(f"faults {scenario.source}")
        self._kinds = [
            kind for kind in scenario.faults if not scenario.bot or kind in DISCORD_FAULTS
        ]
        self._record = record
        self._window = record.scenario.window
        self._fleet = fleet
        self._primaries = primaries
        self._discord = discord
        self._clock_is_unsteady = False
        self._causes: dict[str, Callable[[], Awaitable[None]]] = {
            "kill": self._kill,
            "freeze": self._freeze,
            "stop": self._stop,
            "reset": self._reset,
            "cuts": self._cut_often,
            "slow-way": self._slow_way_down,
            "partition": self._cut_off,
            "lost-request": self._lose_requests,
            "lost-reply": self._lose_replies,
            "slow": self._slow_down,
            "down": self._take_down,
            "restart": self._restart,
            "wipe": self._wipe,
            "failover": self._fail_over,
            "proxied-failover": self._fail_over_behind_proxy,
            "reload": self._reload,
            "delete-key": self._delete_key,
            "evict": self._evict,
            "flush": self._flush,
            "set-clock": self._set_clock,
            "unsteady-clock": self._set_clock_often,
            "sentinel-failover": self._fail_over_by_sentinels,
            "sentinels-down": self._take_sentinels_down,
            "cluster-failover": self._fail_over_in_cluster,
            "max-concurrency": self._change_max_concurrency,
            "budget": self._grant_more,
            "discord-down": self._take_discord_down,
        }

    async def run(self) -> None:
        """Start faults until ``fault_seconds`` are over, and then repair everything."""
        scenario, source = self._record.scenario, self._random
        with trio.move_on_at(scenario.fault_seconds):
            async with trio.open_nursery() as nursery:
                while self._kinds:
                    await trio.sleep(source.uniform(0, 2) * self._window)
                    if not scenario.hold_on_start:
                        await trio.sleep_until(CONNECTED_SECONDS)
                    nursery.start_soon(self._causes[source.choice(self._kinds)])
                await trio.sleep_forever()
        self._primaries.mend()
        await self._fleet.mend()

    @property
    def _redis(self) -> SimulatedRedis:
        return self._primaries.current

    async def _last(self, least: float, most: float) -> None:
        await trio.sleep(self._random.uniform(least, most))

    # Processes

    async def _kill(self) -> None:
        if process := self._fleet.any(self._random):
            await process.kill()
            await self._last(0, 2 * self._window)
            await self._fleet.start(process.replica)

    async def _stop(self) -> None:
        if process := self._fleet.any(self._random):
            with trio.CancelScope(shield=True):
                process.thaw()
                await process.stop()
            await self._last(0, self._window)
            await self._fleet.start(process.replica)

    async def _freeze(self) -> None:
        if process := self._fleet.any(self._random):
            if self._random.random() < 0.5:  # at the moment of a request to Redis
                with trio.move_on_after(self._window):
                    await process.sends.park()
            process.freeze()
            try:
                await self._last(0.1 * self._window, 4 * self._window)
            finally:
                process.thaw()

    # Redis

    async def _reset(self) -> None:
        self._record.note("Redis: connections reset")
        self._redis.reset_connections("Connection reset by peer")

    async def _cut_often(self) -> None:
        self._record.note("Redis: connections are cut often")
        with trio.move_on_after(self._random.uniform(2, 8) * self._window):
            while True:
                await self._last(1, 1 + self._window)
                for record in self._record.history.records:
                    record.cuts.append(trio.current_time())
                await self._reset()

    async def _slow_way_down(self) -> None:
        """Delay what Redis answers to one process: too late to use, but within a second."""
        process = self._fleet.any(self._random)
        if process is None or process.way_latency:
            return
        self._record.note(f"Redis: the way of {process} is slow")
        process.way_latency = self._random.uniform(0.26, 0.4)
        began_at = trio.current_time()
        try:
            await self._last(5, 10 + self._window)
        finally:
            process.way_latency = 0.0
            for part in process.parts:
                slow = part.record, began_at, trio.current_time()
                part.bot.record.slow_ways.append(slow)

    async def _cut_off(self) -> None:
        """Hold back all traffic between one process and Redis for some time."""
        if process := self._fleet.any(self._random):
            process.cut_off()
            try:
                await self._last(0.1 * self._window, 4 * self._window)
            finally:
                process.reconnect()

    async def _lose_requests(self) -> None:
        self._record.note("Redis: requests get lost")
        redis = self._redis
        redis.loses_requests = self._random.choice((0.1, 0.5))
        try:
            await self._last(0, 2 * self._window)
        finally:
            redis.loses_requests = 0

    async def _lose_replies(self) -> None:
        self._record.note("Redis: replies get lost")
        redis = self._redis
        redis.loses_replies = self._random.choice((0.1, 0.5))
        try:
            await self._last(0, 2 * self._window)
        finally:
            redis.loses_replies = 0

    async def _slow_down(self) -> None:
        if self._random.random() < 0.5:
            self._record.note("Redis: stalls")
            self._redis.stalls_until = trio.current_time() + self._random.uniform(0, 3)
            return
        self._record.note("Redis: slow")
        redis = self._redis
        redis.extra_latency = self._random.choice((0.1, 0.6, 1.5))
        try:
            await self._last(0, 3 * self._window)
        finally:
            redis.extra_latency = 0

    async def _be_down(self) -> None:
        redis = self._redis
        redis.is_up = False
        redis.reset_connections("Connection closed by server")
        try:
            await self._last(0, 2 * self._window)
        finally:
            redis.is_up = True

    async def _take_down(self) -> None:
        self._record.note("Redis: unreachable")
        await self._be_down()

    async def _restart(self) -> None:
        self._record.note("Redis: restarts")
        self._redis.start_anew(self._redis.data)
        await self._be_down()

    async def _wipe(self) -> None:
        self._redis.lose("restarts without its data")
        self._redis.start_anew(self._empty())
        await self._be_down()

    async def _fail_over(self, *, keeps_connections: bool = False) -> None:
        copy = self._redis.data.copy()
        await self._last(0, self._window)
        how = "behind a proxy " if keeps_connections else ""
        self._redis.lose(f"failed over {how}to a copy that lacks the last writes")
        self._redis.start_anew(copy, keeps_connections=keeps_connections)

    async def _fail_over_behind_proxy(self) -> None:
        await self._fail_over(keeps_connections=True)

    async def _reload(self) -> None:
        copy, copied_at = self._redis.data.copy(), trio.current_time()
        await self._last(0, 2 * self._window)
        self._redis.lose("reloads an older snapshot", copied_at=copied_at)
        self._redis.data = copy

    async def _delete_key(self) -> None:
        keys = sorted(self._redis.data.values)
        if keys:
            key = self._random.choice(keys)
            self._redis.lose(f"DEL {key.decode()}", key.decode().rpartition(":")[0])
            self._redis.data.delete(key)

    async def _evict(self) -> None:
        redis = self._redis
        redis.policy = b"allkeys-random"
        try:
            for _ in range(self._random.randint(2, 20)):
                await self._last(0, self._window / 4)
                await self._delete_key()
        finally:
            redis.policy = b"noeviction"

    async def _flush(self) -> None:
        self._redis.lose("FLUSHALL")
        self._redis.data = self._empty()

    async def _set_clock(self) -> None:
        far = self._random.choice((0.01, 0.3, self._window, 60, 3600, 30 * 86400))
        self._redis.set_clock(self._random.uniform(-far, far))

    async def _set_clock_often(self) -> None:
        """Set the clock by small steps, again and again.

        Only one such fault runs at a time, because the sum of all steps within a second must be
        small.
        """
        if self._clock_is_unsteady:
            return
        self._record.note("Redis: its clock is set often")
        self._clock_is_unsteady = True
        way = self._random.choice((self._let_clock_drift, self._let_clock_jump))
        with trio.move_on_after(self._random.uniform(2, 8) * self._window):
            await way(self._random.choice((0.001, 0.01, 0.1, 0.4)))
        self._clock_is_unsteady = False

    async def _let_clock_drift(self, far: float) -> NoReturn:
        step = self._random.uniform(-far, far) / 4
        while True:
            await self._last(0.2, 2)
            self._redis.adjust_clock(step)

    async def _let_clock_jump(self, far: float) -> NoReturn:
        """Set the clock forward or back, and soon to the right time again."""
        while True:
            await self._last(0.2, 2)
            step = self._random.uniform(-far, far)
            self._redis.adjust_clock(step)
            try:
                await self._last(0.05, 1)
            finally:
                self._redis.adjust_clock(-step)

    async def _take_over(self) -> SimulatedRedis | None:
        """Make a server without the last writes the primary, while the former one keeps running.

        Returns:
          The former primary; None if another server has taken over meanwhile.
        """
        former = self._redis
        copy = former.data.copy()
        await self._last(0, 1)
        if former is not self._redis:
            return None
        self._primaries.take_over(copy)
        return former

    async def _fail_over_by_sentinels(self) -> None:
        """Make another server the primary; sentinels learn of it at different times, or never."""
        former = await self._take_over()
        if former is None:
            return
        aware = self._random.sample(self._primaries.sentinels, self._random.choice((2, 3)))
        if len(aware) == 2:
            self._cut_off_from(aware)
        try:
            async with trio.open_nursery() as nursery:
                for sentinel in aware:
                    nursery.start_soon(self._learn_of_primary, sentinel)
            await self._last(0, 4 * self._window)
        finally:
            former.retire()
            for sentinel in self._primaries.sentinels:
                sentinel.cut_off_from, sentinel.named = None, len(self._primaries.servers) - 1

    def _cut_off_from(self, aware: list[SimulatedSentinel]) -> None:
        """Cut a process off from all sentinels but the one that still names the former primary."""
        if process := self._fleet.any(self._random):
            self._record.note(f"{process} is cut off from two sentinels")
            for sentinel in aware:
                sentinel.cut_off_from = process

    async def _learn_of_primary(self, sentinel: SimulatedSentinel) -> None:
        number = len(self._primaries.servers) - 1
        await self._last(0, 2)
        sentinel.named = max(sentinel.named, number)
        if sorted(one.named for one in self._primaries.sentinels)[1] == number:
            await trio.sleep(OVERLAP_SECONDS)
            self._redis.lose("no replica uses the former server any more")

    async def _fail_over_in_cluster(self) -> None:
        """Make another node the primary; the former primary notices it later."""
        former = await self._take_over()
        if former is None:
            return
        try:
            await self._last(0, 0.5)
        finally:
            self._primaries.isolated = None
            self._redis.lose("the former node has noticed")
            if self._random.random() < 0.5:
                former.retire()

    async def _take_sentinels_down(self) -> None:
        down = self._random.sample(self._primaries.sentinels, self._random.choice((1, 1, 2, 3)))
        self._record.note(f"{len(down)} sentinels are down")
        for sentinel in down:
            sentinel.is_up = False
        try:
            await self._last(0, 3 * self._window)
        finally:
            for sentinel in down:
                sentinel.is_up = True

    def _empty(self) -> Database:
        return Database(self._redis.random)

    # Discord

    async def _change_max_concurrency(self) -> None:
        self._discord.change_max_concurrency()

    async def _grant_more(self) -> None:
        self._discord.grant_more()

    async def _take_discord_down(self) -> None:
        self._record.note("Discord: down")
        self._discord.is_down = True
        try:
            await self._last(0, 4 * self._window)
        finally:
            self._discord.is_down = False
