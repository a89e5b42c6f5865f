"""Shows the measurements as a table, and writes them as JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections import defaultdict
from pathlib import Path

from rich.table import Table

from tests.benchmark.scenarios import Figures


class Report:
    """Figures by scenario, name and subject: one for each run.

    Args:
      waiters: number of waiting clients.
      runs: how often each scenario was measured.
    """

    def __init__(self, waiters: int, runs: int) -> None:
        self.waiters = waiters
        self.runs = runs
        self._load = [os.getloadavg()[0]]
        self._figures: dict[str, dict[str, dict[str, list[float]]]] = defaultdict(
            lambda: defaultdict(lambda: defaultdict(list))
        )

    def add(self, scenario: str, subject: str, figures: Figures) -> None:
        """Add the figures of one run."""
        for name, figure in figures.items():
            self._figures[scenario][name][subject].append(figure)
        self._load.append(os.getloadavg()[0])

    def median(self, scenario: str, name: str, subject: str) -> float | None:
        """Return the median of all runs, None if there was none."""
        figures = self._figures[scenario][name][subject]
        return statistics.median(figures) if figures else None

    def table(self) -> Table:
        """Show the medians of all subjects, and how the server compares with the floor."""
        title = f"{self.waiters:,} waiters, medians of {self.runs} runs"
        table = Table("scenario", "figure", title=title)
        subjects = self._subjects()
        for column in (*subjects, "server / floor"):
            table.add_column(column, justify="right")
        for scenario, names in self._figures.items():
            for name in names:
                medians = {subject: self.median(scenario, name, subject) for subject in subjects}
                server, floor = medians["server"], medians.get("floor")
                ratio = server / floor if server is not None and floor else None
                table.add_row(scenario, name, *map(_shown, (*medians.values(), ratio)))
            table.add_section()
        return table

    def _subjects(self) -> list[str]:
        """Return the names of all subjects, in the order of their first figures."""
        figures = (names for scenario in self._figures.values() for names in scenario.values())
        return list(dict.fromkeys(subject for names in figures for subject in names))

    def write(self, path: Path) -> None:
        """Write every run's figures as JSON."""
        document = {
            "waiters": self.waiters,
            "python": platform.python_version(),
            "cpus": os.cpu_count(),
            "load": {"least": min(self._load), "most": max(self._load)},
            "figures": self._figures,
        }
        path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def _shown(figure: float | None) -> str:
    return "" if figure is None else f"{figure:,.{2 if abs(figure) < 100 else 0}f}"
