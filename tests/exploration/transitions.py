"""Checks that places change their states only as the table in :mod:`gateway_queue.queue` allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gateway_queue.queue.lane import Place, State

TRANSITIONS = {
    "waiting": {"away", "gone", "held", "chosen", "released"},
    "held": {"waiting", "away", "gone"},
    "away": {"waiting", "held", "gone"},
    "chosen": {"released", "waiting"},
    "released": set[str](),
    "gone": set[str](),
}


class WatchedState:
    """Replaces ``Place.state``, and reports each change that is not in the table.

    Args:
      report: is called with an explanation.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self._slot: Any = Place.__dict__["state"]
        self._report = report

    def __get__(self, place: Place, _: type[Place]) -> State:
        state: State = self._slot.__get__(place)
        return state

    def __set__(self, place: Place, state: State) -> None:
        try:
            before = self._slot.__get__(place)
        except AttributeError:
            before = state  # a new place
        if state != before and state not in TRANSITIONS[before]:
            self._report(f"the place {place.number} of shard {place.shard}: {before} to {state}")
        self._slot.__set__(place, state)
