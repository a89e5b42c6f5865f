"""A store in the memory of this process."""

from __future__ import annotations

from collections.abc import Callable

import trio

from gateway_queue.store import Claim, DiscordBudget, Line, Refusal, Rules, SessionStarts, Standing
from gateway_queue.store.budget import Budget
from gateway_queue.store.loop_guard import LoopGuard
from gateway_queue.store.pace import Pace
from gateway_queue.store.starts_by_shard import StartsByShard
from gateway_queue.store.windows import Windows


class MemoryStore:
    """A :class:`~gateway_queue.store.WindowStore` for a server that runs alone.

    Args:
      rules: of the queue. If ``hold`` is set, each key stays closed for one window from now.
    """

    fault = None

    def __init__(self, rules: Rules) -> None:
        now = trio.current_time()
        self.rules = rules
        self._max_concurrency = 1
        self._windows = Windows(now + rules.unconfirmed_window if rules.hold else now)
        self._pace = Pace(rules.window, rules.releases_per_window)
        self._budget = Budget(rules.window, rules.session_start_limit)
        self._loop_guard = LoopGuard(rules.loop_free_starts)
        self.starts_by_shard = StartsByShard()

    async def claim(
        self,
        key: int,
        shard: int | None,
        came_at: float,  # noqa: ARG002
        *,
        confirm: bool = False,
    ) -> Claim | Refusal:
        now = trio.current_time()
        if wait := self._loop_guard.wait(shard, now):
            return Refusal(wait, "shard")
        if (wait := self._windows.opens_at(key) - now) > 0:
            return Refusal(min(wait, self.rules.window), "key")  # infinite if claimed
        if wait := self._pace.wait(now):
            return Refusal(wait, "queue")
        if wait := self._budget.claim(now):
            return Refusal(wait, "key")
        claim = Claim(key, self._max_concurrency, shard, confirm)
        self._windows.claim(claim)
        self._pace.claim()
        return claim

    async def start_window(self, claim: Claim, at: float, *, confirmed: bool = False) -> None:
        until = at + (self.rules.window if confirmed else self.rules.unconfirmed_window)
        self._windows.close(claim, until, trio.current_time())
        self._pace.start(until)
        self._budget.start(at)
        self._loop_guard.start(claim.shard, at)
        self.starts_by_shard.add(object(), claim.shard, at)

    async def give_back(self, claim: Claim) -> None:
        self._windows.open(claim)
        self._pace.give_back()
        self._budget.give_back()

    async def withdraw(self, key: int) -> None:
        pass

    def place_time(self) -> float:
        return trio.current_time()

    def follow_moves(self, move: Callable[[Standing, float, float], None]) -> None:
        pass

    def share(self, place: Standing) -> None:
        pass

    def unshare(self, place: Standing) -> None:
        pass

    async def line(self) -> Line | None:
        return None

    async def retire(self) -> None:
        pass

    def change_rules(self, rules: Rules) -> None:
        self.rules = rules
        self._windows.hold(trio.current_time() + rules.unconfirmed_window)
        self._pace.change(rules.window, rules.releases_per_window)
        self._budget.change(rules.window, rules.session_start_limit)
        self._loop_guard.change(rules.loop_free_starts)

    def regroup(self, max_concurrency: int) -> None:
        self._windows.regroup(max_concurrency, trio.current_time())
        self._max_concurrency = max_concurrency

    async def update_budget(self, budget: DiscordBudget) -> None:
        self._budget.update_budget(budget)

    def session_starts(self) -> SessionStarts:
        return self._budget.seen_at(trio.current_time())
