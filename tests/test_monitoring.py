"""The dashboard for Grafana and the alerts for Prometheus, against what the server exports."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families as parse_text

from tests.harness import eventually, serving

MONITORING = files("gateway_queue.observing") / "monitoring"
METRIC = re.compile(r"\b(?:gateway_queue|process)_\w+")


@pytest.fixture(scope="module")
def exported() -> set[str]:
    """Return the names of all samples of a server with one released and one waiting ticket."""
    with serving(SESSION_START_LIMIT=10, HOLD_ON_START="false", WINDOW_SECONDS=100) as server:
        server.connect().answer()
        server.connect()
        eventually(lambda: server.status()["waiting"] == 1)
        text = server.get("/metrics").body.decode()
    return {sample.name for family in parse_text(text) for sample in family.samples}


def grafana() -> dict[str, Any]:
    dashboard: dict[str, Any] = json.loads((MONITORING / "grafana.json").read_text())
    return dashboard


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]
    rules: list[dict[str, Any]] = group["rules"]
    return rules


def queries() -> Iterator[str]:
    for rule in alerts():
        yield rule["expr"]
    for panel in grafana()["panels"]:
        for target in panel["targets"]:
            yield target["expr"].replace("$__rate_interval", "5m")


@pytest.mark.parametrize("query", tuple(queries()))
def test_each_query_is_valid_and_names_exported_metrics(query: str, exported: set[str]) -> None:
    promql_parser.parse(query)
    names = set(METRIC.findall(query))
    assert names <= exported
    assert names or "up{" in query


def test_each_panel_shows_the_chosen_bots(tmp_path: Path) -> None:
    (tmp_path / "bots.toml").write_text("[music]\n")
    with serving(BOTS_FILE=tmp_path / "bots.toml") as server:
        text = server.get("/metrics").body.decode()
    families = parse_text(text)
    samples = [sample for family in families for sample in family.samples]
    of_bots = {sample.name for sample in samples if "bot" in sample.labels}
    of_server = {sample.name for sample in samples} - of_bots
    for panel in grafana()["panels"]:
        for target in panel["targets"]:
            for name in METRIC.findall(target["expr"]):
                has_choice = f'{name}{{instance=~"$instance",bot=~"$bot"}}' in target["expr"]
                assert not has_choice if name in of_server else has_choice, target["expr"]


def test_every_metric_of_the_queue_is_on_the_dashboard(exported: set[str]) -> None:
    targets = [target for panel in grafana()["panels"] for target in panel["targets"]]
    shown = {name for target in targets for name in METRIC.findall(target["expr"])}
    ours = {name for name in exported if name.startswith("gateway_queue")}
    unshown = {name for name in ours - shown if not name.endswith(("_created", "_sum", "_count"))}
    assert unshown == set()


def test_alerts_say_what_is_wrong() -> None:
    names = [rule["alert"] for rule in alerts()]
    assert len(set(names)) == len(names)
    for rule in alerts():
        assert rule["labels"]["severity"] in {"critical", "warning", "info"}
        assert rule["annotations"]["summary"].endswith(".")
        assert rule["annotations"]["description"].endswith(".")


def test_panels_do_not_overlap_and_have_names_of_their_own() -> None:
    panels = grafana()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({panel["title"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for grid in (panel["gridPos"] for panel in panels)
        for x in range(grid["x"], grid["x"] + grid["w"])
        for y in range(grid["y"], grid["y"] + grid["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) == 23
