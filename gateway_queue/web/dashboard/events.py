"""Server-sent events: one snapshot a second, for all who listen."""

from __future__ import annotations

import zlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import NoReturn

import structlog
import trio

INTERVAL = 1.0
"""Seconds between two events."""

BYTES_AT_ONCE = 16_384

GZIP_HEADER = bytes.fromhex("1f8b0800000000000003")
"""Begins a stream whose deflated blocks follow (RFC 1952)."""

log = structlog.stdlib.get_logger(__name__)


class Events:
    """Writes an event a second while anybody listens.

    Who is slow to take one misses those that come meanwhile. So nobody waits for a slow listener,
    and nothing is kept for one.

    Args:
      write: makes the text of an event.
    """

    def __init__(self, write: Callable[[], Awaitable[str]]) -> None:
        self._write = write
        self._latest = b""
        self._latest_gzip = b""
        self._listeners = 0
        self._arrivals = trio.lowlevel.ParkingLot()
        self._changed = trio.lowlevel.ParkingLot()

    async def run(self) -> NoReturn:
        """Write events, until cancelled."""
        while True:
            while not self._listeners:
                await self._arrivals.park()
            try:
                self._latest = _event(await self._write())
                self._latest_gzip = await _deflated(self._latest)
            except Exception:
                log.exception("cannot show the queue")  # which goes on without being seen
            else:
                self._changed.unpark_all()
            await trio.sleep(INTERVAL)

    async def listen(self, *, gzip: bool = False) -> AsyncGenerator[bytes, None]:
        """Yield each event from now on.

        Args:
          gzip: whether to compress, as the content coding of HTTP.
        """
        self._listeners += 1
        self._arrivals.unpark_all()
        try:
            if gzip:
                yield GZIP_HEADER
            while True:
                await self._changed.park()
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
