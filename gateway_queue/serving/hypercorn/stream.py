"""One request and its response, in either protocol."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import trio
from hypercorn.protocol.events import EndBody, Event, Request, StreamClosed
from hypercorn.protocol.http_stream import ASGIHTTPState, HTTPStream
from hypercorn.typing import ASGISendEvent

from gateway_queue.extension import TICKET

HEADERS_MAX = 100
"""Headers of a request; with more of them it is refused."""


class ClientGone(OSError):
    """A client has left before the first byte of its response was written.

    ASGI requires an OSError for this; Hypercorn raises none.
    """


class Stream(HTTPStream):
    """A request that is closed without an answer if the app gives none.

    Hypercorn would answer 500, and many clients treat any answer as permission to identify.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.is_ticket = False
        """Whether this request stalls, rather than being answered at once."""
        self.is_whole = False
        """Whether the whole request was read."""

    async def handle(self, event: Event) -> None:
        """Give the app, before it starts, the function that makes this request a ticket."""
        self.is_whole |= isinstance(event, EndBody)
        await super().handle(event)
        if isinstance(event, Request):
            self.scope["extensions"][TICKET] = self.become_ticket  # type: ignore[assignment]

    async def become_ticket(self) -> None:
        """Note that this request stalls.

        From now on, a client that closes its sending side has left.
        """
        self.is_ticket = True
        await self.send(TicketAdmitted(self.stream_id))

    async def app_send(self, message: ASGISendEvent | None) -> None:
        if message is None:
            self.scope["extensions"].pop(TICKET, None)  # a reference cycle
        if message is None and self.state is ASGIHTTPState.REQUEST and not self.closed:
            await self.send(StreamClosed(stream_id=self.stream_id))
            return
        if message is not None and self.state is ASGIHTTPState.REQUEST and self.closed:
            raise ClientGone
        await super().app_send(message)
        if (
            message is not None
            and message["type"] == "http.response.body"
            and message.get("more_body")
        ):
            await self.send(Flush(self.stream_id))


@dataclass(frozen=True)
class TicketAdmitted(Event):
    """A request stalls from now on."""


@dataclass(frozen=True)
class Flush(Event):
    """Waits until a part of a response is written. Hypercorn waits only for the last part."""


def deadline() -> float:
    """Return the deadline of the caller; infinite if it is cancelled already."""
    deadline = trio.current_effective_deadline()
    return math.inf if deadline == -math.inf else deadline
