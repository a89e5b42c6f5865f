"""HTTP/2."""

from __future__ import annotations

import math
from contextlib import suppress

import h2.errors
import h2.events
import h2.exceptions
import trio
from hypercorn.events import Closed, Event, Updated
from hypercorn.protocol.events import EndBody, Response, StreamClosed
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.h2 import H2Protocol, StreamBuffer
from hypercorn.typing import Event as IOEvent

from gateway_queue.serving.hypercorn.connection import ProbeClient
from gateway_queue.serving.hypercorn.stream import ClientGone, Flush, deadline


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
    """HTTP/2 that accepts the rest of an upload after its answer, and has no WebSockets."""

    stream_buffers: dict[int, Buffer]  # type: ignore[assignment]

    async def initiate(
        self, headers: list[tuple[bytes, bytes]] | None = None, settings: bytes | None = None
    ) -> None:
        """Begin to count the time in which a client asks for nothing."""
        await super().initiate(headers, settings)
        if headers is None:
            await self.send(Updated(idle=True))

    async def handle(self, event: Event) -> None:
        """End the answers of a closed connection: their senders would wait for ever."""
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
        """Write the next part of a response, then wake its sender.

        Hypercorn wakes the sender first. A window starts when the sender continues, so the next
        release was early. The head, the body and the end of the stream are one write, because
        clients wait for the end, and because a client that leaves in between would get a part.
        """
        try:
            buffer = self.stream_buffers[stream_id]
            if buffer.head is not None:
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
