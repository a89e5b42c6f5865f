"""Windows in the memory of this process."""

from __future__ import annotations

from collections import defaultdict

import trio


class MemoryStore:
    """A :class:`~gateway_queue.store.WindowStore` for a server that runs alone.

    A claim needs no mark here, for each key has a single dispatcher to ask for it.

    Args:
      window: seconds from an answer until its key opens again.
      hold: open every key only one window from now. A process that has just started cannot
        know when its predecessor released last.
    """

    def __init__(self, window: float, *, hold: bool) -> None:
        first_opening = trio.current_time() + window if hold else trio.current_time()
        self._window = window
        self._opens_at = defaultdict[int, float](lambda: first_opening)

    async def claim(self, key: int) -> float:
        return max(0.0, self._opens_at[key] - trio.current_time())

    async def start_window(self, key: int, answered_at: float) -> None:
        self._opens_at[key] = answered_at + self._window

    async def give_back(self, key: int) -> None:
        pass
