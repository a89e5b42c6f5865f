"""Clients of HTTP/1.1 and HTTP/2, which note when each part of an answer was on the wire."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
import trio
from h2.frame_buffer import FrameBuffer
from hpack import Decoder
from hyperframe.frame import DataFrame, Frame, GoAwayFrame, HeadersFrame, RstStreamFrame

from tests.exploration.wire import DATE, WireReplica
from tests.harness import GO

Moment = Literal["asks", "begins", "answered", "left", "closed"]

Method = Literal["GET", "HEAD"]

Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True)
class Refusal:
    """A query that is refused."""

    query: str
    detail: str

    @property
    def document(self) -> bytes:
        problem = {"title": "Bad Request", "status": 400, "detail": self.detail}
        return json.dumps(problem).encode()


REFUSALS = (
    Refusal("shard=", "shard must be a whole number from 0 to 2147483647, not ''"),
    Refusal("shard=-1", "shard must be a whole number from 0 to 2147483647, not '-1'"),
    Refusal("shard=1&shard=2", "shard is given twice, with different values"),
    Refusal("shard=1&confirm=yes", "confirm must be true or false, not 'yes'"),
    Refusal("bot=nobody", "bot must be the name of one bot of this server"),
    Refusal(
        "confirm=true",
        "confirm=true needs shard=N: the queue has to know which shard confirms",
    ),
)


@dataclass(eq=False)
class WireTicket:
    """One request for a slot. Times are in seconds of the run's clock."""

    name: str
    shard: int | None
    protocol: str
    watch: Callable[[WireTicket, Moment], None]
    """Is called at each :data:`Moment` of the ticket."""
    confirm: bool = False
    """Whether the client closes the response when it has identified."""
    method: Method = "GET"
    bot: str | None = None
    """The bot that its request names, if any."""
    refusal: Refusal | None = None
    """Why the request is refused, if it is; then it is no ticket."""
    arrived_at: float = math.inf
    """When the server had all of the request, and had answered the requests before it."""
    sent_at: float = math.inf
    """When the client has sent all of the request."""
    uploaded_at: float = -math.inf
    """When the server had the end of its body, if it has one."""
    first_at: float = math.inf
    """When the server sent the first bytes of the answer."""
    body_at: float = math.inf
    """When it sent the last byte of the body."""
    last_at: float = math.inf
    """When it sent the end of the answer; for a confirmed ticket, when its time was over."""
    left_at: float = math.inf
    """When the server could know that its client had left, or had identified."""
    closed_at: float = math.inf
    """When the server closed the connection, or the stream, without an answer."""
    is_lost: bool = False
    """Whether the client had already left when the server began to answer."""
    is_suspect: bool = False
    """Whether the server may close the connection because the client is slow."""
    begun: trio.Event = field(default_factory=trio.Event)
    """Set when the server has begun to answer, or when there will be no answer."""
    ended: trio.Event = field(default_factory=trio.Event)
    """Set when the client has read the answer, or when the connection is closed."""

    def end(self) -> None:
        """Note that the client has read the answer or will get none."""
        self.begun.set()
        self.ended.set()

    @property
    def is_answered(self) -> bool:
        """Whether the server has sent the permission."""
        return (self.body_at if self.confirm else self.last_at) < math.inf

    @property
    def query(self) -> str:
        """What follows the path of the request."""
        if self.refusal is not None:
            return f"?{self.refusal.query}"
        parameters = [] if self.bot is None else [f"bot={self.bot}"]
        if self.shard is not None:
            parameters.append(f"shard={self.shard}")
        if self.confirm:
            parameters.append("confirm=true")
        return "?" + "&".join(parameters) if parameters else ""

    @property
    def content(self) -> bytes:
        """The content of the answer, which HEAD does not get."""
        return GO if self.refusal is None else self.refusal.document

    @property
    def body(self) -> bytes:
        return b"" if self.method == "HEAD" else self.content

    @property
    def headers(self) -> Headers:
        """The headers that the answer must have."""
        kind = b"json" if self.refusal is None else b"problem+json"
        length = () if self.confirm else ((b"content-length", b"%d" % len(self.content)),)
        return [
            (b"content-type", b"application/" + kind),
            *length,
            (b"cache-control", b"no-store"),
            (b"date", DATE.encode()),
        ]

    @property
    def status(self) -> bytes:
        return b"200" if self.refusal is None else b"400"

    @property
    def is_over(self) -> bool:
        return min(self.last_at, self.left_at, self.closed_at) < math.inf


