"""Ticket requests: whatever is asked, wherever, stalls until its turn.

Most clients take any answer at all for a permission. So a ticket request gets exactly one of the
answers below, and where none is right it stays without: held until its client leaves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from http import HTTPStatus
from typing import Protocol

import structlog
import trio
from hypercorn.typing import (
    ASGIReceiveCallable,
    ASGISendCallable,
    ASGISendEvent,
    HTTPResponseBodyEvent,
    HTTPScope,
)

from gateway_queue.queue.ticket import NotAnswered, Turn
from gateway_queue.web.problems import CONTENT_TYPE, RequestError, problem
from gateway_queue.web.query import asked_for

log = structlog.stdlib.get_logger(__name__)

GO = b"""{"message": "You're free to connect now! :)"}"""

JSON = ((b"content-type", b"application/json"),)

END: HTTPResponseBodyEvent = {"type": "http.response.body", "body": b"", "more_body": False}

ANSWER_SECONDS = 0.8
"""A client whose connection does not take the answer within this time keeps others waiting."""


class Turns(Protocol):
    """Makes the context in which a shard is answered, see :meth:`Queue.turn`."""

    def __call__(
        self, shard: int | None, /, *, confirm: bool
    ) -> AbstractAsyncContextManager[Turn]: ...


class TicketRequest:
    """One request, from its arrival to its answer; its client's leaving cancels it.

    Args:
      admit: lets the request in, or raises :class:`RequestError`.
    """

    __slots__ = ("_admit", "_is_http_1", "_receive", "_scope", "_send")

    def __init__(
        self,
        scope: HTTPScope,
        receive: ASGIReceiveCallable,
        send: ASGISendCallable,
        admit: Callable[[HTTPScope], Turns],
    ) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._admit = admit
        self._is_http_1 = scope["http_version"] != "2"

    async def run(self) -> None:
        """Stall, answer, and end."""
        try:
            await self._answer_in_turn()
        except NotAnswered:
            return
        except trio.TooSlowError:
            log.warning("client too slow to read its answer; connection closed")
            return  # without an answer, or in the middle of one: the connection is closed
        except Exception:
            log.exception("ticket failed, its request is held")
        else:
            return
        while (await self._receive())["type"] == "http.request":
            pass

    async def _answer_in_turn(self) -> None:
        try:
            turns = self._admit(self._scope)
            shard, confirm = asked_for(self._scope["query_string"])
        except RequestError as refused:
            status, client = refused.status.value, self._client()
            log.warning("refused", status=status, detail=str(refused), client=client)
            document = problem(refused.status, str(refused))
            headers = ((b"content-type", CONTENT_TYPE.encode()), *refused.headers)
            await self._answer(refused.status, headers, document)
        else:
            came_at, is_answered = trio.current_time(), False
            try:
                async with turns(shard, confirm=confirm) as turn:
                    by = turn.answer_by
                    await self._answer(HTTPStatus.OK, JSON, GO, by=by, stays_open=confirm)
                    is_answered = True
                    if confirm:
                        turn.answered()
                        await trio.sleep(turn.confirm_seconds)  # the client's leaving cancels it
            except (trio.Cancelled, NotAnswered):
                if not is_answered:
                    self._log_departure(shard, came_at)
                raise
            if confirm and not self._is_http_1:
                await self._end()
        if self._is_http_1:
            # In the middle of an upload HTTP/1 has to reset the connection to end the exchange,
            # which can take the answer from a client that reads it only when all is sent.
            await self._receive()
            await self._end()

    def _log_departure(self, shard: int | None, came_at: float) -> None:
        waited = round(trio.current_time() - came_at, 3)
        log.debug("client left", shard=shard, waited=waited, client=self._client())

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
        """Hand the answer to the socket in time.

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
        """Send all of it: even at the end of a good answer Hypercorn says that its client left."""
        try:
            with trio.fail_at(by, shield=True):
                await self._send(message)
        except OSError as error:
            raise NotAnswered from error
