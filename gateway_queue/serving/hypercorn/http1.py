"""HTTP/1."""

from __future__ import annotations

import re
from http import HTTPStatus

import h11
import trio
from hypercorn.events import Closed, Event, RawData
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.typing import H11SendableEvent
from trio.lowlevel import ParkingLot

from gateway_queue.serving.hypercorn.connection import HoldsTicket, ProbeClient
from gateway_queue.serving.hypercorn.stream import (
    HEADERS_MAX,
    ClientGone,
    Stream,
    TicketAdmitted,
)
from gateway_queue.serving.hypercorn.turns import turns

PIPELINED_MAX = 2**16
"""Bytes that a client may send after a request that still stalls."""


HEAD_END = re.compile(rb"\n\r?\n")

NO_REQUEST = {HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE}


class _Paused(Exception):
    """Nothing more can be parsed before the current request is answered."""


class _PauseSignal:
    """Replaces the event on which Hypercorn waits, without reading, while h11 pauses."""

    async def clear(self) -> None:
        pass

    async def set(self) -> None:
        pass

    async def wait(self) -> None:
        raise _Paused

    def is_set(self) -> bool:
        return True


class HTTP1(H11Protocol):
    """HTTP/1 that notices a disconnect at any time, ignores WebSockets and never answers a 5xx."""

    async def initiate(self) -> None:
        self.can_read = _PauseSignal()
        self._paused = False
        self._is_closed = False
        self._unsent = b""
        self._unanswered: Stream | None = None
        self._news: ParkingLot | None = None
        """Wakes :meth:`handle`. Made when the client closes its sending side, to save memory."""

    async def handle(self, event: Event) -> None:
        """Ignore requests that are read after their client has left.

        A client that has only closed its sending side still gets its answer, except to a ticket.
        """
        is_closed = type(event) is Closed
        self._is_closed |= is_closed
        await super().handle(event)
        if is_closed:
            self._tell_news()
        elif isinstance(event, RawData) and not event.data:
            self._news = ParkingLot()
            while self._will_answer():
                await self._news.park()

    def _tell_news(self) -> None:
        if self._news is not None:
            self._news.unpark_all()

    def _will_answer(self) -> bool:
        return not self._is_closed and isinstance(self.stream, Stream) and not self.stream.is_ticket

    async def _handle_events(self) -> None:
        """Parse what was read, and continue to read when h11 pauses.

        h11 pauses after CONNECT, after a request that offers an upgrade, and when bytes follow a
        request that still stalls. While Hypercorn waits for the end of a pause it does not read,
        so it would not notice that the client has left.
        """
        if self._is_closed:
            return
        if self._has_too_many_headers():
            await self._send_error_response(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
            await self.send(Closed())
            return
        try:
            await super()._handle_events()
        except _Paused:
            self._paused = True
            if len(self.connection.trailing_data[0]) > PIPELINED_MAX:
                await self.send(Closed())

    def _has_too_many_headers(self) -> bool:
        """Return whether the next head has so many lines that h11 would take long for it."""
        if self.connection.their_state is not h11.IDLE:
            return False
        head = self.connection.trailing_data[0].lstrip(b"\r\n")
        if head.count(b"\n") <= HEADERS_MAX:
            return False
        end = HEAD_END.search(head)
        return head.count(b"\n", 0, end.start() if end else len(head)) > HEADERS_MAX

    async def _maybe_recycle(self) -> None:
        """Get ready for the next request, and parse it if it was read during a pause.

        Quart cancels the task that has sent an answer, so this is shielded.
        """
        with trio.CancelScope(shield=True):
            await super()._maybe_recycle()
        self._tell_news()
        if self._paused and self.connection.our_state is h11.IDLE:
            self._paused = False
            self.task_group.spawn(self._read_on)

    async def _read_on(self) -> None:
        await turns().wait()
        await self._handle_events()

    async def _check_protocol(self, event: h11.Request) -> None:
        """Let only the first request of a connection change the protocol.

        Hypercorn would lose any later request that offers this, and log its headers. A server may
        ignore the offer.
        """
        if self.keep_alive_requests == 0:
            await super()._check_protocol(event)

    async def _create_stream(self, request: h11.Request) -> None:
        """Ignore an offer of WebSockets, as a server may: the request is handled like any other.

        A request with two lengths is the last one of its connection (RFC 9112, 6.1).
        """
        headers = dict(request.headers)
        if b"transfer-encoding" in headers and b"content-length" in headers:
            self.keep_alive_requests = self.config.keep_alive_max_requests
        if b"upgrade" in headers:
            request = h11.Request(
                method=request.method,
                target=request.target,
                headers=[field for field in request.headers if field[0] != b"upgrade"],
                http_version=request.http_version,
            )
        await super()._create_stream(request)

    async def stream_send(self, event: StreamEvent) -> None:
        """Tell the connection when a request becomes a ticket; pass on all other events."""
        if isinstance(event, TicketAdmitted):
            self._tell_news()
            await self.send(HoldsTicket())
        else:
            await super().stream_send(event)

    async def _send_h11_event(self, event: H11SendableEvent) -> None:
        """Send the head of an answer in one packet with its body. Hypercorn sends two packets.

        After the head of an answer to CONNECT, nothing is sent: it has no body (RFC 9110, 9.3.6).

        Raises:
          ClientGone: the client has left before the first packet.
        """
        if self.connection.our_state is not h11.SWITCHED_PROTOCOL:
            try:
                self._unsent += self.connection.send(event) or b""
            except h11.LocalProtocolError:
                if self.connection.their_state is not h11.ERROR:
                    raise
        if isinstance(event, h11.Response) and isinstance(self.stream, Stream):
            self._unanswered = self.stream
            if self.stream.scope["method"] != "HEAD":
                return
        if stream := self._unanswered:
            self._unanswered = None
            if stream.is_ticket:
                await self.send(ProbeClient())
            if stream.closed:
                raise ClientGone
        data, self._unsent = self._unsent, b""
        await self.send(RawData(data))

    async def _send_error_response(self, status_code: int) -> None:
        """Answer data that is not a request; close without an answer after other errors.

        The other errors are: 501 for a transfer coding that h11 does not know, 400 for a broken
        body of a request that stalls.
        """
        if status_code in NO_REQUEST and self.stream is None:
            await super()._send_error_response(status_code)
