"""One request and its response, in either protocol."""

from __future__ import annotations

import math
from dataclasses import dataclass

import trio
from hypercorn.protocol.events import Event, StreamClosed
from hypercorn.protocol.http_stream import ASGIHTTPState, HTTPStream
from hypercorn.typing import ASGISendEvent


class ClientGone(OSError):
    """A client has left before the first byte of its response was written.

    ASGI asks for an OSError; Hypercorn has none.
    """


class Stream(HTTPStream):
    """A request that is closed without an answer if the app has none.

    Hypercorn answers 500, and many clients take any answer for a permission.
    """

    async def app_send(self, message: ASGISendEvent | None) -> None:
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
class Flush(Event):
    """Waits until a part of a response is written. Hypercorn waits only for the last part."""


def deadline() -> float:
    """Return until when the caller waits; one that is cancelled has no deadline."""
    deadline = trio.current_effective_deadline()
    return math.inf if deadline == -math.inf else deadline
