"""The README's recipe for disgo, which needs nothing of that library, in a program of its own."""

from __future__ import annotations

import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.harness import environ, eventually, free_port, serving
from tests.libraries import identifying, recipe

PROGRAM = """package main

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"sync"
	"time"
)

RECIPE

func main() {
	patience, _ := time.ParseDuration(os.Args[1])
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	queue := &HTTPQueue{}
	fmt.Println(queue.Wait(ctx, 3))
	fmt.Scanln()
	queue.Unlock(3)
	fmt.Scanln()
}
"""


def built(folder: Path, port: int) -> str:
    """Build a program that asks for shard 3; after one line of input it unlocks, then it ends."""
    (folder / "main.go").write_text(PROGRAM.replace("RECIPE", recipe("disgo", port)))
    go = str(Path(sysconfig.get_path("purelib"), "go", "bin", "go"))
    with TemporaryDirectory() as cache:
        variables = environ(GOCACHE=cache, GOTOOLCHAIN="local", CGO_ENABLED=0)
        build = [go, "build", "-o", "wait", "main.go"]
        subprocess.run(build, cwd=folder, env=variables, check=True)
    return str(folder / "wait")


@contextmanager
def waiting(program: str, patience: str) -> Iterator[subprocess.Popen[str]]:
    """Run the program until the end of the context."""
    process = subprocess.Popen(
        [program, patience], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
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


def test_a_go_program_asks_until_its_turn_and_confirms_or_stops(tmp_path: Path) -> None:
    port = free_port()
    program = built(tmp_path, port)
    with (
        waiting(program, "1m") as process,
        serving(PORT=port, WINDOW_SECONDS=0.1, CONFIRM_SECONDS=600) as queue,
    ):
        assert printed(process) == "<nil>\n"
        assert identifying(queue) == [3]
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        eventually(lambda: identifying(queue) == [])
        assert process.poll() is None
    with (
        serving(PORT=port, WINDOW_SECONDS=3600) as queue,
        waiting(program, "500ms") as process,
    ):
        assert printed(process) == "context deadline exceeded\n"
        eventually(lambda: queue.status()["abandoned"] == 1)
