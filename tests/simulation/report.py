"""What a simulation has shown: a table and a picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pygal

from tests.fake_discord.gateway import Gateway


@dataclass(frozen=True)
class Outcome:
    """How a fleet has started in one way. Times are in seconds."""

    way: str
    gateway: Gateway
    waits: Sequence[float]
    """From the start of each shard to its session."""
    began_at: float
    """When the fleet began (:func:`time.monotonic`)."""
    window: float

    @property
    def starts(self) -> list[float]:
        """When sessions started, since the fleet began."""
        return [one.at - self.began_at for one in self.gateway.started]

    @property
    def took(self) -> float:
        return self.starts[-1]

    @property
    def at_least(self) -> float:
        """The physical limit: one session a window, for the key that has most of them."""
        return (max(map(len, self._starts_by_key())) - 1) * self.window

    @property
    def wasted(self) -> int:
        """Windows in which nobody started, though somebody with this key did later."""
        return sum(
            max(0, int((starts[-1] - starts[0]) / self.window) - (len(starts) - 1))
            for starts in self._starts_by_key()
        )

    def _starts_by_key(self) -> list[list[float]]:
        starts = defaultdict[int, list[float]](list)
        for one in self.gateway.started:
            starts[one.shard % self.gateway.discord.max_concurrency].append(one.at)
        return list(starts.values())


def table(outcomes: Sequence[Outcome]) -> str:
    """Compare the ways, in Markdown."""
    lines = [
        "| | start-up | of the limit | Invalid Sessions | wasted slots | longest wait |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {one.way} | {one.took:.1f} s | {one.at_least / one.took:.1%} "
        f"| {len(one.gateway.early):,} | {one.wasted:,} | {max(one.waits):.1f} s |"
        for one in outcomes
    ]
    return "\n".join(lines)


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """Draw how many sessions have started, over time, as an SVG."""
    chart = pygal.XY(
        js=[], show_dots=False, title="Session starts", x_title="seconds", legend_at_bottom=True
    )
    for one in outcomes:
        name = f"{one.way} ({len(one.gateway.early):,} Invalid Sessions)"
        chart.add(name, [(at, number) for number, at in enumerate(one.starts, 1)])
    path.write_bytes(chart.render())
