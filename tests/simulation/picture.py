"""A picture of a simulation: one diagram for each way, on the same axes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.simulation.report import DISCORDS_WINDOW, Outcome, summary, thinned

WIDTH, HEIGHT, GAP = 320, 220, 85
"""The size of a diagram, and the gap between two diagrams, in units of the SVG."""

LEFT, TOP, BOTTOM = 85, 90, 60

STEPS = 1, 2, 5

STYLE = """text{font:13px sans-serif;fill:#1b1e28}
.title{font-size:17px;font-weight:bold}.soft{fill:#5b6072}
.grid{stroke:#e3e5ec}.limit{fill:none;stroke:#5b6072;stroke-dasharray:5 4}
.up{fill:none;stroke:#5865f2;stroke-width:2.5;stroke-linejoin:round}.bad{stroke:#b4341f}"""


def draw(outcomes: Sequence[Outcome], shards: int, path: Path) -> None:
    """Draw how many shards had a session over time, as an SVG.

    Args:
      outcomes: in the order of their diagrams.
      shards: how many there are.
      path: where to write.
    """
    longest = max(outcome.took for outcome in outcomes) / 60
    width = LEFT + len(outcomes) * (WIDTH + GAP)
    height = TOP + HEIGHT + BOTTOM
    parts: list[str] = []
    for place, outcome in enumerate(outcomes):
        parts += _diagram(outcome, place, shards, longest)
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">'
        f'<style>{STYLE}</style><rect width="100%" height="100%" fill="#fff"/>'
        f"{''.join(parts)}</svg>\n"
    )


def _diagram(outcome: Outcome, place: int, shards: int, longest: float) -> Iterator[str]:
    def x(minutes: float) -> float:
        return WIDTH * minutes / longest

    def y(number: float) -> float:
        return HEIGHT * (1 - number / shards)

    def line(kind: str, points: Sequence[tuple[float, float]]) -> str:
        path = "L".join(f"{x(at):.1f} {y(number):.1f}" for at, number in points)
        return f'<path class="{kind}" d="M{path}"/>'

    yield f'<g transform="translate({LEFT + place * (WIDTH + GAP)} {TOP})">'
    yield f'<text class="title" y="-60">{outcome.way}</text>'
    for row, text in enumerate(summary(outcome)):
        yield f'<text class="soft" y="{18 * row - 38}">{text}</text>'
    for number in _marks(shards):
        yield line("grid", [(0, number), (longest, number)])
        yield f'<text x="-8" y="{y(number) + 4:.1f}" text-anchor="end">{number:,.0f}</text>'
    for minute in _marks(longest):
        yield f'<text x="{x(minute):.1f}" y="{HEIGHT + 20}" text-anchor="middle">{minute:g}</text>'
    yield f'<text class="soft" x="{WIDTH}" y="{HEIGHT + 42}" text-anchor="end">minutes</text>'
    yield f'<text class="soft" y="{HEIGHT + 42}">dashed: no crash, no window unused</text>'
    yield '<text class="soft" x="-8" y="-16" text-anchor="end">shards up</text>'
    keys = outcome.gateway.discord.max_concurrency
    full = min(longest, (shards / keys - 1) * DISCORDS_WINDOW / 60)
    yield line("limit", [(0, keys), (full, keys + full * 60 / DISCORDS_WINDOW * keys)])
    points = [(at / 60, float(number)) for at, number in thinned(outcome.shards_up())]
    yield line("up bad" if outcome.is_reset else "up", points)
    yield "</g>"


def _marks(most: float) -> list[float]:
    """Return a few round numbers from 0 up to ``most``."""
    power = 10.0 ** math.floor(math.log10(most))
    sizes = [power / 10 * step for step in STEPS] + [power * step for step in STEPS]
    size = next(size for size in sizes if most / size <= 6)
    return [size * number for number in range(int(most / size) + 1)]
