"""The tasks of a connection: one for each request."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from types import TracebackType

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.task_group import TaskGroup
from hypercorn.typing import AppWrapper, ASGIReceiveEvent, ASGISendEvent, Scope

from gateway_queue.serving.hypercorn.stream import ClientGone
from gateway_queue.serving.hypercorn.turns import turns

PARTS_PER_STEP = 20
"""Parts of a body that are read in one step: half a millisecond, if they are small."""


class Requests(TaskGroup):
    """The tasks of a connection: one for each request, which ends when the client leaves.

    Hypercorn gives the app a channel instead, on which the body comes and then the disconnect. So a
    request that stalls needs a second task to listen, and a nursery for both. That took a quarter
    of the memory of the request, and an eighth of its CPU time.
    """

    _nursery: trio.Nursery
    _nursery_manager: AbstractAsyncContextManager[trio.Nursery]

    @property
    def cancel_scope(self) -> trio.CancelScope:
        return self._nursery.cancel_scope

    async def spawn_app(
        self,
        app: AppWrapper,
        config: Config,
        scope: Scope,
        send: Callable[[ASGISendEvent | None], Awaitable[None]],
    ) -> Callable[[ASGIReceiveEvent], Awaitable[None]]:
        client = _ClientSide()
        self._nursery.start_soon(client.serve, app, config, scope, send)
        return client.notice

    async def __aexit__(  # type: ignore[override]
        self,
        kind: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        """Return whether the exception is suppressed. Hypercorn does not return this."""
        return await self._nursery_manager.__aexit__(kind, exception, traceback)


class _ClientSide:
    """The client side of one request: its body, which is discarded, and its disconnect."""

    __slots__ = ("_has_ended", "_here", "_is_told", "_is_whole", "_parts")

    def __init__(self) -> None:
        self._here = trio.CancelScope()
        self._is_whole = self._is_told = False
        """Whether all of the body was read, and whether the app knows it."""
        self._has_ended: trio.Event | None = None
        """Set when the body ends. Only for an app that waits for it: an event takes 0.2 kB."""
        self._parts = 0
        """How many parts of the body were read."""

    async def serve(
        self,
        app: AppWrapper,
        config: Config,
        scope: Scope,
        send: Callable[[ASGISendEvent | None], Awaitable[None]],
    ) -> None:
        try:
            with self._here:
                if isinstance(app, ASGIWrapper):  # saves a coroutine
                    await app.app(scope, self._receive, send)
                else:
                    threads = trio.to_thread.run_sync, trio.from_thread.run
                    await app(scope, self._receive, send, *threads)
        except* ClientGone:
            pass
        except* Exception:  # noqa: BLE001
            await config.log.exception("Error in ASGI Framework")
        await send(None)

    async def notice(self, event: ASGIReceiveEvent) -> None:
        """Handle what the connection has read of the request."""
        if event["type"] == "http.disconnect":
            self._here.cancel()
            # The request's task ends before its connection does.
            await trio.lowlevel.checkpoint()
        elif event["type"] == "http.request" and not event["more_body"]:
            self._is_whole = True
            if self._has_ended is not None:
                self._has_ended.set()
        else:
            self._parts += 1
            if self._parts % PARTS_PER_STEP == 0:
                await turns().wait()

    async def _receive(self) -> ASGIReceiveEvent:
        """Return an empty body once the request's body has ended; a second call never returns."""
        if self._is_told:
            await trio.sleep_forever()
        if not self._is_whole:
            self._has_ended = trio.Event()
            await self._has_ended.wait()
        self._is_told = True
        return {"type": "http.request", "body": b"", "more_body": False}
