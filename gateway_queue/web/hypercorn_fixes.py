"""Hypercorn's connections, changed where stalled requests need it.

Hypercorn has no setting for any of this, and most of it would serve its other users too. All
of it is in this module: subclasses of some of Hypercorn's classes, put in their place when the
app starts, so that they hold for every way to run it.
"""

from __future__ import annotations

import math
import select
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from types import TracebackType
from typing import Any

import h2.errors
import h2.events
import h2.exceptions
import h11
import hypercorn.protocol
import hypercorn.protocol.h2
import hypercorn.protocol.h11
import hypercorn.trio.run
import hypercorn.trio.tcp_server
import structlog
import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.events import EndBody, Response, StreamClosed
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.h2 import H2Protocol, StreamBuffer
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.protocol.http_stream import ASGIHTTPState, HTTPStream
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.tcp_server import MAX_RECV, TCPServer
from hypercorn.trio.worker_context import TrioSingleTask, WorkerContext
from hypercorn.typing import (
    AppWrapper,
    ASGIReceiveEvent,
    ASGISendEvent,
    H11SendableEvent,
    LifespanState,
    Scope,
)
from hypercorn.typing import Event as IOEvent

from gateway_queue.web.keep_alive import keep_alive

log = structlog.stdlib.get_logger(__name__)

PIPELINED_MAX = 2**16
"""Bytes that a client may send ahead, behind a request that still stalls."""


SEND_SECONDS, SLOWEST_READER = 0.8, 10_000
"""How soon a client has to read once the kernel's buffers are full, and how many bytes a second.
For who is next in line waits until an answer is written."""


LOOKS_MAX = 4
"""How often a connection is looked at for a client that may just have left."""


class UnknownHypercorn(Exception):
    """Hypercorn has another class, or none, where one of ours is to be used."""


class ClientGone(OSError):
    """A client has left before the first byte of its response was written.

    ASGI asks for an OSError; Hypercorn has none.
    """


def install() -> None:
    """Let Hypercorn use the classes below.

    Raises:
      UnknownHypercorn: without one of them, releases would be early or tickets be answered 500.
    """
    for module, name, ours in (
        (hypercorn.trio.run, "TCPServer", Connection),
        (hypercorn.trio.tcp_server, "TaskGroup", Requests),
        (hypercorn.protocol, "H11Protocol", HTTP1),
        (hypercorn.protocol, "H2Protocol", HTTP2),
        (hypercorn.protocol.h11, "HTTPStream", Stream),
        (hypercorn.protocol.h2, "HTTPStream", Stream),
        (hypercorn.protocol.h2, "StreamBuffer", Buffer),
    ):
        theirs = getattr(module, name, None)
        if not (isinstance(theirs, type) and issubclass(ours, theirs)):
            raise UnknownHypercorn(
                f"this version of Hypercorn is not supported: {module.__name__}.{name} is not a "
                f"class that {ours.__name__} extends; install hypercorn>=0.18,<0.19"
            )
        setattr(module, name, ours)


