"""The results of a simulation, in seconds of Discord's clock."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from tests.fake_discord.gateway import Gateway
from tests.simulation.fleet import Wait

DISCORDS_WINDOW = 5.0

COLUMNS = (
    "all shards up after",
    "of the limit",
    "Invalid Sessions",
    "unused windows",
    "longest wait",
    "shards overtaken",
)


@dataclass(frozen=True)
class Outcome:
    """How a fleet has started in one way."""

    way: str
    gateway: Gateway
    waits: Sequence[Wait]
    up: Sequence[tuple[float, int]]
    """Samples: the time (:func:`time.monotonic`), and how many shards had a session then."""

    @property
    def is_reset(self) -> bool:
        """Whether Discord has reset the bot's token, because it started too many sessions."""
        return self.gateway.over_budget > 0

    @property
    def took(self) -> float:
        """Seconds until all shards were up, or until the token was reset."""
        return self._discords_seconds(self.up[-1][0] - self.up[0][0])

    @property
    def at_least(self) -> float:
        """The shortest possible start-up: one session per window, for the key with the most."""
        return (max(map(len, self._starts_by_key())) - 1) * DISCORDS_WINDOW

    @property
    def unused(self) -> int:
        """Windows in which no shard of a key started, though one did later."""
        return sum(
            max(0, int((starts[-1] - starts[0]) / self.gateway.window) - (len(starts) - 1))
            for starts in self._starts_by_key()
        )

    @property
    def longest_wait(self) -> float:
        return self._discords_seconds(max(wait.up_at - wait.asked_at for wait in self.waits))

    @property
    def overtaken(self) -> int:
        """See :func:`overtaken`; over all keys."""
        by_key = defaultdict[int, list[Wait]](list)
        for wait in self.waits:
            by_key[wait.shard % self.gateway.discord.max_concurrency].append(wait)
        return sum(overtaken(waits, self.gateway.window) for waits in by_key.values())

    def shards_up(self) -> list[tuple[float, int]]:
        """Return how many shards had a session over time; none after their token was reset."""
        begin = self.up[0][0]
        points = [(self._discords_seconds(at - begin), number) for at, number in self.up]
        return [*points, (self.took, 0)] if self.is_reset else points

    def _discords_seconds(self, seconds: float) -> float:
        return seconds * DISCORDS_WINDOW / self.gateway.window

    def _starts_by_key(self) -> list[list[float]]:
        starts = defaultdict[int, list[float]](list)
        for one in self.gateway.started:
            starts[one.shard % self.gateway.discord.max_concurrency].append(one.at)
        return list(starts.values())


def overtaken(waits: Iterable[Wait], window: float) -> int:
    """Count the shards of a key that were overtaken: another shard came later and was up earlier.

    "Later" means by more than a window, because shards that come at the same time have no order.
    """
    later_first = sorted(waits, key=lambda wait: -wait.asked_at)
    earliest = [math.inf]
    for wait in later_first:
        earliest.append(min(earliest[-1], wait.up_at))
    number = place = 0
    for wait in later_first:
        while later_first[place].asked_at > wait.asked_at + window:
            place += 1
        number += earliest[place] < wait.up_at
    return number


def table(outcomes: Sequence[Outcome]) -> str:
    """Compare the ways, in Markdown."""
    lines = [f"| {' | '.join(['', *COLUMNS])} |".replace("  ", " "), "| --- " * 7 + "|"]
    for one in outcomes:
        cells = [one.way, f"{one.took:.0f} s", f"{one.at_least / one.took:.1%}"]
        if one.is_reset:
            cells[1:] = [f"never: token reset after {one.took:.0f} s", "-"]
        cells += [f"{len(one.gateway.early):,}", f"{one.unused:,}"]
        cells += [f"{one.longest_wait:.0f} s", f"{one.overtaken:,}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(outcome: Outcome) -> list[str]:
    """Describe an outcome in two short lines."""
    invalid = f"{len(outcome.gateway.early):,} Invalid Sessions"
    if outcome.is_reset:
        total = outcome.gateway.discord.total
        return [f"{invalid}: all {total:,} session starts spent,", "Discord resets the token"]
    return [
        f"{invalid}, all up after {minutes(outcome.took)}",
        f"longest wait {minutes(outcome.longest_wait)}, {outcome.overtaken:,} shards overtaken",
    ]


def minutes(seconds: float) -> str:
    """Write seconds as minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02} min"


def thinned(points: Sequence[tuple[float, int]]) -> list[tuple[float, int]]:
    """Leave out the points of a line that are between two equal points."""
    inner = [point for before, point in pairwise(points) if point[1] != before[1]]
    return [points[0], *inner, points[-1]]
