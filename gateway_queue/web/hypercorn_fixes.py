"""Hypercorn's connections, changed where stalled requests need it.

Hypercorn has no setting for any of this, and each change would serve its other users too. All
of it is in this module: subclasses of three of Hypercorn's classes, put in their place when the
app starts, so that they hold for every way to run it.
"""

from __future__ import annotations

import math
from contextlib import suppress
from http import HTTPStatus

import h2.events
import h11
import hypercorn.protocol
import hypercorn.trio.run
import structlog
import trio
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.h2 import H2Protocol
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.typing import H11SendableEvent

from gateway_queue.web.keep_alive import keep_alive

log = structlog.stdlib.get_logger(__name__)

PIPELINED_MAX = 2**16
"""Bytes that a client may send ahead, behind a request that still stalls."""


SEND_SECONDS, SLOWEST_READER = 0.8, 10_000
"""How soon a client has to read once the kernel's buffers are full, and how many bytes a second.
For who is next in line waits until an answer is written."""


def install() -> None:
    """Let Hypercorn use the classes below."""
    hypercorn.trio.run.TCPServer = Connection  # type: ignore[attr-defined]
    hypercorn.protocol.H11Protocol = HTTP1  # type: ignore[attr-defined]
    hypercorn.protocol.H2Protocol = HTTP2  # type: ignore[attr-defined]


class Connection(TCPServer):
    """A connection that is watched over by the kernel, which Hypercorn has no setting for.

    And a fault in it ends this connection alone, where Hypercorn would end the server.
    """

    async def run(self) -> None:
        keep_alive(self.stream)
        try:
            await super().run()
        except* Exception as errors:  # noqa: BLE001
            log.warning("connection closed after an error", error=repr(errors.exceptions))

    async def protocol_send(self, event: Event) -> None:
        """Close on a client that does not read, where Hypercorn would wait for it.

        What comes while the connection is being closed is dropped; trio has an error for that.
        """
        with suppress(trio.BusyResourceError):
            if isinstance(event, RawData):
                await self._write(event.data)
            else:
                await super().protocol_send(event)

    async def _write(self, data: bytes) -> None:
        async with self.send_lock:
            deadline = trio.current_time() + SEND_SECONDS + len(data) / SLOWEST_READER
            # A cancellation must not tear what is being written, but an answer may have to be out
            # at a certain time.
            if (answer_by := trio.current_effective_deadline()) != -math.inf:
                deadline = min(deadline, answer_by)
            try:
                with trio.fail_at(deadline, shield=True):
                    await self.stream.send_all(data)
            except (trio.TooSlowError, trio.BrokenResourceError, trio.ClosedResourceError):
                await trio.aclose_forcefully(self.stream)
                await self.protocol.handle(Closed())


class _Paused(Exception):
    """Nothing more can be parsed before the current request is answered."""


class _LeaveLoop:
    """Stands in for the event on which Hypercorn waits, deaf to its client, while h11 pauses."""

    async def clear(self) -> None:
        pass

    async def set(self) -> None:
        pass

    async def wait(self) -> None:
        raise _Paused

    def is_set(self) -> bool:
        return True


class HTTP1(H11Protocol):
    """HTTP/1 that hears its client at any time, knows no WebSockets and never answers a 5xx."""

    async def initiate(self) -> None:
        self.can_read = _LeaveLoop()
        self._paused = False

    async def _handle_events(self) -> None:
        """Parse what has come, and go on to read when h11 pauses.

        h11 pauses after CONNECT, after a request that offers an upgrade, and when bytes follow a
        request that still stalls. While Hypercorn waits for the end of a pause it does not read,
        so it would not notice that the client has left.
        """
        try:
            await super()._handle_events()
        except _Paused:
            self._paused = True
            if len(self.connection.trailing_data[0]) > PIPELINED_MAX:
                await self.send(Closed())

    async def _maybe_recycle(self) -> None:
        """Get ready for the next request, and read it if it has come during a pause.

        Quart cancels whoever sends an answer as soon as it hears that all is sent, so here.
        """
        with trio.CancelScope(shield=True):
            await super()._maybe_recycle()
        if self._paused and self.connection.our_state is h11.IDLE:
            self._paused = False
            self.task_group.spawn(self._handle_events)

    async def _create_stream(self, request: h11.Request) -> None:
        """Ignore an offer of WebSockets, as a server may: the request is a request like any."""
        headers = [(name, value) for name, value in request.headers if name != b"upgrade"]
        if len(headers) != len(request.headers):
            request = h11.Request(
                method=request.method,
                target=request.target,
                headers=headers,
                http_version=request.http_version,
            )
        await super()._create_stream(request)

    async def _send_h11_event(self, event: H11SendableEvent) -> None:
        """Leave out the body when CONNECT is answered, which has none (RFC 9110, 9.3.6)."""
        if self.connection.our_state is not h11.SWITCHED_PROTOCOL:
            await super()._send_h11_event(event)

    async def _send_error_response(self, status_code: int) -> None:
        """Answer what is no request at all; otherwise close without an answer.

        The others are: 431 for long headers, 501 for a transfer coding that h11 does not know,
        400 for a broken body behind a request that stalls.
        """
        if status_code == HTTPStatus.BAD_REQUEST and self.stream is None:
            await super()._send_error_response(status_code)


class HTTP2(H2Protocol):
    """HTTP/2 that bears the end of an upload after its answer, and knows no WebSockets."""

    async def initiate(
        self, headers: list[tuple[bytes, bytes]] | None = None, settings: bytes | None = None
    ) -> None:
        """Begin to count the time in which a client asks for nothing."""
        await super().initiate(headers, settings)
        if headers is None:
            await self.send(Updated(idle=True))

    async def handle(self, event: Event) -> None:
        """Let go of answers that nobody sends any more, or they would wait for it for ever."""
        await super().handle(event)
        if isinstance(event, Closed):
            for buffer in list(self.stream_buffers.values()):
                await buffer.close()

    async def _handle_events(self, events: list[h2.events.Event]) -> None:
        for event in events:
            if isinstance(event, h2.events.DataReceived) and event.stream_id not in self.streams:
                self._drop(event)
            else:
                await super()._handle_events([event])
        await self._flush()

    def _drop(self, data: h2.events.DataReceived) -> None:
        """Give the client its credit back for data behind the answer."""
        self.connection.acknowledge_received_data(data.flow_controlled_length, data.stream_id)

    async def _create_stream(self, request: h2.events.RequestReceived) -> None:
        """Take CONNECT, which Hypercorn reserves for WebSockets, as a request like any."""
        headers = dict(request.headers)
        if headers[b":method"] == b"CONNECT":
            request.headers = list({b":path": b"/", **headers, b":method": b"GET"}.items())
        await super()._create_stream(request)
