"""Divides the data of an HTTP/2 client into frames, before it is parsed."""

from __future__ import annotations

import trio

PREFACE_BYTES, HEAD_BYTES = 24, 9

DATA, HEADERS, SETTINGS, GOAWAY, CONTINUATION = 0, 1, 4, 7, 9

END_HEADERS = 0x4

FRAME_MAX = 2**14
"""Bytes of a frame, as announced to clients."""

HEAD_MAX = 10 * 1024
"""Bytes of the encoded headers of one request. h2 takes three times as much memory for them."""

STEP_COST = 20
"""The cost of the frames that are parsed in one step: half a millisecond for 20 small frames."""

COSTS = {HEADERS: STEP_COST, SETTINGS: STEP_COST}
"""The cost of a frame: HEADERS is a request, SETTINGS concerns all streams. Others cost 1."""

ALLOWANCE, ALLOWANCE_PER_SECOND = 5000.0, 100.0
"""How many frames without data a client may send, at once and in the long run. To end 900 requests
and to start them again takes 1800."""

LITTLE = 256
"""A DATA frame with fewer bytes than this counts as a frame without data."""


class Excess(Exception):
    """A client sends too many frames without data, or too long headers."""


class Frames:
    """Divides the data of a client into steps, and counts its frames."""

    def __init__(self) -> None:
        self.client_leaves = False
        """Whether the client has sent GOAWAY: it starts no more requests."""
        self._unread = bytearray()
        self._has_begun = False
        self._head_bytes = 0
        self._allowance = ALLOWANCE
        self._counted_at = trio.current_time()

    def add(self, data: bytes) -> None:
        """Add data that was read."""
        self._unread += data

    def next_step(self) -> bytes | None:
        """Return the next frames to parse; None without a whole frame.

        GOAWAY frames are left out: after a GOAWAY, h2 would send no answer.

        Raises:
          Excess: the connection should be closed.
        """
        end = cost = 0
        if not self._has_begun and len(self._unread) >= PREFACE_BYTES:
            self._has_begun, end = True, PREFACE_BYTES
        while self._has_begun and cost < STEP_COST and len(self._unread) >= end + HEAD_BYTES:
            length = int.from_bytes(self._unread[end : end + 3])
            kind, flags = self._unread[end + 3 : end + 5]
            frame_end = end + HEAD_BYTES + length
            if length > FRAME_MAX:
                return self._take(len(self._unread))  # h2 closes the connection
            if len(self._unread) < frame_end:
                break
            self._count(kind, flags, length)
            cost += COSTS.get(kind, 1)
            if kind == GOAWAY:
                self.client_leaves = True
                del self._unread[end:frame_end]
            else:
                end = frame_end
        return self._take(end) if end or cost else None

    def credit(self, frames: float) -> None:
        """Allow more frames without data, up to ``ALLOWANCE``."""
        self._allowance = min(ALLOWANCE, self._allowance + frames)

    def _take(self, size: int) -> bytes:
        with memoryview(self._unread) as unread:
            taken = bytes(unread[:size])
        del self._unread[:size]
        return taken

    def _count(self, kind: int, flags: int, length: int) -> None:
        now = trio.current_time()
        self.credit((now - self._counted_at) * ALLOWANCE_PER_SECOND)
        self._counted_at = now
        if kind != DATA:
            self._allowance -= COSTS[SETTINGS] if kind == SETTINGS else 1
        elif length < LITTLE:
            self._allowance -= 1
        if kind in {HEADERS, CONTINUATION}:
            self._head_bytes += length
        if self._allowance < 0 or self._head_bytes > HEAD_MAX:
            raise Excess
        if flags & END_HEADERS:
            self._head_bytes = 0
