"""Writes one long document at a time, for all requests that wait for the same one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import trio

PART_BYTES = 2**14
"""The part of a document that is handed to a connection at a time."""


class Shared:
    """Long documents. To write many of them at the same time would delay releases.

    No request gets a document whose writing began before the request came.
    """

    def __init__(self) -> None:
        self._lock = trio.Lock()
        self._begun = 0
        self._last: tuple[object, bytes] = None, b""

    async def get(self, name: object, write: Callable[[], Awaitable[bytes]]) -> bytes:
        """Return a document.

        Args:
          name: identifies the document: requests with the same name may share it.
          write: writes it.
        """
        begun = self._begun
        async with self._lock:
            if self._begun == begun or self._last[0] != name:
                self._begun += 1
                self._last = name, await write()
            document = self._last[1]
            if not self._lock.statistics().tasks_waiting:
                self._last = None, b""
            return document


async def parts(document: bytes) -> AsyncIterator[bytes]:
    """Cut a document into parts, so that a connection keeps little of it in memory."""
    for start in range(0, len(document), PART_BYTES):
        yield document[start : start + PART_BYTES]
