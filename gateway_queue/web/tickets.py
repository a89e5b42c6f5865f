"""Ticket requests: a request with any method and path stalls until its turn.

Most clients treat any answer as permission to identify. So a ticket request gets one of the answers
below. If none of them is right, it gets no answer, and stays open until its client leaves.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, suppress
from http import HTTPStatus
from typing import Any, Protocol, cast

import structlog
import trio
from hypercorn.typing import (
    ASGIReceiveCallable,
    ASGISendCallable,
    ASGISendEvent,
    HTTPResponseBodyEvent,
    HTTPScope,
)

from gateway_queue.extension import TICKET
from gateway_queue.queue.ticket import NotAnswered, Turn
from gateway_queue.web.problems import CONTENT_TYPE, RequestError, page, problem
from gateway_queue.web.query import asked_for

log = structlog.stdlib.get_logger(__name__)

GO = b"""{"message": "You're free to connect now! :)"}"""

JSON = ((b"content-type", b"application/json"),)

END: HTTPResponseBodyEvent = {"type": "http.response.body", "body": b"", "more_body": False}

ANSWER_SECONDS = 0.8
"""The longest time, in seconds, to write an answer: the next ticket waits for it."""


REFUSED_SECONDS = 1.5
"""Seconds to wait for the rest of a refused request, so that its client can read the answer."""


class NoRoom(Exception):
    """``MAX_WAITING`` tickets wait already."""


class Room:
    """Counts the tickets of all bots: those that wait, and those whose shards are identifying.

    Args:
      most: how many may wait at a time.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._was_full = False
        self.waiting = 0

    def check(self) -> None:
        """Check that one more ticket may wait.

        Raises:
          NoRoom: too many tickets wait already.
        """
        is_full = self.waiting >= self._most
        if is_full and not self._was_full:
            log.warning("MAX_WAITING is reached: connections of further tickets are closed")
        self._was_full = is_full
        if is_full:
            raise NoRoom


class Turns(Protocol):
    """Makes the context in which a shard is answered, see :meth:`Queue.turn`."""

    def __call__(
        self, shard: int | None, /, *, confirm: bool
    ) -> AbstractAsyncContextManager[Turn]: ...


class TicketRequest:
    """One request, from its arrival to its answer. A disconnect cancels it.

    Args:
      admit: accepts the request, or raises :class:`RequestError`.
      room: counts the request while it waits.
    """

    __slots__ = ("_admit", "_is_http_1", "_receive", "_room", "_scope", "_send")

    def __init__(
        self,
        scope: HTTPScope,
        receive: ASGIReceiveCallable,
        send: ASGISendCallable,
        admit: Callable[[HTTPScope], Turns],
        room: Room,
    ) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._admit = admit
        self._room = room
        self._is_http_1 = scope["http_version"] != "2"

    def run(self) -> Coroutine[Any, Any, None]:
        """Refuse the request, or let it stall until it is answered."""
        try:
            turns = self._admit(self._scope)
            self._room.check()
            shard, confirm = asked_for(self._scope["query_string"])
        except RequestError as refused:
            return self._refuse(refused)
        except NoRoom:
            return _end_without_answer()
        self._scope["headers"] = ()  # not needed any more, and long for some clients
        return self._stall(turns, shard, confirm=confirm)

    async def _refuse(self, refused: RequestError) -> None:
        status, client = refused.status.value, self._client()
        log.warning("refused", status=status, detail=str(refused), client=client)
        content_type, document = self._explain(refused)
        headers = ((b"content-type", content_type.encode()), *refused.headers)
        with suppress(NotAnswered, trio.TooSlowError):
            await self._answer(refused.status, headers, document)
            with trio.move_on_after(REFUSED_SECONDS):
                await self._end_http_1()

    async def _stall(self, turns: Turns, shard: int | None, *, confirm: bool) -> None:
        """Wait for the turn, answer, and end the exchange."""
        came_at, is_answered = trio.current_time(), False
        self._room.waiting += 1
        try:
            await self._note_stall()
            async with turns(shard, confirm=confirm) as turn:
                by = turn.answer_by
                await self._answer(HTTPStatus.OK, JSON, GO, by=by, stays_open=confirm)
                is_answered = True
                if confirm:
                    turn.answered()
                    await trio.sleep(turn.confirm_seconds)  # a disconnect cancels it
            if confirm and not self._is_http_1:
                await self._end()
            await self._end_http_1()
        except NotAnswered:
            if not is_answered:
                self._log_departure(shard, came_at)
        except trio.Cancelled:
            if not is_answered:
                self._log_departure(shard, came_at)
            raise
        except trio.TooSlowError:
            # Without an answer, or in the middle of one: the connection is closed.
            log.warning("client too slow to read its answer; connection closed")
        except Exception:
            log.exception("ticket failed, its request is held")
            while (await self._receive())["type"] == "http.request":
                pass
        finally:
            self._room.waiting -= 1

    async def _note_stall(self) -> None:
        """Tell the server that this is a ticket. Other servers than ours have no such extension."""
        if note := self._scope.get("extensions", {}).get(TICKET):
            await cast("Callable[[], Awaitable[None]]", note)()

    async def _end_http_1(self) -> None:
        """End the exchange when the whole request has arrived.

        To end it in the middle of an upload, HTTP/1 has to reset the connection. Then a client that
        reads the answer only after its upload may lose the answer.
        """
        if self._is_http_1:
            await self._receive()
            await self._end()

    def _explain(self, refused: RequestError) -> tuple[str, bytes]:
        """Write an error as JSON, or as HTML for a browser."""
        accepted = (value for name, value in self._scope["headers"] if name == b"accept")
        if any(b"text/html" in value for value in accepted):
            return "text/html; charset=utf-8", page(refused.status, str(refused))
        return CONTENT_TYPE, problem(refused.status, str(refused))

    def _log_departure(self, shard: int | None, came_at: float) -> None:
        waited = round(trio.current_time() - came_at, 3)
        log.debug(
            "client disconnected before its turn", shard=shard, waited=waited, client=self._client()
        )

    def _client(self) -> str | None:
        """Return the address of the client; a Unix socket has none."""
        client = self._scope["client"]
        return None if client is None else f"{client[0]}:{client[1]}"

    async def _answer(
        self,
        status: HTTPStatus,
        headers: tuple[tuple[bytes, bytes], ...],
        body: bytes,
        *,
        by: float = math.inf,
        stays_open: bool = False,
    ) -> None:
        """Write the answer to the socket in time.

        Raises:
          NotAnswered: the client has left before the first byte.
          trio.TooSlowError: the client may have got a part of it.
        """
        length = () if stays_open else ((b"content-length", b"%d" % len(body)),)
        more_body = stays_open or self._is_http_1
        await trio.lowlevel.checkpoint_if_cancelled()
        by = min(by, trio.current_time() + ANSWER_SECONDS)
        await self._hand_over(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [
                    *headers,
                    *length,
                    (b"cache-control", b"no-store"),
                ],
            },
            by,
        )
        await self._hand_over(
            {"type": "http.response.body", "body": body, "more_body": more_body}, by
        )

    async def _end(self) -> None:
        await self._hand_over(END, trio.current_time() + ANSWER_SECONDS)

    async def _hand_over(self, message: ASGISendEvent, by: float) -> None:
        """Send a message, shielded: Hypercorn reports a disconnect even at the end of an answer."""
        try:
            with trio.fail_at(by, shield=True):
                await self._send(message)
        except OSError as error:
            raise NotAnswered from error


async def _end_without_answer() -> None:
    """Let the server close the connection."""
