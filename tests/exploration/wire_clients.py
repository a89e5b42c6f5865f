"""Clients of HTTP/1.1 and HTTP/2, and what was on the wire of each answer, at which time."""

from __future__ import annotations

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

HEADERS = (
    ("content-type", "application/json"),
    ("content-length", str(len(GO))),
    ("cache-control", "no-store"),
    ("date", DATE),
)
"""Of every answer to a ticket."""

HTTP_1_ANSWER = (
    b"HTTP/1.1 200 \r\n" + "".join(f"{n}: {v}\r\n" for n, v in HEADERS).encode() + b"\r\n" + GO
)

HTTP_2_HEADERS = [(n.encode(), v.encode()) for n, v in ((":status", "200"), *HEADERS)]

Moment = Literal["asks", "begins", "answered", "left", "closed"]


@dataclass(eq=False)
class WireTicket:
    """One request for a slot. Times are true times, in seconds."""

    name: str
    shard: int | None
    protocol: str
    watch: Callable[[WireTicket, Moment], None]
    """Gets each of its moments, when that is."""
    arrived_at: float = math.inf
    """When all of the request was at the server, and no request before it in the way."""
    sent_at: float = math.inf
    """When the client has sent all of the request."""
    first_at: float = math.inf
    """When the server sent the first bytes of the answer."""
    body_at: float = math.inf
    """When it sent the last byte of the body."""
    last_at: float = math.inf
    """When it sent the end of the answer."""
    left_at: float = math.inf
    """When the server could know that its client had gone away."""
    closed_at: float = math.inf
    """When the server closed the connection, or the stream, without an answer."""
    is_lost: bool = False
    """Whether the server began to answer in the very instant in which its client had left."""
    is_suspect: bool = False
    """Whether the server has a reason to close the connection: the client is slow."""
    begun: trio.Event = field(default_factory=trio.Event)
    """Set when the server has begun to answer, or the client knows that it will not."""
    ended: trio.Event = field(default_factory=trio.Event)
    """Set when the client knows: it has read the answer, or the connection is closed."""

    def end(self) -> None:
        """Note that the client knows how it ended."""
        self.begun.set()
        self.ended.set()

    @property
    def is_answered(self) -> bool:
        return self.last_at < math.inf

    @property
    def is_over(self) -> bool:
        return min(self.last_at, self.left_at, self.closed_at) < math.inf


