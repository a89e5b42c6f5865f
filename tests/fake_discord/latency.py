"""A slow network: a proxy that delays the data that it passes on."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import partial

import trio


@dataclass(frozen=True)
class Latency:
    """Seconds that data is on its way, in either direction, normally distributed."""

    mean: float
    deviation: float
    seed: int = 0


async def delay(
    latency: Latency, port: int, *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED
) -> None:
    """Listen on a new port, the start value, and pass all data on to another port."""
    randomness = random.Random(latency.seed)

    async def connect(client: trio.SocketStream) -> None:
        server = await trio.open_tcp_stream("127.0.0.1", port)
        async with client, server, trio.open_nursery() as nursery:
            nursery.start_soon(_pass_on, client, server, latency, randomness)
            nursery.start_soon(_pass_on, server, client, latency, randomness)

    async with trio.open_nursery() as nursery:
        serve = partial(trio.serve_tcp, connect, 0, host="127.0.0.1")
        (listener,) = await nursery.start(serve)
        task_status.started(listener.socket.getsockname()[1])


async def _pass_on(
    source: trio.SocketStream,
    sink: trio.SocketStream,
    latency: Latency,
    randomness: random.Random,
) -> None:
    """Pass data on in order: data with a short delay waits for the data before it."""
    enter, leave = trio.open_memory_channel[tuple[float, bytes]](math.inf)

    async def read() -> None:
        arrives_at = -math.inf
        async with enter:
            data = b" "
            while data:
                try:
                    data = await source.receive_some()
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    data = b""
                on_its_way = max(0.0, randomness.gauss(latency.mean, latency.deviation))
                arrives_at = max(arrives_at, trio.current_time() + on_its_way)
                enter.send_nowait((arrives_at, data))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        async for arrives_at, data in leave:
            await trio.sleep_until(arrives_at)
            try:
                if data:
                    await sink.send_all(data)
                else:
                    await sink.send_eof()
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                break
        nursery.cancel_scope.cancel()
