"""A chart of the CPU time that one client takes.

A separate module, because pygal changes how Python imports modules.
"""

from __future__ import annotations

from pathlib import Path

import pygal
from pygal.style import CleanStyle

from tests.benchmark.report import Report

LINES = {
    "a client comes": ("hold", "CPU µs a waiter", "server"),
    "a client comes (floor)": ("hold", "CPU µs a waiter", "floor"),
    "a client disconnects": ("churn", "CPU µs a leaver", "server"),
    "a client is released": ("lateness", "CPU µs a release", "server"),
}


def draw(reports: list[Report], path: Path) -> None:
    """Draw an SVG of the CPU time of one client, by the length of the queue."""
    chart = pygal.Line(
        title="CPU time of one client, by the length of the queue",
        x_title="waiting clients",
        y_title="microseconds",
        logarithmic=True,
        range=(10, 10_000),
        y_labels=(10, 100, 1_000, 10_000),
        value_formatter="{:,.0f}".format,
        style=CleanStyle(background="white", plot_background="white", font_family="sans-serif"),
        js=(),
        legend_at_bottom=True,
        legend_at_bottom_columns=2,
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
