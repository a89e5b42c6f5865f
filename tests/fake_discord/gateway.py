"""The gateway of a stand-in for Discord: it enforces the limits of IDENTIFY, and counts.

It has the part of the protocol that the libraries need:
https://discord.com/developers/docs/events/gateway
"""

from __future__ import annotations

import json
import math
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from importlib import import_module
from typing import Any
from urllib.parse import parse_qs, urlsplit

import trio
from trio_websocket import (
    ConnectionClosed,
    WebSocketConnection,
    WebSocketRequest,
    WebSocketServer,
    serve_websocket,
)

from tests.fake_discord import TOKEN, USER, FakeDiscord, playing
from tests.fake_discord.latency import Latency, delay


class Op(IntEnum):
    """The opcode of a message."""

    DISPATCH = 0
    HEARTBEAT = 1
    IDENTIFY = 2
    PRESENCE_UPDATE = 3
    RESUME = 6
    RECONNECT = 7
    INVALID_SESSION = 9
    HELLO = 10
    HEARTBEAT_ACK = 11


class Close(IntEnum):
    """Why the gateway closes a connection."""

    UNKNOWN_ERROR = 4000
    NOT_AUTHENTICATED = 4003
    AUTHENTICATION_FAILED = 4004
    ALREADY_AUTHENTICATED = 4005
    INVALID_SHARD = 4010


ENDS_SESSION = {1000, 1001}
"""If a client closes with one of these codes, its session ends. Otherwise it can be resumed."""


@dataclass(frozen=True)
class Identify:
    """One IDENTIFY."""

    shard: int
    at: float
    """When it arrived (:func:`time.monotonic`)."""
    early: bool
    """Whether it was answered with an Invalid Session."""


