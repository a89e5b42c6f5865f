"""The benchmark finds faults of a server. The server stays below its limits of memory."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.benchmark import peers, scenarios
from tests.benchmark.__main__ import SECONDS, main
from tests.benchmark.subjects import Subject, floor, ours, running
from tests.harness import Server, serving

TOY = textwrap.dedent("""
    import contextlib, itertools, select, socket, sys, time

    fault = sys.argv[1]
    listener = socket.create_server(("127.0.0.1", 0), backlog=1000)
    print(f"Running on http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    waiting, window, opens_at = [], 0.05, 0.0
    for _ in itertools.count():
        if select.select([listener], [], [], 0.005)[0]:
            waiting.append(listener.accept()[0])
            if fault == "refuses" and len(waiting) > 250:
                waiting.pop().close()
            elif fault == "dies" and len(waiting) > 25:
                sys.exit()
        if waiting and time.monotonic() >= opens_at:
            with contextlib.suppress(OSError):
                waiting.pop(0).sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 0\\r\\n\\r\\n")
            opens_at = time.monotonic() + window
""")
"""A server that answers its oldest client every 0.05 s, connected or not, and may have a fault.

If it refuses clients, it keeps 250. It takes 12 s to answer them, longer than all clients need to
connect.
"""


@contextmanager
def toy(fault: str) -> Iterator[Server]:
    with serving(sys.executable, "-c", TOY, fault) as server:
        yield server


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.port}"


def test_a_server_that_is_early_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy is early if the benchmark assumes a longer window."""
    monkeypatch.setattr(scenarios, "RELEASES", 20)
    gaps = {}
    for window in (0.05, 0.1):
        with toy("none") as server:
            figures = scenarios.lateness(running(url(server), window, pid=None), 200)
        gaps[window] = figures["ms late, min"]
    assert gaps[0.05] > -1
    assert -51 < gaps[0.1] < -40


def test_a_server_that_turns_clients_away_is_seen() -> None:
    with toy("refuses") as server:
        figures = scenarios.storm(running(url(server), 0.05, pid=None), 500)
    assert 50 < figures["refused"] < 300


def test_a_server_that_dies_fails_the_benchmark() -> None:
    with toy("dies") as server, pytest.raises(SystemExit) as end:
        main(["hold", "--url", url(server), "--waiters", "50", "--runs", "1"])
    assert str(end.value.code) == "the server has ended, or answers no client: hold"


def test_an_unused_slot_is_seen() -> None:
    """The toy does not notice that its clients have left, and answers them."""
    with toy("none") as server:
        figures = scenarios.churn(running(url(server), 0.05, pid=None), 100)
    assert figures["slots unused"] >= 3


@pytest.mark.timeout(300)  # the peer is built first
def test_a_restart_that_releases_early_is_seen() -> None:
    """The peer in Go forgets its last release; ours holds for a window when it starts."""
    figure = "windows between two releases"
    assert scenarios.restart(peers.go, 1)[figure] < 1
    assert scenarios.restart(ours, 1)[figure] >= 1


def test_every_scenario_measures_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"IDLE_SECONDS": 0.1, "PASSTHROUGH_SECONDS": 0.1, "RELEASES": 5}
    for name, value in few.items():
        monkeypatch.setattr(scenarios, name, value)
    figures = {name: scenario(ours, 200) for name, scenario in scenarios.SCENARIOS.items()}
    for name in ("storm", "churn", "lateness"):
        assert figures[name]["ms late, min"] > -0.5
    assert figures["storm"]["refused"] == figures["churn"]["refused"] == 0
    assert figures["drain"]["exit status"] == figures["drain"]["answered"] == 0
    assert figures["passthrough"]["requests a second"] > 0


def test_the_benchmark_reports(tmp_path: Path) -> None:
    """In a process of its own, as users run it."""
    figures, chart = tmp_path / "figures.json", tmp_path / "chart.svg"
    arguments = ["hold", "--waiters=100", "--runs=1", f"--json={figures}", f"--chart={chart}"]
    command = [sys.executable, "-m", "tests.benchmark", *arguments]
    report = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "100 waiters" in report.stdout
    measured = json.loads(figures.read_text())["figures"]["hold"]["kB a waiter"]
    assert set(measured) == {"server", "floor"}
    assert "a client comes" in chart.read_text()


def test_the_help_explains_every_scenario() -> None:
    command = [sys.executable, "-m", "tests.benchmark", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert SECONDS.keys() == scenarios.SCENARIOS.keys()
    for name in scenarios.SCENARIOS:
        assert re.search(rf"(?m)^  {name} +[A-Z].*\. \([0-9]+ s\)$", text)


@pytest.mark.parametrize("option", ["--waiters", "--runs"])
@pytest.mark.parametrize("number", ["0", "-1", "1.5", "x"])
def test_a_number_that_measures_nothing_is_refused(
    option: str, number: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([f"{option}={number}"])
    assert ended.value.code == 2
    assert f"argument {option}: must be a whole number from 1, not '{number}'" in (
        capsys.readouterr().err
    )


def test_a_waiter_takes_little_memory() -> None:
    """The limits allow for another version of Python, but not for one more task per waiter.

    The measured memory is 0.87 of the floor, and 0.95 with one cancel scope and one event more.
    """

    def kilobytes(subject: Subject) -> float:
        return scenarios.hold(subject, 1000)["kB a waiter"]

    of_ours = kilobytes(ours)
    assert of_ours < 22
    assert of_ours < 0.93 * kilobytes(floor)
