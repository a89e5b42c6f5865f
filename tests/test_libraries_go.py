"""The README's recipes for Go, with their libraries, against a stand-in for Discord."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from tests.fake_discord import TOKEN
from tests.harness import GO, eventually, free_port, metric, serving
from tests.libraries import code_block, identifying
from tests.libraries.go import WAIT

# The first test compiles Go's HTTP library, which takes a minute of CPU time.
pytestmark = pytest.mark.timeout(600)


@contextmanager
def waiting(port: int, patience: str) -> Iterator[subprocess.Popen[str]]:
    """Run the program that asks for shard 3 until the end of the context."""
    process = subprocess.Popen(
        [*WAIT.command(port, confirm=True), patience],
        cwd=WAIT.folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def printed(process: subprocess.Popen[str]) -> str:
    """Wait for its next line of output."""
    assert process.stdout is not None
    return process.stdout.readline()


def test_the_recipe_asks_until_its_turn_and_confirms_or_stops() -> None:
    port = free_port()
    with (
        waiting(port, "1m") as process,
        serving(PORT=port, WINDOW_SECONDS=0.1, CONFIRM_SECONDS=600) as queue,
    ):
        assert printed(process) == "<nil>\n"
        eventually(lambda: identifying(queue) == [3])
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        eventually(lambda: identifying(queue) == [])
        assert process.poll() is None
    with (
        serving(PORT=port, WINDOW_SECONDS=3600) as queue,
        waiting(port, "500ms") as process,
    ):
        assert printed(process) == "context deadline exceeded\n"
        eventually(lambda: queue.status()["abandoned"] == 1)


def test_sandwich_daemon_gets_its_answer() -> None:
    """Its module cannot be fetched, so this sends what its ``IdentifyViaURL`` sends.

    A POST with JSON, whose URL names the shard; 200 and 204 let the shard identify, and the
    response is closed at once.
    """
    found = re.search(r'NewIdentifyViaURL\("([^"]+)"', code_block("Sandwich-Daemon"))
    assert found
    body = {"shard_id": 3, "shard_count": 4, "max_concurrency": 1, "token": TOKEN}
    with serving(WINDOW_SECONDS=1, MAX_CONCURRENCY=4) as queue:
        url = found[1].replace("127.0.0.1:5000", f"127.0.0.1:{queue.port}")
        url = url.replace("{shard_id}", "3")
        assert httpx.post(url, content=json.dumps(body), timeout=None).content == GO
        assert httpx.post(url, content=json.dumps(body), timeout=None).content == GO
        assert metric(queue, 'gateway_queue_released_total{rate_limit_key="3"}') == 2
