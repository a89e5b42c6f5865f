"""The day's session starts, counted in the memory of this process."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from gateway_queue.store import IN_FLIGHT_WINDOWS, USUAL_TOTAL, DiscordBudget, SessionStarts, Source

DAY = 24 * 60 * 60.0
"""Seconds of the period for which Discord grants session starts:
https://discord.com/developers/docs/events/gateway#session-start-limit-object"""


class Budget:
    """Counts session starts, and compares them with the limit. Times are in seconds, of one clock.

    Until Discord's figures are known, a start counts for 24 hours, so that no period of 24 hours
    has more starts than the limit. Discord's day ends at its reset. Here it ends one window later,
    because a start at the moment of the reset may still count for the day before.

    Args:
      window: seconds between two releases of one rate limit key.
      limit: starts per day; 0 enforces no limit, not even Discord's; None enforces only Discord's.
    """

    def __init__(self, window: float, limit: int | None) -> None:
        self._set(window, limit)
        self._discord_budget: DiscordBudget | None = None
        self._claimed = 0
        # Without a limit, nothing needs a higher count than the last warning.
        self._starts = deque[float](maxlen=self._configured or USUAL_TOTAL)

    def _set(self, window: float, limit: int | None) -> None:
        self._window = window
        self._in_flight = IN_FLIGHT_WINDOWS * window
        self._enforced = limit != 0
        self._configured = limit or None

    def change(self, window: float, limit: int | None) -> None:
        """Change the limit, see the constructor. Earlier starts stay counted."""
        self._set(window, limit)
        if self._discord_budget is None:
            self._starts = deque(self._starts, maxlen=limit or USUAL_TOTAL)

    def claim(self, now: float) -> float:
        """Take one start and return 0; if none is left, return the seconds until one is."""
        seen = self.seen_at(now)
        if seen.enforced and seen.remaining is not None and seen.remaining <= self._claimed:
            return seen.resumes_in
        self._claimed += 1
        return 0.0

    def give_back(self) -> None:
        """Uncount a claimed start that was not used."""
        self._claimed -= 1

    def start(self, at: float) -> None:
        """Count a claimed start."""
        self._claimed -= 1
        self._starts.append(at)

    def update_budget(self, budget: DiscordBudget) -> None:
        """Adopt Discord's figures. Starts that they may not include stay counted."""
        self._discord_budget = budget
        self._starts = deque(self._starts, maxlen=max(1, budget.total))

    def seen_at(self, now: float) -> SessionStarts:
        """Return the session starts at a time, which is never earlier than in the last call."""
        if self._discord_budget is not None:
            return self._seen_with(self._discord_budget, now)
        while self._starts and self._starts[0] + DAY <= now:
            self._starts.popleft()
        resets_in = self._starts[0] + DAY - now if self._starts else DAY
        source: Source | None = "configured" if self._configured else None
        return SessionStarts(
            used=len(self._starts),
            total=self._configured,
            enforced=self._enforced,
            resets_in=resets_in,
            resumes_in=resets_in,
            source=source,
        )

    def _seen_with(self, budget: DiscordBudget, now: float) -> SessionStarts:
        while now >= budget.resets_at + self._window:
            budget = replace(
                budget,
                remaining=budget.total,
                resets_at=budget.resets_at + DAY,
                asked_at=budget.resets_at,
            )
        self._discord_budget = budget
        while self._starts and self._starts[0] + self._in_flight <= budget.asked_at:
            self._starts.popleft()
        used = budget.total - budget.remaining + len(self._starts)
        return SessionStarts(
            used=used,
            total=budget.total,
            enforced=self._enforced,
            resets_in=max(0.0, budget.resets_at - now),
            resumes_in=budget.resets_at + self._window - now,
            source="discord",
        )
