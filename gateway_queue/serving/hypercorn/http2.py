"""HTTP/2."""

from __future__ import annotations

import math
from contextlib import suppress
from http import HTTPStatus

import h2.errors
import h2.events
import h2.exceptions
import trio
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.events import EndBody, Response, StreamClosed
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.h2 import H2Protocol, StreamBuffer
from hypercorn.typing import Event as IOEvent
from priority.priority import DeadlockError

from gateway_queue.serving.hypercorn.connection import HoldsTicket, ProbeClient, WaitForTurn
from gateway_queue.serving.hypercorn.frames import Excess, Frames
from gateway_queue.serving.hypercorn.stream import (
    HEADERS_MAX,
    ClientGone,
    Flush,
    Stream,
    TicketAdmitted,
    deadline,
)

IGNORED = (
    h2.events.PriorityUpdated,
    h2.events.SettingsAcknowledged,
    h2.events.PingReceived,
    h2.events.UnknownFrameReceived,
)
"""Events that need no reaction."""


UNREAD_MAX = 100
"""The most responses of one connection that may wait until its client reads, not counting tickets.
Thousands of them would end in the same moment."""


class Buffer(StreamBuffer):
    """The part of a response that is still to be sent."""

    def __init__(self, event_class: type[IOEvent]) -> None:
        super().__init__(event_class)
        self.head: Response | None = None
        self.send_by = math.inf

    @property
    def has_more(self) -> bool:
        """Whether a part of the response is left to write."""
        return self.head is not None or bool(self.buffer) or self._complete

    async def expect_write(self) -> None:
        """Let :meth:`drain` wait also if only the head or the end is left to write."""
        await self._is_empty.clear()


class Ready:
    """The streams that have something to write, in turn.

    It replaces Hypercorn's tree of priorities, which takes 3 ms to remove one of 900 streams.
    Responses are short, so their order does not matter.
    """

    def __init__(self) -> None:
        self._ready: dict[int, None] = {}

    def __next__(self) -> int:
        """Return the next stream.

        Raises:
          DeadlockError: there is none.
        """
        if not self._ready:
            raise DeadlockError
        stream_id = next(iter(self._ready))
        self.block(stream_id)
        self.unblock(stream_id)
        return stream_id

    def unblock(self, stream_id: int) -> None:
        """Let a stream write."""
        self._ready[stream_id] = None

    def block(self, stream_id: int) -> None:
        """Let a stream write nothing until it is unblocked."""
        self._ready.pop(stream_id, None)

    insert_stream, remove_stream = unblock, block


