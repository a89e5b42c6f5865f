"""The stand-in for Discord's gateway: how it counts, and its network."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import trio
from trio_websocket import WebSocketConnection, open_websocket_url

from tests.fake_discord import TOKEN, playing
from tests.fake_discord.gateway import Gateway, Op
from tests.fake_discord.latency import Latency, delay

FROM_ARRIVAL, FROM_READY = {"window": 0.5}, {"window": 60.0, "counts_from_ready": True}


@asynccontextmanager
async def running(**options: Any) -> AsyncIterator[Gateway]:
    with playing() as discord:
        gateway = Gateway(discord, **options)
        async with trio.open_nursery() as nursery:
            await nursery.start(gateway.run)
            yield gateway
            nursery.cancel_scope.cancel()


async def identify(socket: WebSocketConnection, shard: int) -> Any:
    """Return the answer, after HELLO."""
    await socket.get_message()
    data = {"token": TOKEN, "shard": [shard, 2]}
    await socket.send_message(json.dumps({"op": Op.IDENTIFY, "d": data}))
    return json.loads(await socket.get_message())


@pytest.mark.parametrize(
    ("options", "second"),
    [(FROM_ARRIVAL, Op.DISPATCH), (FROM_READY, Op.INVALID_SESSION)],
    ids=["from arrival", "from READY"],
)
async def test_the_window_starts_with_the_arrival_of_identify_or_with_ready(
    options: dict[str, Any], second: Op
) -> None:
    async with running(**options, seconds_to_ready=0.5) as gateway:
        url = gateway.discord.gateway_url
        async with open_websocket_url(url) as one, open_websocket_url(url) as other:
            assert (await identify(one, 0))["t"] == "READY"
            assert (await identify(other, 1))["op"] == second


async def test_messages_take_their_time_on_the_network() -> None:
    async with running(window=5, latency=Latency(0.1, 0)) as gateway:
        started = trio.current_time()
        async with open_websocket_url(gateway.discord.gateway_url) as socket:
            await identify(socket, 0)
        assert trio.current_time() - started >= 0.4


async def test_the_network_keeps_the_order_of_what_is_sent() -> None:
    async def echo(stream: trio.SocketStream) -> None:
        async for data in stream:
            await stream.send_all(data)

    sent = bytes(range(100))
    async with trio.open_nursery() as nursery:
        serve = partial(trio.serve_tcp, echo, 0, host="127.0.0.1")
        (listener,) = await nursery.start(serve)
        port = await nursery.start(delay, Latency(0.05, 0.05), listener.socket.getsockname()[1])
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            for number in sent:
                await stream.send_all(bytes([number]))
                await trio.sleep(0.001)
            await stream.send_eof()
            received = b"".join([data async for data in stream])
        nursery.cancel_scope.cancel()
    assert received == sent
