"""Ways in which shards wait until they may identify: the queue, and what users do without it."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from itertools import count
from typing import Protocol

import trio

from tests.harness import GO, asking


class Way(Protocol):
    """How the shards of one process wait."""

    def turn(self, shard: int) -> AbstractAsyncContextManager[None]:
        """Make the context that begins when a shard may identify, and ends when it has."""


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

    @asynccontextmanager
    async def turn(self, shard: int) -> AsyncIterator[None]:
        key = shard % self._keys
        async with self._lines[key]:
            await trio.sleep_until(self._opens_at[key])
            self._opens_at[key] = trio.current_time() + self._window
        yield


class ExpiringLock:
    """A lock for each key that expires by itself: ``SET key shard NX PX 5100``, tried every 500 ms.

    It imitates a lock in Redis, without the time that Redis takes to answer.

    Args:
      keys: number of rate limit keys.
      second: real seconds per second of Discord's clock.
      expiry: seconds of Discord's clock until a lock expires.
    """

    def __init__(self, keys: int, second: float, expiry: float) -> None:
        self._keys = keys
        self._expires_after = expiry * second
        self._poll_interval = 0.5 * second
        self._expires_at = defaultdict[int, float](float)

    @asynccontextmanager
    async def turn(self, shard: int) -> AsyncIterator[None]:
        key = shard % self._keys
        start = trio.current_time()
        while (expires_at := self._expires_at[key]) > trio.current_time():
            # Earlier tries would fail.
            tries = math.ceil((expires_at - start) / self._poll_interval)
            await trio.sleep_until(start + tries * self._poll_interval)
        self._expires_at[key] = trio.current_time() + self._expires_after
        yield


class AskQueue:
    """The real server, asked over plain sockets: thousands of clients share a machine with it.

    Args:
      ports: one for each replica; each shard asks them in turn, from a random one on.
      patience: seconds after which a client gives up and asks again at once.
      retry_after: seconds until it asks again after an error.
    """

    def __init__(self, ports: Sequence[int], patience: float, retry_after: float) -> None:
        self._ports = ports
        self._patience = patience
        self._retry_after = retry_after

    @asynccontextmanager
    async def turn(self, shard: int) -> AsyncIterator[None]:
        async with await self._wait(shard):
            yield

    async def _wait(self, shard: int) -> trio.SocketStream:
        """Return the connection of the answered request; closing it confirms the ticket."""
        for attempt in count(random.randrange(len(self._ports))):
            port = self._ports[attempt % len(self._ports)]
            with (
                trio.move_on_after(self._patience) as asking,
                suppress(OSError, trio.BrokenResourceError),
            ):
                return await _ask(shard, port)
            if not asking.cancelled_caught:
                await trio.sleep(self._retry_after)
        raise AssertionError


async def _ask(shard: int, port: int) -> trio.SocketStream:
    """Return the connection when it is the shard's turn."""
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    try:
        await stream.send_all(asking(shard, confirm=True))
        await _read_answer(stream)
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise
    return stream


async def _read_answer(stream: trio.SocketStream) -> None:
    answer = b""
    while GO not in answer:
        if not (received := await stream.receive_some()):
            raise trio.BrokenResourceError
        answer += received