class Connection(TCPServer):
    """A connection that is watched over by the kernel, which Hypercorn has no setting for.

    And a fault in it ends this connection alone, where Hypercorn would end the server.
    """

    def __init__(
        self,
        app: AppWrapper,
        config: Config,
        context: WorkerContext,
        state: LifespanState,
        stream: trio.SSLStream[trio.SocketStream],
    ) -> None:
        super().__init__(app, config, context, state, stream)
        self.idle_task = _Idle(config.keep_alive_timeout)
        # Hypercorn's type says that there always is TLS.
        self._transport = stream.transport_stream if isinstance(stream, trio.SSLStream) else stream

    async def run(self) -> None:
        keep_alive(self._transport)
        try:
            await super().run()
        except* Exception as errors:  # noqa: BLE001
            log.warning("connection closed after an error", error=repr(errors.exceptions))

    async def _read_data(self) -> None:
        """Read until the client leaves, however long it stalls: without a timeout for each read."""
        try:
            while data := await self.stream.receive_some(MAX_RECV):
                await self.protocol.handle(RawData(bytes(data)))
            await self.protocol.handle(RawData(b""))
        except (trio.ClosedResourceError, trio.BrokenResourceError):
            pass
        await self.protocol.handle(Closed())

    async def protocol_send(self, event: Event) -> None:
        """Close on a client that does not read, where Hypercorn would wait for it.

        What comes while the connection is being closed is dropped; trio has an error for that.
        """
        with suppress(trio.BusyResourceError):
            if isinstance(event, RawData):
                if event.data:
                    await self._write(event.data)
            elif isinstance(event, _Look):
                await self._look(event.times)
            else:
                await super().protocol_send(event)

    async def _look(self, times: int) -> None:
        """Hear of a client that has left, and wait until a write need not wait."""
        idle_times = 0
        for _ in range(times * LOOKS_MAX):
            async with self.send_lock:
                pass
            state = self._state_in_kernel()
            if state & ~select.POLLIN:
                await self.protocol.handle(Closed())
                return
            # What is unread, or is being read, may reset a stream.
            idle_times = 0 if state & select.POLLIN else idle_times + 1
            if times in {1, idle_times}:
                return

    def _state_in_kernel(self) -> int:
        """Ask the kernel: trio may not have come to it yet, if thousands hang up at once."""
        if (descriptor := self._transport.socket.fileno()) < 0:
            return select.POLLNVAL
        poll = select.poll()
        poll.register(descriptor, select.POLLIN | select.POLLRDHUP)
        return sum(state for _, state in poll.poll(0))

    async def _write(self, data: bytes) -> None:
        try:
            self.send_lock.acquire_nowait()
        except trio.WouldBlock:
            with trio.CancelScope(shield=True):  # HTTP/2 counts on each byte
                await self.send_lock.acquire()
        try:
            deadline = trio.current_time() + SEND_SECONDS + len(data) / SLOWEST_READER
            # A cancellation must not tear what is being written, but an answer may have to be out
            # at a certain time.
            try:
                with trio.fail_at(min(deadline, _deadline()), shield=True):
                    await self.stream.send_all(data)
            except (trio.TooSlowError, trio.BrokenResourceError, trio.ClosedResourceError):
                await trio.aclose_forcefully(self.stream)
                await self.protocol.handle(Closed())
        finally:
            self.send_lock.release()


@dataclass(frozen=True)
class _Look(Event):
    """Lets a connection look for its client, for a response is about to be written."""

    times: int = 1
    """How often in a row there must be nothing to read, if more than once."""