class HTTP2(H2Protocol):
    """HTTP/2 that accepts the rest of an upload after its answer, and has no WebSockets."""

    stream_buffers: dict[int, Buffer]  # type: ignore[assignment]
    priority: Ready  # type: ignore[assignment]

    async def initiate(
        self, headers: list[tuple[bytes, bytes]] | None = None, settings: bytes | None = None
    ) -> None:
        """Start the connection, and the idle time in which its client has no request."""
        self._frames = Frames()
        self._unread: set[int] = set()
        self.priority = Ready()
        await super().initiate(headers, settings)
        if headers is None:
            await self.send(Updated(idle=True))

    async def handle(self, event: Event) -> None:
        """Parse what was read in steps, and end the responses of a closed connection.

        Otherwise, the tasks that send these responses would never end.
        """
        if isinstance(event, RawData):
            await self._handle_steps(event.data)
            return
        await super().handle(event)
        if isinstance(event, Closed):
            for buffer in list(self.stream_buffers.values()):
                await buffer.close()
                # Each of up to 900 tasks ends in a step of its own, so that no release waits.
                await trio.lowlevel.cancel_shielded_checkpoint()

    async def _handle_steps(self, data: bytes) -> None:
        self._frames.add(data)
        try:
            step = self._frames.next_step()
            while step is not None and not self.closed:
                await super().handle(RawData(step))
                if (step := self._frames.next_step()) is not None:
                    await self.send(WaitForTurn())
        except Excess:
            await self._end_abuse()
        if self._frames.client_leaves and not self.streams:
            await self.send(Closed())

    async def _end_abuse(self) -> None:
        self.connection.close_connection(h2.errors.ErrorCodes.ENHANCE_YOUR_CALM)
        await self._flush()
        await self.send(Closed())

    async def stream_send(self, event: StreamEvent) -> None:
        """Keep the head of a response for its first part, and wait until the last is written.

        A stream that ends without a whole response is reset: otherwise, its client would keep
        waiting.

        Raises:
          ClientGone: nothing of the response was written.
        """
        buffer = self.stream_buffers.get(event.stream_id)
        if isinstance(event, StreamClosed):
            self._unread.discard(event.stream_id)
            await self._end(event.stream_id, is_answered=buffer is None)
            await super().stream_send(event)
        elif isinstance(event, TicketAdmitted):
            await self.send(HoldsTicket())
        elif buffer is None or self.closed:
            raise ClientGone
        elif isinstance(event, Response):
            buffer.head = event
            await self._count_unread(event.stream_id)
        else:
            buffer.send_by = deadline()
            if isinstance(event, EndBody | Flush):
                await buffer.expect_write()
            if isinstance(event, Flush):
                self.priority.unblock(event.stream_id)
                await self.has_data.set()
                await buffer.drain()
            else:
                await super().stream_send(event)
            if buffer.head is not None and isinstance(event, EndBody | Flush):
                raise ClientGone

    async def _end(self, stream_id: int, *, is_answered: bool) -> None:
        """Reset a stream that has no answer, or whose upload is not needed any more."""
        stream = self.streams.get(stream_id)
        if stream is not None and not is_answered:
            await self._reset(stream_id, h2.errors.ErrorCodes.INTERNAL_ERROR)
        elif isinstance(stream, Stream) and not stream.is_ticket and not stream.is_whole:
            await self._reset(stream_id, h2.errors.ErrorCodes.NO_ERROR)

    async def _reset(self, stream_id: int, code: h2.errors.ErrorCodes) -> None:
        with suppress(h2.exceptions.ProtocolError):
            self.connection.reset_stream(stream_id, code)
            await self._flush()
        await self._window_updated(stream_id)  # drops what is left to send

    async def _handle_events(self, events: list[h2.events.Event]) -> None:
        """Handle all events of a step, then continue the responses that larger windows allow."""
        are_windows_larger = False
        for event in events:
            if isinstance(event, h2.events.DataReceived) and event.stream_id not in self.streams:
                self._drop(event)
            elif isinstance(event, h2.events.WindowUpdated | h2.events.RemoteSettingsChanged):
                are_windows_larger = True
            elif not isinstance(event, IGNORED):
                await super()._handle_events([event])
                if isinstance(event, h2.events.RequestReceived) and not self.streams:
                    await self.send(Updated(idle=True))
        if are_windows_larger:
            await self._continue_responses()
        await self._flush()

    async def _continue_responses(self) -> None:
        """Continue unfinished responses; Hypercorn looks at each stalled stream instead."""
        for stream_id, buffer in self.stream_buffers.items():
            if buffer.has_more:
                self.priority.unblock(stream_id)
        await self.has_data.set()

    def _refuse(self, stream_id: int) -> None:
        """Answer that a request has too many headers, and read no more of it."""
        status = b"%d" % HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        self.connection.send_headers(stream_id, [(b":status", status)], end_stream=True)
        with suppress(h2.exceptions.ProtocolError):  # the request has ended
            self.connection.reset_stream(stream_id, h2.errors.ErrorCodes.NO_ERROR)

    def _drop(self, data: h2.events.DataReceived) -> None:
        """Give back the flow control credit for data that comes after the answer."""
        self.connection.acknowledge_received_data(data.flow_controlled_length, data.stream_id)

    async def _send_data(self, stream_id: int) -> None:
        """Write the next part of a response, then wake its sender.

        Hypercorn wakes the sender first. A window starts when the sender continues, so the next
        release would be early. The head, the body and the end of the stream are one write, because
        clients wait for the end, and because a client that leaves in between would get only a part.
        """
        try:
            buffer = self.stream_buffers[stream_id]
            if buffer.head is not None and self._is_ticket(stream_id):
                await self.send(ProbeClient(times=3))
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
            self.priority.remove_stream(stream_id)

    async def _count_unread(self, stream_id: int) -> None:
        if not self._is_ticket(stream_id):
            self._unread.add(stream_id)
            if len(self._unread) > UNREAD_MAX:
                await self._end_abuse()

    def _is_ticket(self, stream_id: int) -> bool:
        stream = self.streams.get(stream_id)
        return isinstance(stream, Stream) and stream.is_ticket

    def _send_head(self, head: Response) -> None:
        status = (b":status", b"%d" % head.status_code)
        headers = [status, *head.headers, *self.config.response_headers("h2")]
        self.connection.send_headers(head.stream_id, headers)

    async def _create_stream(self, request: h2.events.RequestReceived) -> None:
        """Handle CONNECT, which Hypercorn reserves for WebSockets, like any other request.

        A request that is not valid ends only its stream. Hypercorn would end the connection.
        """
        headers = dict(request.headers)
        if headers[b":method"] == b"CONNECT":
            request.headers = list({b":path": b"/", **headers, b":method": b"GET"}.items())
        if len(request.headers) > HEADERS_MAX:
            self._refuse(request.stream_id)
        elif not (headers[b":method"] + headers.get(b":path", b"")).isascii():
            self.connection.reset_stream(request.stream_id, h2.errors.ErrorCodes.PROTOCOL_ERROR)
        else:
            await super()._create_stream(request)
            # At 1000 Hypercorn would end the connection, with all tickets on it.
            self.keep_alive_requests = 0
            # Start its task now: trio starts tasks that were created in one step in any order.
            await trio.lowlevel.checkpoint()