@dataclass
class Gateway:
    """A gateway that allows one IDENTIFY per window for each rate limit key, by its own clock.

    An early IDENTIFY gets an Invalid Session and does not delay the next window. It costs one of
    the day's session starts. A bot that uses more session starts than it has loses its token.
    """

    discord: FakeDiscord
    window: float
    """Seconds."""
    heartbeat_interval: float = 41.25
    """Seconds in which a client has to send a heartbeat."""
    counts_from_ready: bool = False
    """Whether the window starts when READY is sent, and not when IDENTIFY arrives."""
    seconds_to_ready: float = 0.0
    """Seconds from the arrival of IDENTIFY until READY is sent."""
    latency: Latency | None = None
    """Of the network; None for no delay. An IDENTIFY counts when it arrives here."""
    acknowledges: bool = True
    """Whether heartbeats are acknowledged. If not, connections are dead but open."""
    identifies: list[Identify] = field(default_factory=list)
    resumed: int = 0
    presences: int = 0
    """How many times a shard has changed its presence."""
    over_budget: int = 0
    """How many IDENTIFYs came when the day's session starts were spent."""
    trio_token: trio.lowlevel.TrioToken = field(init=False)
    """Of the event loop in which the gateway runs."""
    _opens_at: dict[int, float] = field(default_factory=dict, init=False)
    _sessions: dict[str, _Session] = field(default_factory=dict, init=False)
    _links: set[_Link] = field(default_factory=set, init=False)

    @property
    def started(self) -> list[Identify]:
        """The IDENTIFYs that were not early."""
        return [identify for identify in self.identifies if not identify.early]

    @property
    def early(self) -> list[Identify]:
        """The IDENTIFYs that got an Invalid Session."""
        return [identify for identify in self.identifies if identify.early]

    @property
    def shards_up(self) -> set[int]:
        """The shards that have a session."""
        links = list(self._links)  # tests look at it from another thread
        return {link.session.shard for link in links if link.session is not None}

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Serve until cancelled. Once it serves, Get Gateway Bot answers with its URL."""
        self.trio_token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as nursery:
            serve = partial(
                serve_websocket,
                self._accept,
                "127.0.0.1",
                0,
                ssl_context=None,
                handler_nursery=nursery,
            )
            server: WebSocketServer = await nursery.start(serve)
            port = server.port
            if self.latency is not None:
                port = await nursery.start(delay, self.latency, port)
            self.discord.gateway_url = f"ws://127.0.0.1:{port}"
            task_status.started()

    async def reconnect_all(self) -> None:
        """Ask every client to connect again and resume."""
        for link in list(self._links):
            with suppress(ConnectionClosed):
                await link.send(Op.RECONNECT)

    async def close_all(self) -> None:
        """Close every connection; sessions can be resumed."""
        async with trio.open_nursery() as nursery:
            for link in self._links:
                nursery.start_soon(link.socket.aclose, Close.UNKNOWN_ERROR)

    async def _accept(self, request: WebSocketRequest) -> None:
        query = parse_qs(urlsplit(request.path).query)
        link = _Link(await request.accept(), _compressor(*query.get("compress", [])))
        try:
            await link.send(Op.HELLO, {"heartbeat_interval": round(1000 * self.heartbeat_interval)})
            self._links.add(link)
            while True:
                with trio.fail_after(2 * self.heartbeat_interval):
                    message = json.loads(await link.socket.get_message())
                await self._answer(link, Op(message["op"]), message["d"])
        except (ConnectionClosed, trio.TooSlowError):
            pass
        finally:
            self._links.discard(link)
            self._end_session(link)

    def _end_session(self, link: _Link) -> None:
        if link.session is None:
            return
        if link.socket.closed is not None and link.socket.closed.code in ENDS_SESSION:
            self._sessions.pop(link.session.name, None)

    async def _answer(self, link: _Link, op: Op, data: Any) -> None:
        match op:
            case Op.HEARTBEAT:
                if self.acknowledges:
                    await link.send(Op.HEARTBEAT_ACK)
            case Op.IDENTIFY if link.session is None:
                await self._identify(link, data)
            case Op.RESUME if link.session is None:
                await self._resume(link, data)
            case Op.PRESENCE_UPDATE if link.session is not None:
                self.presences += 1
            case Op.PRESENCE_UPDATE:
                await link.socket.aclose(Close.NOT_AUTHENTICATED)
            case _:
                await link.socket.aclose(Close.ALREADY_AUTHENTICATED)

    async def _identify(self, link: _Link, data: Any) -> None:
        now = time.monotonic()
        shard, count = data.get("shard", (0, 1))
        if data["token"].removeprefix("Bot ") != TOKEN:
            await link.socket.aclose(Close.AUTHENTICATION_FAILED)
            return
        if not 0 <= shard < count:
            await link.socket.aclose(Close.INVALID_SHARD)
            return
        if self.discord.remaining == 0:
            self.over_budget += 1
            await link.socket.aclose(Close.AUTHENTICATION_FAILED)
            return
        self.discord.remaining -= 1
        key = shard % self.discord.max_concurrency
        early = now < self._opens_at.get(key, -math.inf)
        self.identifies.append(Identify(shard, now, early))
        session = _Session(f"session-{len(self.identifies)}", shard)
        if early:
            await link.send(Op.INVALID_SESSION, data=False)
            return
        self._opens_at[key] = math.inf if self.counts_from_ready else now + self.window
        await trio.sleep(self.seconds_to_ready)
        if link.socket.closed is not None:  # no READY is sent
            self._opens_at[key] = now + self.window
            return
        if self.counts_from_ready:
            self._opens_at[key] = time.monotonic() + self.window
        self._sessions[session.name] = session
        link.session = session
        await link.dispatch(
            "READY",
            {
                "v": 10,
                "user": USER,
                "guilds": [],
                "private_channels": [],
                "session_id": session.name,
                "_trace": [],
                "resume_gateway_url": self.discord.gateway_url,
                "shard": [shard, count],
                "application": {"id": USER["id"], "flags": 0},
            },
        )

    async def _resume(self, link: _Link, data: Any) -> None:
        if (session := self._sessions.get(data["session_id"])) is None:
            await link.send(Op.INVALID_SESSION, data=False)
            return
        self.resumed += 1
        link.session = session
        await link.dispatch("RESUMED", {})


@dataclass(frozen=True)
class _Session:
    name: str
    shard: int


def _compressor(stream: str = "") -> Callable[[bytes], bytes] | None:
    """Return a function that compresses each message as a part of one stream, or None."""
    match stream:
        case "zlib-stream":
            zlib_stream = zlib.compressobj()
            return lambda message: (
                zlib_stream.compress(message) + zlib_stream.flush(zlib.Z_SYNC_FLUSH)
            )
        case "zstd-stream":  # hikari asks for it on Python 3.14 or later
            zstd_stream = import_module("compression.zstd").ZstdCompressor()
            return partial(zstd_stream.compress, mode=zstd_stream.FLUSH_BLOCK)
        case _:
            return None


class _Link:
    """A connection of one client."""

    def __init__(
        self, socket: WebSocketConnection, compress: Callable[[bytes], bytes] | None
    ) -> None:
        self.socket = socket
        self.session: _Session | None = None
        self._compress = compress
        self._sequence = 0

    async def send(
        self, op: Op, data: Any = None, event: str | None = None, sequence: int | None = None
    ) -> None:
        message = json.dumps({"op": op, "d": data, "t": event, "s": sequence})
        if self._compress is None:
            await self.socket.send_message(message)
        else:
            await self.socket.send_message(self._compress(message.encode()))

    async def dispatch(self, event: str, data: Any) -> None:
        """Send an event."""
        self._sequence += 1
        await self.send(Op.DISPATCH, data, event, self._sequence)


@contextmanager
def enforcing(
    window: float, *, max_concurrency: int = 1, remaining: int = 1000, **options: Any
) -> Iterator[Gateway]:
    """Run the API and the gateway until the end of the context, in threads of this process.

    Args:
      window: seconds of Discord's own window.
      max_concurrency: number of rate limit keys.
      remaining: session starts that are left today.
      options: see :class:`Gateway`.
    """
    with playing(max_concurrency=max_concurrency, remaining=remaining) as discord:
        gateway = Gateway(discord, window, **options)
        serving = threading.Event()
        end = trio.CancelScope()

        async def main() -> None:
            with end:
                async with trio.open_nursery() as nursery:
                    await nursery.start(gateway.run)
                    serving.set()

        with ThreadPoolExecutor(1) as thread:
            running = thread.submit(trio.run, main)
            serving.wait()
            try:
                yield gateway
            finally:
                with suppress(trio.RunFinishedError):
                    gateway.trio_token.run_sync_soon(end.cancel)
                running.result()