class _WireClient:
    """One connection.

    Args:
      replica: where to connect.
      name: for the history.
      watch: gets each moment of each ticket.
      wrong: gets a line for whatever is not as the contract has it.
      up, down, capacity: of the connection.
      pace: how many bytes to read at once, and how many seconds to wait after that.
    """

    protocol: ClassVar[str]

    def __init__(
        self,
        replica: WireReplica,
        name: str,
        watch: Callable[[WireTicket, Moment], None],
        wrong: Callable[[str], None],
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
        self._wrong = wrong
        self._held_back = b""
        self._read = 0
        """Bytes that the client has read."""
        self._on_wire = 0
        """Bytes that the server has sent."""
        self._known_at: deque[tuple[int, WireTicket]] = deque()
        """The ends of answers, as positions among all bytes of the server."""

    async def run(self) -> None:
        """Read until the server closes the connection, or this client."""
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

    # To ask.

    def _open(self, shard: int | None, *, name: str) -> WireTicket:
        ticket = WireTicket(name, shard, self.protocol, self._watch, is_suspect=self.pace[1] > 0)
        self.tickets.append(ticket)
        return ticket

    def _send(self, data: bytes, hold_back: int = 0) -> None:
        """Send, in order, unless the connection is broken: the reader sees that."""
        cut = 0 if self.holds_back else len(data) - hold_back
        self._held_back += data[cut:]
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            self.end.put(data[:cut])
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

    # To go away.

    def close(self) -> None:
        """Close the connection."""
        self._go(self.end.close)

    def reset(self) -> None:
        """Break the connection."""
        self._go(self.end.reset)

    def half_close(self) -> None:
        """Close the sending side alone, and go on reading."""
        self._go(self.end.half_close)

    def _go(self, how: Callable[[], None]) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            how()
            for ticket in self.tickets:
                self._left(ticket)

    def _left(self, ticket: WireTicket) -> None:
        if not ticket.is_over:
            ticket.left_at = trio.current_time() + self.end.latency
            ticket.watch(ticket, "left")

    # What the server does.

    def _take(self, data: bytes) -> None:
        """Take what was read."""

    def _sent(self, data: bytes) -> None:
        """Look at what the server has sent."""
        raise NotImplementedError

    def _begins(self, ticket: WireTicket) -> None:
        if ticket.first_at == math.inf:
            ticket.first_at = trio.current_time()
            ticket.is_lost = ticket.left_at <= ticket.first_at
            ticket.begun.set()
            ticket.watch(ticket, "begins")

    def _answered(self, ticket: WireTicket) -> None:
        ticket.last_at = trio.current_time()
        self._known_at.append((self._on_wire, ticket))
        ticket.watch(ticket, "answered")

    def _closed(self) -> None:
        for ticket in self.tickets:
            self._close_ticket(ticket)

    def _close_ticket(self, ticket: WireTicket) -> None:
        if not ticket.is_over:
            ticket.closed_at = trio.current_time()
            ticket.watch(ticket, "closed")


class Http1Client(_WireClient):
    """One connection of HTTP/1.1, with one request after the other."""

    protocol: ClassVar = "HTTP/1"

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._raw = b""
        self._body = b""

    def ask(self, shard: int | None, *, hold_back: int = 0, body: bytes = b"") -> WireTicket:
        """Ask for a slot; a request behind another one is pipelined.

        Args:
          shard: whose slot; None names no shard.
          hold_back: bytes at the end of the head that :meth:`send_rest` sends.
          body: what :meth:`send_body` sends.
        """
        self.send_body()
        ticket = self._open(shard, name=f"{self.name}.{len(self.tickets)}")
        query = b"" if shard is None else b"?shard=%d" % shard
        head = b"POST /%s HTTP/1.1\r\nHost: queue\r\nContent-Length: %d\r\n\r\n"
        request = (
            head % (query, len(body))
            if body
            else b"GET /%s HTTP/1.1\r\nHost: queue\r\n\r\n" % query
        )
        self._body = body
        self._send(request, hold_back)
        return ticket

    def send_body(self) -> None:
        """Send the body of an upload."""
        data, self._body = self._body, b""
        if data:
            self._send(data)

    def _mark_arrivals(self) -> None:
        """Note the arrival of the first request that is not over."""
        if self.holds_back or self.end.is_closed:
            return
        waiting = [ticket for ticket in self.tickets if not ticket.is_over]
        for ticket in waiting:
            ticket.sent_at = min(ticket.sent_at, trio.current_time())
        if waiting and waiting[0].arrived_at == math.inf:
            self._arrives(waiting[0])

    def _sent(self, data: bytes) -> None:
        self._on_wire += len(data)
        self._raw += data
        while self._raw:
            pending = [t for t in self.tickets if t.last_at == math.inf]
            if not pending:
                self._wrong(f"{self.name}: bytes without a request: {self._raw[:80]!r}")
                return
            size = len(HTTP_1_ANSWER)
            if not HTTP_1_ANSWER.startswith(self._raw[:size]):
                self._wrong(f"{pending[0].name}: not the answer: {self._raw[:300]!r}")
                return
            self._begins(pending[0])
            if len(self._raw) < size:
                return
            self._raw = self._raw[size:]
            pending[0].body_at = trio.current_time()
            self._answered(pending[0])
            self._mark_arrivals()


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
        self._decoder = Decoder()
        self._connection = h2.connection.H2Connection(h2.config.H2Configuration())
        self._connection.local_settings = h2.settings.Settings(
            client=True, initial_values={h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window}
        )
        self._window = window
        self._connection.initiate_connection()
        self._flush()

    def ask(self, shard: int | None, *, hold_back: int = 0, upload: bool = False) -> WireTicket:
        """Ask for a slot on a stream of its own.

        Args:
          shard: whose slot; None names no shard.
          hold_back: bytes at the end of the request that :meth:`send_rest` sends.
          upload: leave the stream open until :meth:`send_body`.
        """
        number = self._connection.get_next_available_stream_id()
        ticket = self._open(shard, name=f"{self.name}/{number}")
        ticket.is_suspect |= self._window < len(GO)
        self._streams[number], self._numbers[ticket] = ticket, number
        path = "/" if shard is None else f"/?shard={shard}"
        headers = [
            (":method", "GET"),
            (":scheme", "http"),
            (":authority", "queue"),
            (":path", path),
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
        """Let the server send, where the flow-control window was closed."""
        with suppress(h2.exceptions.ProtocolError):
            self._connection.increment_flow_control_window(len(GO), self._numbers[ticket])
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
            self._wrong(f"{self.name}: HTTP/2 is broken: {error!r}")
        self._flush()

    def _sent(self, data: bytes) -> None:
        self._on_wire += len(data)
        self._frames.add_data(data)
        for frame in self._frames:
            self._look_at(frame)

    def _look_at(self, frame: Frame) -> None:
        match frame:
            case HeadersFrame():
                ticket = self._streams[frame.stream_id]
                headers = list(self._decoder.decode(frame.data, raw=True))
                if headers != HTTP_2_HEADERS:
                    self._wrong(f"{ticket.name}: not the answer: {headers}")
                self._begins(ticket)
            case DataFrame():
                ticket = self._streams[frame.stream_id]
                body = self._bodies.get(frame.stream_id, b"") + frame.data
                self._bodies[frame.stream_id] = body
                if not GO.startswith(body):
                    self._wrong(f"{ticket.name}: not the body: {body!r}")
                elif frame.data and body == GO:
                    ticket.body_at = trio.current_time()
            case RstStreamFrame():
                self._reset_by_server(self._streams[frame.stream_id])
            case GoAwayFrame() if frame.error_code:
                self._wrong(f"{self.name}: GOAWAY {frame.error_code} {frame.additional_data!r}")
        if "END_STREAM" in frame.flags:
            ticket = self._streams[frame.stream_id]
            if self._bodies.get(frame.stream_id) != GO:
                self._wrong(f"{ticket.name}: the body ends too soon")
            self._answered(ticket)

    def _reset_by_server(self, ticket: WireTicket) -> None:
        self._close_ticket(ticket)
        self._known_at.append((self._on_wire, ticket))