class _WireClient:
    """One connection.

    Args:
      replica: where to connect.
      name: for the history.
      watch: is called at each moment of each ticket.
      report: is called with a line for each fault of the server.
      up, down, capacity: see :func:`~tests.exploration.wire_stream.connection`.
      pace: how many bytes to read at once, and how many seconds to wait after that.
    """

    protocol: ClassVar[str]

    def __init__(
        self,
        replica: WireReplica,
        name: str,
        watch: Callable[[WireTicket, Moment], None],
        report: Callable[[str], None],
        *,
        up: float = 0.0,
        down: float = 0.0,
        capacity: int = 65_536,
        pace: tuple[int, float] = (65_536, 0.0),
    ) -> None:
        self.name = name
        self.tickets: list[WireTicket] = []
        self.pace = pace
        self.end, server = replica.connect(up=up, down=down, capacity=capacity)
        server.tap = self._sent
        server.on_close = self._closed
        self._watch = watch
        self._report = report
        self._held_back = b""
        self._read = 0
        """Bytes that the client has read."""
        self._on_wire = 0
        """Bytes that the server has sent."""
        self._known_at: deque[tuple[int, WireTicket]] = deque()
        """The ends of answers, as positions in all bytes that the server has sent."""

    async def run(self) -> None:
        """Read until the server or this client closes the connection."""
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while data := await self.end.receive_some(self.pace[0]):
                self._read += len(data)
                self._take(data)
                while self._known_at and self._known_at[0][0] <= self._read:
                    self._known_at.popleft()[1].end()
                if self.pace[1]:
                    await trio.sleep(self.pace[1])
        for ticket in self.tickets:
            ticket.end()

    # Requests

    def _open(self, name: str, shard: int | None, options: dict[str, Any]) -> WireTicket:
        ticket = WireTicket(
            name, shard, self.protocol, self._watch, is_suspect=self.pace[1] > 0, **options
        )
        self.tickets.append(ticket)
        return ticket

    def _send(self, data: bytes, hold_back: int = 0) -> None:
        """Send in order. If the connection is broken, do nothing: :meth:`run` notices it."""
        cut = 0 if self.holds_back else len(data) - hold_back
        self._held_back += data[cut:]
        try:
            self.end.put(data[:cut])
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return  # nothing arrives
        self._mark_arrivals()

    @property
    def holds_back(self) -> bool:
        """Whether something waits for :meth:`send_rest`."""
        return bool(self._held_back)

    def send_rest(self) -> None:
        """Send what was held back."""
        data, self._held_back = self._held_back, b""
        self._send(data)

    def _mark_arrivals(self) -> None:
        raise NotImplementedError

    def _arrives(self, ticket: WireTicket) -> None:
        ticket.arrived_at = max(trio.current_time(), ticket.sent_at + self.end.latency)
        ticket.watch(ticket, "asks")

    # Disconnects

    def close(self) -> None:
        """Close the connection."""
        self._disconnect(self.end.close)

    def reset(self) -> None:
        """Break the connection."""
        self._disconnect(self.end.reset)

    def half_close(self) -> None:
        """Close only the sending side, and go on reading."""
        self._disconnect(self.end.half_close)

    def _disconnect(self, how: Callable[[], None]) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            how()
            for ticket in self.tickets:
                self._left(ticket)

    def _left(self, ticket: WireTicket) -> None:
        if not ticket.is_over:
            ticket.left_at = trio.current_time() + self.end.latency
            ticket.watch(ticket, "left")

    # Bytes of the server

    def _take(self, data: bytes) -> None:
        """Handle the bytes that were read."""

    def _sent(self, data: bytes) -> None:
        """Check the bytes that the server has sent."""
        raise NotImplementedError

    def _begins(self, ticket: WireTicket, at: float) -> None:
        if ticket.first_at == math.inf:
            ticket.first_at = at
            ticket.is_lost = ticket.left_at <= ticket.first_at
            ticket.begun.set()
            ticket.watch(ticket, "begins")

    def _has_body(self, ticket: WireTicket) -> None:
        ticket.body_at = trio.current_time()
        if ticket.confirm:
            self._known_at.append((self._on_wire, ticket))

    def _answered(self, ticket: WireTicket) -> None:
        ticket.last_at = trio.current_time()
        self._known_at.append((self._on_wire, ticket))
        ticket.watch(ticket, "answered")

    def _closed(self) -> None:
        for ticket in self.tickets:
            if self._ends_with_connection(ticket) and not ticket.is_over:
                self._answered(ticket)
            self._close_ticket(ticket)

    def _ends_with_connection(self, ticket: WireTicket) -> bool:  # noqa: ARG002
        return False

    def _close_ticket(self, ticket: WireTicket) -> None:
        if not ticket.is_over:
            ticket.closed_at = trio.current_time()
            ticket.watch(ticket, "closed")


