"""Ask the queue before a shard of discord.py, py-cord, disnake or nextcord identifies.

Copy this file beside your bot. It needs nothing but the library, and aiohttp, on which the library
depends.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import ModuleType
from typing import Any, Literal

import aiohttp

__all__ = ["use_queue"]

log = logging.getLogger(__name__)

_FIRST_DELAY, _LONGEST_DELAY = 1.0, 10.0
"""Seconds until the queue is asked again after an error; they double each time."""

_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_read=300.0)
"""Seconds without data until the shard asks again, because the machine of the queue may have
vanished. If it has not, the shard keeps its place."""

_HEARTBEAT = 1
"""The opcode of the one message that a shard may send before it has identified."""


def use_queue(library: ModuleType, url: str, *, auth_token: str | None = None) -> None:
    """Let all clients of a library, in this process, ask the queue before a shard identifies.

    Call it once, before the clients start. Each shard asks with a confirmed ticket when it is
    connected to Discord, and keeps the response open until it has received READY. A shard whose
    connection ends while it waits stops asking. Shards that resume do not ask. A
    ``before_identify_hook`` is no longer called.

    Args:
      library: the module ``discord`` (discord.py or py-cord), ``disnake`` or ``nextcord``.
      url: where the queue is, for example ``http://127.0.0.1:5000``.
      auth_token: the queue's ``AUTH_TOKEN``, if it has one.
    """
    queue = _Queue(url, auth_token)
    bases = (_AskingWebSocket, library.gateway.DiscordWebSocket)
    socket = type("AskingWebSocket", bases, {"queue": queue})
    for module in (library.client, library.shard):
        module.DiscordWebSocket = socket


class _Queue:
    """The client's side of the queue."""

    def __init__(self, url: str, auth_token: str | None) -> None:
        self._url = url
        self._headers = {} if auth_token is None else {"authorization": f"Bearer {auth_token}"}

    @asynccontextmanager
    async def turn(self, shard_id: int) -> AsyncIterator[None]:
        """Wait for the turn of a shard; the end of the context confirms that it has identified."""
        async with aiohttp.ClientSession(timeout=_TIMEOUT, headers=self._headers) as session:
            response = await self._wait(session, shard_id)
            try:
                yield
            finally:
                response.close()

    async def _wait(self, session: aiohttp.ClientSession, shard_id: int) -> aiohttp.ClientResponse:
        delay = _FIRST_DELAY
        while True:
            try:
                response = await self._ask(session, shard_id)
                if response.status == 200 and await response.content.readany():
                    return response
                response.close()
                reason = f"status {response.status}"
            except TimeoutError:
                continue
            except aiohttp.ClientError as error:
                reason = str(error)
            log.warning("Shard %s asks the queue again in %s s: %s", shard_id, delay, reason)
            await asyncio.sleep(delay)
            delay = min(2 * delay, _LONGEST_DELAY)

    async def _ask(self, session: aiohttp.ClientSession, shard_id: int) -> aiohttp.ClientResponse:
        # aiohttp and proxies send a GET once more if its connection closes without an answer.
        return await session.post(self._url, params={"shard": shard_id, "confirm": "true"})


_Base: Any = object
"""Replaces, for type checkers, the library's websocket, which is the next base class."""


class _AskingWebSocket(_Base):  # type: ignore[misc]
    """The library's websocket, except that it asks the queue before it identifies."""

    queue: _Queue
    send: Any
    _turn: asyncio.Task[None] | None = None

    async def identify(self) -> None:
        # The library goes on as if this shard had identified: it reads from the connection, and
        # connects and resumes other shards.
        held = _Held(self.send)
        self.send = held.hold  # here, because other tasks may run before the new one
        self._turn = asyncio.create_task(self._identify_in_turn(held))
        if hasattr(self._connection, "shards_launched"):
            self._delay_on_ready(self._turn)

    async def resume(self) -> None:
        if self.session_id is None:  # the connection ended before the shard had a session
            await self.identify()
        else:
            await super().resume()

    async def poll_event(self) -> None:
        try:
            await super().poll_event()
        except BaseException:  # whatever it is, the connection has ended
            if self._turn is not None:
                self._turn.cancel()
            raise

    def _delay_on_ready(self, turn: asyncio.Task[None]) -> None:
        state = self._connection
        if not isinstance(state.shards_launched, _Launched):
            state.shards_launched = _Launched()
        state.shards_launched.add(turn)

    async def _identify_in_turn(self, held: _Held) -> None:
        ready = self.wait_for("READY", lambda _: True)
        self.call_hooks = _call_no_hook  # the library's own hook sleeps for 5 s
        try:
            async with self.queue.turn(self.shard_id or 0):
                self.send = held.send
                await super().identify()
                await ready
            await held.release()
        except Exception:
            log.exception("Shard %s could not identify; it connects again", self.shard_id)
            await self.close(4000)


class _Held:
    """Keeps messages until the shard has identified: otherwise, Discord closes its connection.

    Args:
      send: sends a message, as text.
    """

    def __init__(self, send: Callable[[str], Awaitable[None]]) -> None:
        self.send = send
        self._messages: list[str] = []

    async def hold(self, message: str) -> None:
        """Keep a message until the shard has identified; a heartbeat is sent at once."""
        if json.loads(message)["op"] == _HEARTBEAT:
            await self.send(message)
        else:
            self._messages.append(message)

    async def release(self) -> None:
        """Send the kept messages."""
        for message in self._messages:
            await self.send(message)


class _Launched(asyncio.Event):
    """The event that py-cord, disnake and nextcord wait for before they call ``on_ready``.

    They set it when all shards are connected. Waiting for this event also waits for the turns of
    shards that have not identified yet.
    """

    def __init__(self) -> None:
        super().__init__()
        self._waiting: set[asyncio.Task[None]] = set()

    def add(self, turn: asyncio.Task[None]) -> None:
        """Wait for the end of a shard's turn too."""
        self._waiting.add(turn)
        turn.add_done_callback(self._waiting.discard)

    async def wait(self) -> Literal[True]:
        await super().wait()
        while self._waiting:
            await asyncio.wait(self._waiting)
        return True


async def _call_no_hook(*_: object, **__: object) -> None:
    pass
