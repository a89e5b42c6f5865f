"""A chart of what one waiter costs.

A module of its own, for pygal changes how Python imports modules.
"""

from __future__ import annotations

from pathlib import Path

import pygal
from pygal.style import CleanStyle

from tests.benchmark.report import Report

LINES = {
    "comes: CPU µs": ("hold", "CPU µs a waiter", "server"),
    "comes, floor: CPU µs": ("hold", "CPU µs a waiter", "floor"),
    "leaves: CPU µs": ("churn", "CPU µs a leaver", "server"),
    "is released: CPU µs": ("lateness", "CPU µs a release", "server"),
    "stalls: kB": ("hold", "kB a waiter", "server"),
    "stalls, floor: kB": ("hold", "kB a waiter", "floor"),
}


def draw(reports: list[Report], path: Path) -> None:
    """Draw an SVG of what one waiter costs, by the length of the line."""
    chart = pygal.Line(
        title="What it costs that one waiter …, by the length of the line",
        x_title="waiters",
        logarithmic=True,
        range=(10, 10_000),
        y_labels=(10, 100, 1_000, 10_000),
        value_formatter="{:,.0f}".format,
        style=CleanStyle(background="white", plot_background="white", font_family="sans-serif"),
        js=(),
        legend_at_bottom=True,
        legend_at_bottom_columns=3,
        height=500,
    )
    chart.x_labels = [f"{report.waiters:,}" for report in reports]
    for line, figure in LINES.items():
        is_floor = figure[2] == "floor"
        chart.add(
            line,
            [report.median(*figure) for report in reports],
            stroke_style={"dasharray": "4, 4"} if is_floor else {},
        )
    chart.render_to_file(str(path))