class _Idle(TrioSingleTask):
    """Sets a deadline on a connection that asks for nothing, where Hypercorn starts a task.

    To start and end that task for each request took a quarter of its CPU time.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._connection: trio.CancelScope

    async def restart(self, task_group: Any, action: object) -> None:  # noqa: ARG002
        self._connection = task_group.cancel_scope
        self._connection.deadline = trio.current_time() + self._seconds

    async def stop(self) -> None:
        self._connection.deadline = math.inf


class Requests(TaskGroup):
    """The tasks of a connection: one for each request, which ends when the client leaves.

    Hypercorn hands the app a channel instead, on which the body comes and, in the end, the news
    that the client has left; so a request that stalls needs a second task to listen, and a
    nursery for both. That took a quarter of its memory, and an eighth of its CPU time.
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
        client = _Client()
        self._nursery.start_soon(client.serve, app, config, scope, send)
        return client.notice

    async def __aexit__(  # type: ignore[override]
        self,
        kind: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        """Pass on, as Hypercorn does not, whether the exception ends here."""
        return await self._nursery_manager.__aexit__(kind, exception, traceback)


class _Client:
    """Who has sent a request, and now sends a body, which is dropped, or leaves."""

    __slots__ = ("_fully_read", "_here")

    def __init__(self) -> None:
        self._here = trio.CancelScope()
        self._fully_read = trio.Event()

    async def serve(
        self,
        app: AppWrapper,
        config: Config,
        scope: Scope,
        send: Callable[[ASGISendEvent | None], Awaitable[None]],
    ) -> None:
        try:
            with self._here:
                await app(
                    *(scope, self._receive, send), trio.to_thread.run_sync, trio.from_thread.run
                )
        except* ClientGone:
            pass
        except* Exception:  # noqa: BLE001
            await config.log.exception("Error in ASGI Framework")
        await send(None)

    async def notice(self, event: ASGIReceiveEvent) -> None:
        """Take what the connection has read."""
        if event["type"] == "http.disconnect":
            self._here.cancel()
        elif event["type"] == "http.request" and not event["more_body"]:
            self._fully_read.set()
        # The request's task goes on before the next request of its connection is looked at.
        await trio.lowlevel.checkpoint()

    async def _receive(self) -> ASGIReceiveEvent:
        """Wait for the end of the body, and tell the app of an empty one; after that, for ever."""
        await self._fully_read.wait()
        self._fully_read = trio.Event()
        return {"type": "http.request", "body": b"", "more_body": False}


class Stream(HTTPStream):
    """A request that is closed without an answer if the app has none.

    Hypercorn answers 500, and many clients take any answer for a permission.
    """

    async def app_send(self, message: ASGISendEvent | None) -> None:
        if message is None and self.state is ASGIHTTPState.REQUEST and not self.closed:
            await self.send(StreamClosed(stream_id=self.stream_id))
            return
        if message is not None and self.state is ASGIHTTPState.REQUEST and self.closed:
            raise ClientGone
        await super().app_send(message)
        if (
            message is not None
            and message["type"] == "http.response.body"
            and message.get("more_body")
        ):
            await self.send(_Flush(self.stream_id))


@dataclass(frozen=True)
class _Flush(StreamEvent):
    """Waits until a part of a response is written. Hypercorn waits only for the last part."""


def _deadline() -> float:
    """Return until when the caller waits; one that is cancelled has no deadline."""
    deadline = trio.current_effective_deadline()
    return math.inf if deadline == -math.inf else deadline


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
        self._is_closed = False
        self._unsent = b""
        self._unanswered: HTTPStream | None = None

    async def handle(self, event: Event) -> None:
        """Start no request that came before its client left: nobody would notice the leaving."""
        self._is_closed |= isinstance(event, Closed)
        await super().handle(event)

    async def _handle_events(self) -> None:
        """Parse what has come, and go on to read when h11 pauses.

        h11 pauses after CONNECT, after a request that offers an upgrade, and when bytes follow a
        request that still stalls. While Hypercorn waits for the end of a pause it does not read,
        so it would not notice that the client has left.
        """
        if self._is_closed:
            return
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
        """Send the head of an answer in one packet with what follows, as Hypercorn does not.

        What follows the head when CONNECT is answered is no body (RFC 9110, 9.3.6).

        Raises:
          ClientGone: instead of the first packet.
        """
        if self.connection.our_state is not h11.SWITCHED_PROTOCOL:
            try:
                self._unsent += self.connection.send(event) or b""
            except h11.LocalProtocolError:
                if self.connection.their_state is not h11.ERROR:
                    raise
        if isinstance(event, h11.Response) and isinstance(self.stream, HTTPStream):
            self._unanswered = self.stream
            if self.stream.scope["method"] != "HEAD":
                return
        if stream := self._unanswered:
            self._unanswered = None
            await self.send(_Look())
            if stream.closed:
                raise ClientGone
        data, self._unsent = self._unsent, b""
        await self.send(RawData(data))

    async def _send_error_response(self, status_code: int) -> None:
        """Answer what is no request at all; otherwise close without an answer.

        The others are: 431 for long headers, 501 for a transfer coding that h11 does not know,
        400 for a broken body behind a request that stalls.
        """
        if status_code == HTTPStatus.BAD_REQUEST and self.stream is None:
            await super()._send_error_response(status_code)


class Buffer(StreamBuffer):
    """What is left to send of a response."""

    def __init__(self, event_class: type[IOEvent]) -> None:
        super().__init__(event_class)
        self.head: Response | None = None
        self.send_by = math.inf

    async def expect_write(self) -> None:
        """Let :meth:`drain` wait also if only the head or the end is left to write."""
        await self._is_empty.clear()


class HTTP2(H2Protocol):
    """HTTP/2 that bears the end of an upload after its answer, and knows no WebSockets."""

    stream_buffers: dict[int, Buffer]  # type: ignore[assignment]

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

    async def stream_send(self, event: StreamEvent) -> None:
        """Keep the head of a response for its first part, and wait until the last is written.

        A stream that ends without a whole response is reset: its client would wait on.

        Raises:
          ClientGone: nothing of the response was written.
        """
        buffer = self.stream_buffers.get(event.stream_id)
        if isinstance(event, StreamClosed):
            if buffer is not None and event.stream_id in self.streams:
                await self._reset(event.stream_id)
            await super().stream_send(event)
        elif buffer is None or self.closed:
            raise ClientGone
        elif isinstance(event, Response):
            buffer.head = event
        else:
            buffer.send_by = _deadline()
            if isinstance(event, EndBody | _Flush):
                await buffer.expect_write()
            if isinstance(event, _Flush):
                self.priority.unblock(event.stream_id)
                await self.has_data.set()
                await buffer.drain()
            else:
                await super().stream_send(event)
            if buffer.head is not None and isinstance(event, EndBody | _Flush):
                raise ClientGone

    async def _reset(self, stream_id: int) -> None:
        with suppress(h2.exceptions.ProtocolError):
            self.connection.reset_stream(stream_id, h2.errors.ErrorCodes.INTERNAL_ERROR)
            await self._flush()
        await self._window_updated(stream_id)  # drops what is left to send

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

    async def _send_data(self, stream_id: int) -> None:
        """Write the next part of a response, then let its sender go on.

        Hypercorn lets the sender go on first. But a window starts when the sender goes on, so the
        next release was early. The head, the body and the end of the stream are one write, because
        clients wait for the end, and because a client that leaves in between would get a part.
        """
        try:
            buffer = self.stream_buffers[stream_id]
            if buffer.head is not None:
                await self.send(_Look(times=3))
                if self.closed:
                    return
            credit = self.connection.local_flow_control_window(stream_id)
            size = max(0, min(credit, self.connection.max_outbound_frame_size))
            data = bytes(buffer.buffer[:size])
            ends = buffer._complete and len(data) == len(buffer.buffer)  # noqa: SLF001
            if head := buffer.head:
                self._send_head(head)
                buffer.head = None
            if data or ends:
                self.connection.send_data(stream_id, data, end_stream=ends)
            else:
                self.priority.block(stream_id)
            with trio.CancelScope(deadline=buffer.send_by):
                await self._flush()
            await buffer.pop(len(data))
            if ends:
                del self.stream_buffers[stream_id]
                self.priority.remove_stream(stream_id)
        except (KeyError, h2.exceptions.ProtocolError):  # the client has reset the stream or left
            if gone := self.stream_buffers.pop(stream_id, None):
                await gone.close()
            with suppress(KeyError):
                self.priority.remove_stream(stream_id)

    def _send_head(self, head: Response) -> None:
        status = (b":status", b"%d" % head.status_code)
        headers = [status, *head.headers, *self.config.response_headers("h2")]
        self.connection.send_headers(head.stream_id, headers)

    async def _create_stream(self, request: h2.events.RequestReceived) -> None:
        """Take CONNECT, which Hypercorn reserves for WebSockets, as a request like any."""
        headers = dict(request.headers)
        if headers[b":method"] == b"CONNECT":
            request.headers = list({b":path": b"/", **headers, b":method": b"GET"}.items())
        await super()._create_stream(request)
