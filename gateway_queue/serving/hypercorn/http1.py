"""HTTP/1."""

from __future__ import annotations

from http import HTTPStatus

import h11
import trio
from hypercorn.events import Closed, Event, RawData
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.protocol.http_stream import HTTPStream
from hypercorn.typing import H11SendableEvent

from gateway_queue.serving.hypercorn.connection import ProbeClient
from gateway_queue.serving.hypercorn.stream import ClientGone

PIPELINED_MAX = 2**16
"""Bytes that a client may send ahead, behind a request that still stalls."""


class _Paused(Exception):
    """Nothing more can be parsed before the current request is answered."""


class _PauseSignal:
    """Stands in for the event on which Hypercorn waits, without reading, while h11 pauses."""

    async def clear(self) -> None:
        pass

    async def set(self) -> None:
        pass

    async def wait(self) -> None:
        raise _Paused

    def is_set(self) -> bool:
        return True


class HTTP1(H11Protocol):
    """HTTP/1 that notices a disconnect at any time, knows no WebSockets and never answers a 5xx."""

    async def initiate(self) -> None:
        self.can_read = _PauseSignal()
        self._paused = False
        self._is_closed = False
        self._unsent = b""
        self._unanswered: HTTPStream | None = None

    async def handle(self, event: Event) -> None:
        """Ignore requests that are read after their client has left."""
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

        Quart cancels the task that has sent an answer, so this is shielded.
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
            await self.send(ProbeClient())
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
