"""The alert rules, run by Prometheus' own tool: each fires when it should, and only then."""

from __future__ import annotations

import shutil
import subprocess
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

from tests.harness import eventually, serving

RULES = str(files("gateway_queue.observing") / "monitoring" / "alerts.yml")

HEALTHY = {
    "up": "1x60",
    "gateway_queue_ready": "1x60",
    "gateway_queue_window_seconds": "5x60",
    'gateway_queue_waiting{rate_limit_key="0"}': "0x20 100x40",
    "gateway_queue_held": "0x60",
    'gateway_queue_released_total{rate_limit_key="0"}': "0x20 0+11x40",
    "gateway_queue_session_starts_remaining": "500x60",
    "gateway_queue_session_starts_limit": "1000x60",
    "gateway_queue_loop_held_total": "0x60",
    "gateway_queue_unconfirmed_total": "0x60",
    "gateway_queue_store_errors_total": "0x60",
    "gateway_queue_unkeyed_total": "0x60",
    'gateway_queue_discord_requests_total{outcome="answered"}': "1+0.2x60",
    'gateway_queue_discord_requests_total{outcome="failed"}': "0+0.2x60",
    'gateway_queue_lateness_seconds_bucket{le="0.005"}': "0+11x60",
    'gateway_queue_lateness_seconds_bucket{le="0.5"}': "0+11x60",
    'gateway_queue_lateness_seconds_bucket{le="+Inf"}': "0+11x60",
}
"""The series of a replica: tickets come after 20 minutes, and 11 per minute are released."""

WAITING = 'gateway_queue_waiting{rate_limit_key="0"}'
RELEASED = 'gateway_queue_released_total{rate_limit_key="0"}'
SPENT = {"gateway_queue_session_starts_remaining": "0x60", RELEASED: "7x60"}

CASES: dict[str, tuple[dict[str, str], set[str]]] = {
    "healthy": ({}, set()),
    "no ticket": ({WAITING: "0x60", RELEASED: "7x60"}, set()),
    "down": (
        {
            name: "0x60" if name == "up" else f"{values.split('x')[0]}x5 _x55"
            for name, values in HEALTHY.items()
        },
        {"Down"},
    ),
    "a job that never was a queue": (
        {name: "0x60" if name == "up" else "_x60" for name in HEALTHY},
        set(),
    ),
    "not ready": ({"gateway_queue_ready": "0x60", RELEASED: "7x60"}, {"NotReady"}),
    "stalled": ({RELEASED: "7x60"}, {"Stalled"}),
    "stalled beside a shard in a crash loop": (
        {RELEASED: "7x60", "gateway_queue_loop_held_total": "0+1x60", "gateway_queue_held": "1x60"},
        {"Stalled", "CrashLoop"},
    ),
    "all waiting shards are held": (
        {RELEASED: "7x60", WAITING: "3x60", "gateway_queue_held": "3x60"},
        set(),
    ),
    "windows of an hour": ({RELEASED: "7x60", "gateway_queue_window_seconds": "3600x60"}, set()),
    "late": ({'gateway_queue_lateness_seconds_bucket{le="0.005"}': "0x60"}, {"Late"}),
    "few starts left": ({"gateway_queue_session_starts_remaining": "99x60"}, {"BudgetLow"}),
    "starts spent": (SPENT, {"BudgetSpent"}),
    "a crash loop": ({"gateway_queue_loop_held_total": "0+1x60"}, {"CrashLoop"}),
    "a crash loop that is over": ({"gateway_queue_loop_held_total": "0+1x5 5x55"}, set()),
    "no confirmation": ({"gateway_queue_unconfirmed_total": "0+1x60"}, {"NotConfirmed"}),
    "Redis lost": ({"gateway_queue_store_errors_total": "0+1x60"}, {"StoreErrors"}),
    "no answer from Discord": (
        {
            'gateway_queue_discord_requests_total{outcome="answered"}': "1x60",
            'gateway_queue_discord_requests_total{outcome="failed"}': "0+1x60",
        },
        {"DiscordErrors"},
    ),
    "no shard named": ({"gateway_queue_unkeyed_total": "0+1x60"}, {"Unkeyed"}),
}


def replica(instance: str, changed: dict[str, str]) -> list[dict[str, str]]:
    """Write the series of a replica as promtool reads them."""
    assert changed.keys() <= HEALTHY.keys()
    return [
        {"series": with_labels(name, instance), "values": values}
        for name, values in (HEALTHY | changed).items()
    ]


def with_labels(series: str, instance: str) -> str:
    name, _, labels = series.rstrip("}").partition("{")
    return f'{name}{{job="queue", instance="{instance}"{labels and ", "}{labels}}}'


def promtool(*arguments: str, text: str | None = None) -> None:
    """Run Prometheus' tool, which must exit with success."""
    command = shutil.which("promtool")
    assert command, "install Debian's package prometheus"
    done = subprocess.run(
        [command, *arguments], input=text, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def play(path: Path, series: list[dict[str, str]], firing: set[str], minute: int = 50) -> None:
    """Check which alerts fire."""
    test = {
        "eval_time": f"{minute}m",
        "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
        "exp_samples": [
            {"labels": f'{{alertname="GatewayQueue{name}"}}', "value": 1} for name in sorted(firing)
        ],
    }
    document = {
        "rule_files": [RULES],
        "evaluation_interval": "1m",
        "tests": [{"interval": "1m", "input_series": series, "promql_expr_test": [test]}],
    }
    rules = path / "test.yml"
    rules.write_text(yaml.safe_dump(document))
    promtool("test", "rules", str(rules))


@pytest.mark.parametrize("case", CASES)
def test_alerts_fire_when_they_should(case: str, tmp_path: Path) -> None:
    changed, firing = CASES[case]
    play(tmp_path, replica("a", changed), firing)


def test_every_alert_has_a_case() -> None:
    (group,) = yaml.safe_load(Path(RULES).read_text())["groups"]
    named = {rule["alert"].removeprefix("GatewayQueue") for rule in group["rules"]}
    assert named == set().union(*(firing for _, firing in CASES.values()))


def test_a_replica_whose_tickets_wait_behind_others_is_healthy(tmp_path: Path) -> None:
    play(tmp_path, replica("a", {RELEASED: "0x60"}) + replica("b", {}), set())


def test_the_first_release_of_a_key_counts(tmp_path: Path) -> None:
    """Between two scrapes, a key is released for the first time and then not again."""
    play(tmp_path, replica("a", {RELEASED: "0x48 1x12"}), set())


def test_the_rules_are_valid() -> None:
    promtool("check", "rules", RULES)


def test_prometheus_accepts_the_metrics() -> None:
    with serving(SESSION_START_LIMIT=10, HOLD_ON_START="false", MAX_CONCURRENCY=2) as server:
        server.ask(1).answer()
        eventually(lambda: server.status()["released"] == 1)
        text = server.get("/metrics").body.decode()
    promtool("check", "metrics", text=text)
