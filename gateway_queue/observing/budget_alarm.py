"""Warnings while the day's session starts run out."""

from __future__ import annotations

import structlog

from gateway_queue.store import USUAL_TOTAL, SessionStarts

log = structlog.stdlib.get_logger(__name__)


class BudgetAlarm:
    """Warns once when 80 %, 90 % and all of the day's session starts are used."""

    def __init__(self) -> None:
        self._warned_at = 0.0
        self._was_spent = False

    def check(self, starts: SessionStarts) -> None:
        """Check the figures; called after each change."""
        if self._was_spent and not starts.spent:
            log.info("session starts are left again", remaining=starts.remaining)
        self._was_spent = starts.spent
        total = USUAL_TOTAL if starts.total is None else starts.total
        used = starts.used / total if total else 1.0
        reached = max(level for level in (0.0, 0.8, 0.9, 1.0) if used >= level)
        if reached > self._warned_at:
            log.warning(
                _message(starts),
                used=starts.used,
                total=total,
                resets_in=round(starts.resets_in),
            )
            self._warned_at = reached
        # Only far below: the figure may go up and down around a level all day.
        elif used < 0.5:
            self._warned_at = 0.0


def _message(starts: SessionStarts) -> str:
    if starts.spent:
        return "no session start is left today, no ticket is released until the reset"
    if starts.enforced and starts.total is not None:
        return "few session starts are left today"
    return "many session starts today; Discord resets the token of a bot that exceeds its limit"
