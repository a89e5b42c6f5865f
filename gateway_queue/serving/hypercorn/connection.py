"""A client's connection: its reads, its writes, its keep-alive and its idle time."""

from __future__ import annotations

import math
import os
import select
from collections.abc import Awaitable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import structlog
import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import TrioSingleTask, WorkerContext
from hypercorn.typing import AppWrapper, LifespanState

from gateway_queue.serving.hypercorn.descriptors import descriptors
from gateway_queue.serving.hypercorn.stream import deadline
from gateway_queue.serving.hypercorn.turns import turns
from gateway_queue.serving.keep_alive import keep_alive

log = structlog.stdlib.get_logger(__name__)

SEND_SECONDS, SLOWEST_READER = 0.8, 10_000
"""When the kernel's buffers are full, a client has ``SEND_SECONDS``, plus one second for each
``SLOWEST_READER`` bytes, to read: the next ticket waits until an answer is written."""

READ_BYTES = 2**15
"""The most bytes to read in one step."""

SHORT_WAIT_SECONDS = 0.01
"""A shorter wait for a turn does not extend the idle time of a connection."""

GONE = select.POLLHUP | select.POLLERR | select.POLLNVAL
"""The poll events of a connection whose client neither sends nor reads any more."""

PROBES_MAX = 4
"""The most probes before an answer, for each of ``ProbeClient.times``."""


@dataclass(frozen=True)
class ProbeClient(Event):
    """Finds out whether the client is still connected, just before a response is written."""

    times: int = 1
    """How many probes in a row must find nothing to read. With 1, one probe is always enough."""


class WaitForTurn(Event):
    """A part of the data that was read is not handled yet."""


class HoldsTicket(Event):
    """A request of this connection stalls from now on."""


