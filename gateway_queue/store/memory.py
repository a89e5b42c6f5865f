"""A store in the memory of this process."""

from __future__ import annotations

import trio

from gateway_queue.store import Allowance, Refusal, SessionStarts
from gateway_queue.store.budget import Budget
from gateway_queue.store.loop_guard import LoopGuard
from gateway_queue.store.windows import Windows


class MemoryStore:
    """A :class:`~gateway_queue.store.WindowStore` for a server that runs alone.

    A claim of a key needs no mark here, for each key has a single dispatcher to ask for it.

    Args:
      window: seconds from an answer until its key opens again.
      hold: open every key only one window from now. A process that has just started cannot
        know when its predecessor released last.
      session_start_limit: see :class:`~gateway_queue.store.budget.Budget`.
      loop_free_starts: see :class:`~gateway_queue.store.loop_guard.LoopGuard`.
    """

    def __init__(
        self,
        window: float,
        *,
        hold: bool,
        session_start_limit: int | None = None,
        loop_free_starts: int = 0,
    ) -> None:
        now = trio.current_time()
        self._window = window
        self._max_concurrency = 1
        self._windows = Windows(now + window if hold else now)
        self._budget = Budget(window, session_start_limit)
        self._loop_guard = LoopGuard(loop_free_starts)

    async def claim(self, key: int, shard: int | None) -> Refusal | None:
        now = trio.current_time()
        if wait := self._loop_guard.wait(shard, now):
            return Refusal(wait, "shard")
        if (wait := self._windows.opens_at(key) - now) > 0:
            return Refusal(wait, "key")
        if wait := self._budget.claim(now):
            return Refusal(wait, "key")
        return None

    async def start_window(self, key: int, shard: int | None, answered_at: float) -> None:
        self._windows.close(key, answered_at + self._window, trio.current_time())
        self._budget.start(answered_at)
        self._loop_guard.start(shard, answered_at)

    async def give_back(self, key: int) -> None:  # noqa: ARG002
        self._budget.give_back()

    async def regroup(self, max_concurrency: int) -> None:
        self._windows.regroup(self._max_concurrency, max_concurrency, trio.current_time())
        self._max_concurrency = max_concurrency

    async def allow(self, allowance: Allowance) -> None:
        self._budget.allow(allowance)

    def session_starts(self) -> SessionStarts:
        return self._budget.seen_at(trio.current_time())
