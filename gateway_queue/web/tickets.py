"""Ticket requests: whatever is asked, wherever, stalls until its turn.

Most clients take any answer at all for a permission. So a ticket request gets exactly one of the
answers below, and where none is right it stays without: held until its client leaves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from http import HTTPStatus

import structlog
import trio
from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable, ASGISendEvent, HTTPScope

from gateway_queue.web.auth import Guard
from gateway_queue.web.problems import CONTENT_TYPE, Refused, problem
from gateway_queue.web.shards import shard_of

log = structlog.stdlib.get_logger(__name__)

GO = b"""{"message": "You're free to connect now! :)"}"""

ANSWER_SECONDS = 0.8
"""A client whose connection does not take the answer within this time keeps others waiting."""


class TicketRequest:
    """One request, from its arrival to its answer; its client's leaving cancels it.

    Args:
      turn: makes the context in which a shard is answered, see
        :meth:`gateway_queue.queue.Queue.turn`.
      guard: refuses whoever has no right to ask.
    """

    __slots__ = ("_guard", "_is_http_1", "_receive", "_scope", "_send", "_turn")

    def __init__(
        self,
        scope: HTTPScope,
        receive: ASGIReceiveCallable,
        send: ASGISendCallable,
        turn: Callable[[int | None], AbstractAsyncContextManager[float]],
        guard: Guard,
    ) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._turn = turn
        self._guard = guard
        self._is_http_1 = scope["http_version"] != "2"

    async def run(self) -> None:
        """Stall, answer, and end."""
        try:
            await self._answer_in_turn()
        except trio.TooSlowError:
            log.warning("a client does not take its answer")
        except Exception:
            log.exception("ticket failed, its request is held")
        else:
            return
        while (await self._receive())["type"] == "http.request":
            pass

    async def _answer_in_turn(self) -> None:
        try:
            self._guard.check(self._scope["headers"])
            shard = shard_of(self._scope["query_string"])
        except Refused as refused:
            log.warning("refused", status=refused.status.value, detail=str(refused))
            document = problem(refused.status, str(refused))
            await self._answer(refused.status, CONTENT_TYPE, document, refused.headers)
        else:
            async with self._turn(shard) as answer_by:
                await self._answer(HTTPStatus.OK, "application/json", GO, by=answer_by)
        if self._is_http_1:
            # In the middle of an upload HTTP/1 has to reset the connection to end the exchange,
            # which can take the answer from a client that reads it only when all is sent.
            await self._receive()
            await self._hand_over({"type": "http.response.body", "body": b"", "more_body": False})

    async def _answer(
        self,
        status: HTTPStatus,
        content_type: str,
        body: bytes,
        headers: tuple[tuple[bytes, bytes], ...] = (),
        *,
        by: float = math.inf,
    ) -> None:
        """Hand the answer to the socket in time, if the client is there for its first byte."""
        await trio.lowlevel.checkpoint_if_cancelled()
        await self._hand_over(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [
                    (b"content-type", content_type.encode()),
                    (b"content-length", b"%d" % len(body)),
                    (b"cache-control", b"no-store"),
                    *headers,
                ],
            },
            by,
        )
        if self._is_http_1:  # the server keeps the head back, and looks for the client
            await trio.lowlevel.checkpoint_if_cancelled()
        await self._hand_over(
            {"type": "http.response.body", "body": body, "more_body": self._is_http_1}, by
        )

    async def _hand_over(self, message: ASGISendEvent, by: float = math.inf) -> None:
        """Send all of it: even at the end of a good answer Hypercorn says that its client left."""
        with trio.fail_at(min(by, trio.current_time() + ANSWER_SECONDS), shield=True):
            await self._send(message)