class Connection(TCPServer):
    """A connection with TCP keep-alive, for which Hypercorn has no setting.

    An error in it ends only this connection. Hypercorn would end the server.
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
        self.idle_task: _Idle = _Idle(config.keep_alive_timeout)
        self._reader: trio.lowlevel.Task | None = None
        """Set while data that can be read waits for its turn."""
        # Hypercorn's type says that there always is TLS.
        self._transport = stream.transport_stream if isinstance(stream, trio.SSLStream) else stream

    async def run(self) -> None:
        keep_alive(self._transport)
        descriptors().add(self)
        try:
            await super().run()
        except* trio.ClosedResourceError:
            pass  # closed during the handshake of TLS
        except* Exception as errors:  # noqa: BLE001
            # Only the types: the message of an exception may contain a header with a token.
            kinds = ", ".join(sorted({type(error).__name__ for error in _leaves(errors)}))
            log.warning("connection closed after an error", error=kinds)
        finally:
            descriptors().remove(self)
            self._break_cycles()

    def _break_cycles(self) -> None:
        """Break the reference cycles of a closed connection, so that its memory is freed at once.

        The garbage collector frees cycles seldom. Until then, a client that connects again and
        again would fill the memory with what it has sent.
        """
        parts: list[object] = [self]
        if wrapper := vars(self).get("protocol"):
            parts += [wrapper, wrapper.protocol, wrapper.protocol.connection]
        for part in parts:
            vars(part).clear()

    def close(self) -> None:
        """End it at once, without an answer."""
        self._transport.socket.close()
        self.idle_task.end_connection()

    async def _close(self) -> None:
        """Close at once when the server stops: Hypercorn's two waits take a third of the time."""
        if trio.current_effective_deadline() == -math.inf:
            self._transport.socket.close()
        elif self._transport.socket.fileno() >= 0:
            await super()._close()

    async def _read_data(self) -> None:
        """Read until the client leaves, however long it stalls: without a timeout for each read."""
        try:
            while data := await self._receive():
                await self.protocol.handle(RawData(bytes(data)))
                del data  # none of it is kept while the client is silent
            await self.protocol.handle(RawData(b""))
        except (trio.ClosedResourceError, trio.BrokenResourceError):
            pass
        await self.protocol.handle(Closed())

    def _receive(self) -> Awaitable[bytes | bytearray]:
        if isinstance(self.stream, trio.SocketStream):
            return self._read(self.stream.socket)
        return self._receive_tls(self.stream)

    async def _read(self, socket: trio.socket.SocketType) -> bytes:
        """Receive like trio's stream, which would take 1 kB more for each client that stalls.

        Raises:
          trio.ClosedResourceError, trio.BrokenResourceError: as that does.
        """
        while True:
            # Most clients have sent their request before they are accepted.
            state = self._state_in_kernel()
            if state != select.POLLIN and socket.fileno() >= 0:
                await trio.lowlevel.wait_readable(socket)
                state = self._state_in_kernel()
            if state == select.POLLIN:  # a disconnect does not wait
                await self._wait_for_turn()
            if socket.fileno() < 0:
                raise trio.ClosedResourceError
            try:
                return os.read(socket.fileno(), READ_BYTES)
            except BlockingIOError:
                continue
            except OSError as error:
                raise trio.BrokenResourceError from error

    async def _receive_tls(self, stream: trio.SSLStream[trio.SocketStream]) -> bytes | bytearray:
        data = await stream.receive_some(READ_BYTES)
        if not self._state_in_kernel() & ~select.POLLIN:
            await self._wait_for_turn()
        return data

    async def _wait_for_turn(self) -> None:
        """Wait for a turn to handle data; a probe of the client ends the wait."""
        came_at = trio.current_time()
        self._reader = trio.lowlevel.current_task()
        await turns().wait()
        self._reader = None
        if (waited := trio.current_time() - came_at) > SHORT_WAIT_SECONDS:
            self.idle_task.extend(waited)

    async def protocol_send(self, event: Event) -> None:
        """Handle an event; close the connection if its client does not read the data.

        Hypercorn would wait for such a client. Events that come while the connection is being
        closed are dropped: trio raises an error for them.
        """
        with suppress(trio.BusyResourceError):
            # isinstance() is slow here: Hypercorn's events are abstract classes.
            if type(event) is HoldsTicket:
                if not descriptors().hold(self):
                    self.close()
            elif type(event) is Updated:
                if event.idle:
                    descriptors().let_go(self)
                    self.idle_task.begin()
                else:
                    descriptors().note_request(self)
                    self.idle_task.end()
            elif type(event) is RawData:
                if event.data:
                    await self._write(event.data)
            elif type(event) is ProbeClient:
                await self._probe_client(event.times)
            elif type(event) is WaitForTurn:
                if self._state_in_kernel() & GONE:
                    await self.protocol.handle(Closed())
                else:
                    await self._wait_for_turn()
            else:
                await super().protocol_send(event)

    async def _probe_client(self, times: int) -> None:
        """Wait for pending writes, then check whether the client has disconnected."""
        idle_times = 0
        for _ in range(times * PROBES_MAX):
            async with self.send_lock:
                pass
            state = self._state_in_kernel()
            if self._reader is not None:
                turns().skip(self._reader)
                state |= select.POLLIN
            if state & ~select.POLLIN:
                await self.protocol.handle(Closed())
                return
            # Data that is unread, or is being read, may reset a stream.
            idle_times = 0 if state & select.POLLIN else idle_times + 1
            if times in {1, idle_times}:
                return

    def _state_in_kernel(self) -> int:
        """Ask the kernel: if thousands disconnect at once, trio may not have noticed all yet."""
        if (descriptor := self._transport.socket.fileno()) < 0:
            return select.POLLNVAL
        poll = select.poll()
        poll.register(descriptor, select.POLLIN | select.POLLRDHUP)
        return next((state for _, state in poll.poll(0)), 0)

    async def _write(self, data: bytes) -> None:
        try:
            self.send_lock.acquire_nowait()
        except trio.WouldBlock:
            with trio.CancelScope(shield=True):  # HTTP/2 needs every byte
                await self.send_lock.acquire()
        try:
            read_by = trio.current_time() + SEND_SECONDS + len(data) / SLOWEST_READER
            # A cancellation must not cut off data that is being written. A deadline may, because an
            # answer must not be written later.
            try:
                with trio.fail_at(min(read_by, deadline()), shield=True):
                    await self.stream.send_all(data)
            except (trio.TooSlowError, trio.BrokenResourceError, trio.ClosedResourceError):
                await trio.aclose_forcefully(self.stream)
                await self.protocol.handle(Closed())
        finally:
            self.send_lock.release()


def _leaves(errors: BaseExceptionGroup[Exception]) -> Iterator[Exception]:
    for error in errors.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


class _Idle(TrioSingleTask):
    """Sets a deadline for a connection without a request. Hypercorn starts a task for this.

    To start and end that task took a quarter of the CPU time of each request.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._connection = trio.CancelScope()  # replaced when the connection has its tasks

    async def restart(self, task_group: Any, action: object) -> None:  # noqa: ARG002
        """Start the idle time. Hypercorn calls this once the connection has its tasks."""
        self._connection = task_group.cancel_scope
        self.begin()

    def begin(self) -> None:
        """Start the idle time."""
        self._connection.deadline = trio.current_time() + self._seconds

    def end(self) -> None:
        """End the idle time: the connection stays while it has a request."""
        self._connection.deadline = math.inf

    def end_connection(self) -> None:
        """End all tasks of the connection."""
        self._connection.cancel()

    def extend(self, seconds: float) -> None:
        """Do not count the time in which the client waits for the server."""
        self._connection.deadline += seconds
