"""Discord as a bot sees it: its limits, and the session starts that it counts."""

from __future__ import annotations

import random

import trio

from gateway_queue.discord.api import SessionStartLimit, Unavailable
from tests.exploration.record import Call, Overspending, Record

DAY = 24 * 60 * 60.0


class SimulatedDiscord:
    """Counts session starts by the simulation's clock, and answers with its limits."""

    def __init__(self, record: Record, random_source: random.Random) -> None:
        scenario = record.scenario
        self.max_concurrency = scenario.keys
        self.is_down = False
        self._record = record
        self._random = random_source
        self._total = 1000
        self._used = self._total - scenario.budget
        self._resets_at = trio.current_time() + scenario.resets_in

    @property
    def resets_at(self) -> float:
        self._begin_day()
        return self._resets_at

    def _begin_day(self) -> None:
        """Begin a new day if it is time."""
        while trio.current_time() >= self._resets_at:
            self._resets_at += DAY
            self._used = 0
            self._record.note("Discord: a new day")

    @property
    def limit(self) -> int:
        """The most session starts in this day: Discord's total, or a lower SESSION_START_LIMIT."""
        own = self._record.scenario.session_start_limit
        return min(self._total, own) if own else self._total

    @property
    def is_spent(self) -> bool:
        self._begin_day()
        return self._used >= self.limit

    def identify(self, call: Call) -> None:
        """Count a session start."""
        self._begin_day()
        call.identified_at = trio.current_time()
        self._record.note(f"{call} identified")
        self._used += 1
        if self._used > self.limit:
            now = trio.current_time()
            self._record.overspent.append(Overspending(now, self._used, self.limit))

    def grant_more(self) -> None:
        """Raise the day's total, as for a bot that has grown."""
        self._total += self._random.randint(1, 5)
        self._record.note(f"Discord: total is {self._total}")

    def change_max_concurrency(self) -> None:
        self.max_concurrency = self._random.choice((1, 2, 3, 4, 6, 16))
        self._record.note(f"Discord: max_concurrency is {self.max_concurrency}")

    async def session_start_limit(self) -> SessionStartLimit:
        """Answer Get Gateway Bot.

        Raises:
          Unavailable: it is down.
        """
        await trio.sleep(self._random.uniform(0.01, 0.2))
        if self.is_down:
            raise Unavailable("it is down")
        reset_after = self.resets_at - trio.current_time()
        remaining = max(0, self._total - self._used)
        answer = SessionStartLimit(self._total, remaining, reset_after, self.max_concurrency)
        await trio.sleep(self._random.uniform(0.01, 0.2))
        return answer
