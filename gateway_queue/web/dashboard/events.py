"""Server-sent events: one snapshot per second for all open pages."""

from __future__ import annotations

import zlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable
from contextlib import aclosing
from functools import partial
from typing import Generic, TypeVar

import structlog
import trio

INTERVAL = 1.0
"""Seconds between two events."""

BYTES_AT_ONCE = 16_384

LISTENERS_AT_ONCE = 10
"""Listeners that get an event in one step of the event loop: about a millisecond."""

GZIP_HEADER = bytes.fromhex("1f8b0800000000000003")
"""The header of a gzip stream; its deflated blocks follow (RFC 1952)."""

log = structlog.stdlib.get_logger(__name__)

Subject = TypeVar("Subject", bound=Hashable)


class Feeds(Generic[Subject]):
    """Writes the events of each subject that has listeners.

    Args:
      write: makes the text of an event; None ends the events of a subject that is gone.
      nursery: runs the task of each subject.
    """

    def __init__(
        self, write: Callable[[Subject], Awaitable[str | None]], nursery: trio.Nursery
    ) -> None:
        self._write = write
        self._nursery = nursery
        self._feeds: dict[Subject, _Feed] = {}

    async def listen(self, subject: Subject, *, gzip: bool = False) -> AsyncGenerator[bytes, None]:
        """Yield each event from now on.

        Args:
          subject: whose events to yield.
          gzip: whether to compress, as the content coding of HTTP.
        """
        if subject not in self._feeds:
            self._feeds[subject] = _Feed(partial(self._write, subject))
            self._nursery.start_soon(self._run, subject)
        async with aclosing(self._feeds[subject].listen(gzip=gzip)) as events:
            async for event in events:
                yield event

    async def _run(self, subject: Subject) -> None:
        await self._feeds[subject].run()
        del self._feeds[subject]


class _Feed:
    """Writes one event per second while there are listeners.

    A slow listener misses the events that come meanwhile. So no other listener waits for it, and no
    events are kept for it.
    """

    def __init__(self, write: Callable[[], Awaitable[str | None]]) -> None:
        self._write = write
        self._latest = b""
        self._has_ended = False
        self._latest_gzip = b""
        self._listeners = 0
        self._changed = trio.lowlevel.ParkingLot()

    async def run(self) -> None:
        """Write events until there is no listener."""
        while self._listeners and not self._has_ended:
            try:
                text = await self._write()
            except Exception:
                log.exception("cannot show the queue")  # the queue itself goes on
            else:
                self._has_ended = text is None
                self._latest = _event(text or "")
                self._latest_gzip = await _deflated(self._latest)
                await self._wake_listeners()
            await trio.sleep(INTERVAL)

    async def _wake_listeners(self) -> None:
        """Let all listeners yield the latest event, in steps, so that no release waits."""
        for _ in range(0, len(self._changed), LISTENERS_AT_ONCE):
            self._changed.unpark(count=LISTENERS_AT_ONCE)
            await trio.lowlevel.checkpoint()

    async def listen(self, *, gzip: bool = False) -> AsyncGenerator[bytes, None]:
        """Yield each event from now on.

        Args:
          gzip: whether to compress, as the content coding of HTTP.
        """
        self._listeners += 1
        try:
            if gzip:
                yield GZIP_HEADER
            while not self._has_ended:
                await self._changed.park()
                if not self._has_ended:
                    yield self._latest_gzip if gzip else self._latest
        finally:
            self._listeners -= 1


def _event(text: str) -> bytes:
    lines = "".join(f"data: {line}\n" for line in text.splitlines())
    return f"{lines}\n".encode()


async def _deflated(event: bytes) -> bytes:
    """Compress an event by itself, so that it fits into the stream of every listener.

    In steps, as a whole event takes a millisecond.
    """
    deflate = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    parts: list[bytes] = []
    for start in range(0, len(event), BYTES_AT_ONCE):
        parts.append(deflate.compress(event[start : start + BYTES_AT_ONCE]))
        await trio.lowlevel.checkpoint()
    return b"".join([*parts, deflate.flush(zlib.Z_FULL_FLUSH)])