class Http1Client(_WireClient):
    """One connection of HTTP/1.1, with one request after the other, or one of HTTP/1.0."""

    protocol: ClassVar = "HTTP/1"

    def __init__(self, *arguments: Any, version: str = "1.1", **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._version = version
        self._raw = b""
        self._body = b""

    def ask(
        self, shard: int | None, *, hold_back: int = 0, body: bytes = b"", **options: Any
    ) -> WireTicket:
        """Ask for a slot; a request behind another one is pipelined.

        Args:
          shard: the shard that asks; None names no shard.
          hold_back: bytes at the end of the head that :meth:`send_rest` sends.
          body: what :meth:`send_body` sends.
          options: of the :class:`WireTicket`.
        """
        self.send_body()
        ticket = self._open(f"{self.name}.{len(self.tickets)}", shard, options)
        method = "POST" if body else ticket.method
        length = f"Content-Length: {len(body)}\r\n" if body else ""
        request = f"{method} /{ticket.query} HTTP/{self._version}\r\nHost: queue\r\n{length}\r\n"
        if body:
            ticket.uploaded_at = math.inf
            self._body = body
        self._send(request.encode(), hold_back)
        return ticket

    def send_body(self) -> None:
        """Send the body of an upload."""
        data, self._body = self._body, b""
        if data:
            self.tickets[-1].uploaded_at = trio.current_time() + self.end.latency
            self._send(data)

    def _mark_arrivals(self) -> None:
        """Note the arrival of the first request that is not over, as far as the server knows."""
        now = trio.current_time()
        waiting = [t for t in self.tickets if min(t.last_at, t.left_at, t.closed_at) > now]
        if not self.holds_back and not self.end.is_closed:
            for ticket in waiting:
                ticket.sent_at = min(ticket.sent_at, now)
        if waiting and waiting[0].sent_at < waiting[0].arrived_at == math.inf:
            self._arrives(waiting[0])

    def _sent(self, data: bytes) -> None:
        self._on_wire += len(data)
        self._raw += data
        while self._raw:
            pending = [t for t in self.tickets if t.last_at == math.inf]
            if not pending:
                self._report(f"{self.name}: bytes without a request: {self._raw[:80]!r}")
                return
            ticket = pending[0]
            answer, end = self._answer(ticket)
            expected = end if ticket.body_at < math.inf else answer
            size = len(expected)
            if not size or not expected.startswith(self._raw[:size]):
                self._report(f"{ticket.name}: not the answer: {self._raw[:300]!r}")
                return
            self._begins(ticket, trio.current_time())
            if len(self._raw) < size:
                return
            self._raw = self._raw[size:]
            if expected is answer:
                self._has_body(ticket)
            if expected is end or not ticket.confirm:
                self._answered(ticket)
                self._mark_arrivals()

    def _answer(self, ticket: WireTicket) -> tuple[bytes, bytes]:
        """Return the answer to a ticket, and the bytes that end it if no confirmation comes."""
        reason = b"HTTP/1.1 %s \r\n" % ticket.status
        headers, body, end = ticket.headers, ticket.body, b""
        if self._version == "1.0":
            headers.append((b"Connection", b"close"))
        elif ticket.confirm:
            headers.append((b"Transfer-Encoding", b"chunked"))
            if body:
                body, end = b"%x\r\n%s\r\n" % (len(body), body), b"0\r\n\r\n"
        head = reason + b"".join(b"%s: %s\r\n" % header for header in headers) + b"\r\n"
        return head + body, end

    def _ends_with_connection(self, ticket: WireTicket) -> bool:
        is_unframed = self._version == "1.0" or ticket.method == "HEAD"
        return ticket.confirm and is_unframed and ticket.body_at < math.inf


class Http2Client(_WireClient):
    """One connection of HTTP/2, with prior knowledge, and any number of streams."""

    protocol: ClassVar = "HTTP/2"

    def __init__(self, *arguments: Any, window: int = 65_535, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._streams: dict[int, WireTicket] = {}
        self._numbers: dict[WireTicket, int] = {}
        self._bodies: dict[int, bytes] = {}
        self._unarrived: list[WireTicket] = []
        self._frames = FrameBuffer(server=False)
        self._frames.max_frame_size = 2**24
        self._frame_began_at = math.inf
        self._decoder = Decoder()
        self._connection = h2.connection.H2Connection(h2.config.H2Configuration())
        self._connection.local_settings = h2.settings.Settings(
            client=True, initial_values={h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window}
        )
        self._window = window
        self._connection.initiate_connection()
        self._flush()

    def ask(
        self, shard: int | None, *, hold_back: int = 0, upload: bool = False, **options: Any
    ) -> WireTicket:
        """Ask for a slot on a stream of its own.

        Args:
          shard: the shard that asks; None names no shard.
          hold_back: bytes at the end of the request that :meth:`send_rest` sends.
          upload: leave the stream open until :meth:`send_body`.
          options: of the :class:`WireTicket`.
        """
        number = self._connection.get_next_available_stream_id()
        ticket = self._open(f"{self.name}/{number}", shard, options)
        ticket.is_suspect |= self._window < len(ticket.body)
        self._streams[number], self._numbers[ticket] = ticket, number
        headers = [
            (":method", ticket.method),
            (":scheme", "http"),
            (":authority", "queue"),
            (":path", f"/{ticket.query}"),
        ]
        try:
            self._connection.send_headers(number, headers, end_stream=not upload)
        except h2.exceptions.ProtocolError:
            self._close_ticket(ticket)  # the server is ending the connection
            ticket.end()
            return ticket
        self._unarrived.append(ticket)
        self._flush(hold_back)
        return ticket

    def send_body(self, ticket: WireTicket) -> None:
        """End an upload."""
        with suppress(h2.exceptions.ProtocolError):
            self._connection.end_stream(self._numbers[ticket])
            self._flush()

    def reset_stream(self, ticket: WireTicket) -> None:
        """Give up one ticket, and keep the connection."""
        with suppress(h2.exceptions.ProtocolError):
            self._connection.reset_stream(self._numbers[ticket])
            self.send_rest()
            self._flush()
            self._left(ticket)
            ticket.end()

    def open_window(self, ticket: WireTicket) -> None:
        """Open the closed flow-control window of a ticket, so that the server can send."""
        with suppress(h2.exceptions.ProtocolError):
            size = max(1, len(ticket.body))
            self._connection.increment_flow_control_window(size, self._numbers[ticket])
            self._flush()

    def _flush(self, hold_back: int = 0) -> None:
        self._send(self._connection.data_to_send(), hold_back)

    def _mark_arrivals(self) -> None:
        if self.holds_back or self.end.is_closed:
            return
        waiting, self._unarrived = self._unarrived, []
        for ticket in waiting:
            if not ticket.is_over:
                ticket.sent_at = trio.current_time()
                self._arrives(ticket)

    def _take(self, data: bytes) -> None:
        try:
            self._connection.receive_data(data)
        except h2.exceptions.ProtocolError as error:
            self._report(f"{self.name}: HTTP/2 is broken: {error!r}")
        self._flush()

    def _sent(self, data: bytes) -> None:
        now = trio.current_time()
        self._frame_began_at = min(self._frame_began_at, now)
        unparsed = len(self._frames._data) + len(data)  # noqa: SLF001
        self._on_wire += len(data)
        self._frames.add_data(data)
        for frame in self._frames:
            self._look_at(frame)
            self._frame_began_at = now
            unparsed -= 9 + frame.body_len
        if not unparsed:
            self._frame_began_at = math.inf

    def _look_at(self, frame: Frame) -> None:
        match frame:
            case HeadersFrame():
                ticket = self._streams[frame.stream_id]
                headers = list(self._decoder.decode(frame.data, raw=True))
                if headers != [(b":status", ticket.status), *ticket.headers]:
                    self._report(f"{ticket.name}: not the answer: {headers}")
                self._begins(ticket, self._frame_began_at)
                if not ticket.body:
                    self._has_body(ticket)
            case DataFrame():
                self._take_body(self._streams[frame.stream_id], frame)
            case RstStreamFrame():
                self._reset_by_server(self._streams[frame.stream_id])
            case GoAwayFrame() if frame.error_code:
                self._report(f"{self.name}: GOAWAY {frame.error_code} {frame.additional_data!r}")
        if "END_STREAM" in frame.flags:
            ticket = self._streams[frame.stream_id]
            if self._bodies.get(frame.stream_id, b"") != ticket.body:
                self._report(f"{ticket.name}: the body ends too soon")
            self._answered(ticket)

    def _take_body(self, ticket: WireTicket, frame: DataFrame) -> None:
        body = self._bodies.get(frame.stream_id, b"") + frame.data
        self._bodies[frame.stream_id] = body
        if not ticket.body.startswith(body):
            self._report(f"{ticket.name}: not the body: {body!r}")
        elif frame.data and body == ticket.body:
            self._has_body(ticket)

    def _reset_by_server(self, ticket: WireTicket) -> None:
        self._close_ticket(ticket)
        self._known_at.append((self._on_wire, ticket))
