"""Ways in which shards wait until they may identify: the queue, and what users do otherwise."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from itertools import count
from typing import Protocol

import trio

from tests.harness import GO, asking


class Way(Protocol):
    """How the shards of one process wait."""

    async def wait_for_turn(self, shard: int) -> None:
        """Return when a shard may identify."""


class OwnPace:
    """No queue: each process counts windows by itself, as all libraries do.

    Args:
      keys: number of rate limit keys.
      window: seconds.
    """

    def __init__(self, keys: int, window: float) -> None:
        self._keys = keys
        self._window = window
        self._lines = defaultdict[int, trio.Lock](trio.Lock)
        self._opens_at = defaultdict[int, float](float)

    async def wait_for_turn(self, shard: int) -> None:
        key = shard % self._keys
        async with self._lines[key]:
            await trio.sleep_until(self._opens_at[key])
            self._opens_at[key] = trio.current_time() + self._window


class NaiveLock:
    """A lock for each key that expires by itself: ``SET key shard NX EX 6``, tried every 500 ms.

    It stands for one in Redis, but for the time that asking takes there.

    Args:
      keys: number of rate limit keys.
      second: how long here is what is a second on Discord.
    """

    def __init__(self, keys: int, second: float) -> None:
        self._keys = keys
        self._expires_after = 6 * second
        self._poll_interval = 0.5 * second
        self._expires_at = defaultdict[int, float](float)

    async def wait_for_turn(self, shard: int) -> None:
        key = shard % self._keys
        start = trio.current_time()
        while (expires_at := self._expires_at[key]) > trio.current_time():
            # Tries before this one fail anyhow, so they need not be made.
            tries = math.ceil((expires_at - start) / self._poll_interval)
            await trio.sleep_until(start + tries * self._poll_interval)
        self._expires_at[key] = trio.current_time() + self._expires_after


class AskQueue:
    """The real server, asked over plain sockets: thousands of clients share a machine with it.

    Args:
      ports: where it is; if there are replicas, each shard asks one after the other.
      patience: seconds after which a client gives up and asks again.
      retry_after: seconds until it asks again.
    """

    def __init__(self, ports: Sequence[int], patience: float, retry_after: float) -> None:
        self._ports = ports
        self._patience = patience
        self._retry_after = retry_after

    async def wait_for_turn(self, shard: int) -> None:
        for attempt in count(random.randrange(len(self._ports))):
            port = self._ports[attempt % len(self._ports)]
            with trio.move_on_after(self._patience), suppress(OSError, trio.BrokenResourceError):
                if await self._is_let_go(shard, port):
                    return
            await trio.sleep(self._retry_after)

    async def _is_let_go(self, shard: int, port: int) -> bool:
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(asking(shard))
            answer = b""
            while not answer.endswith(GO):
                if not (received := await stream.receive_some()):
                    return False
                answer += received
            return True
