"""The servers to measure: started for each measurement, or one that runs already."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from tests.harness import installed, serving

QUIET_SECONDS, QUIET_SHARE = 0.3, 0.1
"""A server is quiet if it uses less than this share of a CPU for this time."""

Subject = Callable[..., AbstractContextManager["Target"]]
"""``subject(window, **variables)`` is a context with a server to measure. A server that it
starts has this window, in seconds, and these environment variables."""


class Died(Exception):
    """The server has ended."""


@dataclass
class Target:
    """A server while it is measured. All figures are sums over its processes."""

    address: tuple[str, int]
    pids: list[int]
    window: float
    """Seconds between two of its releases."""
    process: subprocess.Popen[str] | None = None
    """Its process, if it was started here."""

    def cpu(self) -> float:
        """Return the CPU time that it has used, in seconds."""
        return self._total(_nanoseconds) / 1e9

    def memory(self) -> int:
        """Return its resident memory, in bytes."""
        return self._total(lambda process: process.memory_info().rss)

    def wake_ups(self) -> int:
        """Return how often it has gone to sleep."""
        return self._total(lambda process: process.num_ctx_switches().voluntary)

    def open_files(self) -> int:
        """Return how many descriptors it holds: one for each client that it has accepted."""
        return self._total(psutil.Process.num_fds)

    def becomes_quiet(self) -> Callable[[], bool]:
        """Return a function that tells whether the server has been quiet for a while."""
        looked_at, cpu = time.monotonic(), self.cpu()

        def is_quiet() -> bool:
            nonlocal looked_at, cpu
            passed = time.monotonic() - looked_at
            if passed < QUIET_SECONDS:
                return False
            used = self.cpu() - cpu
            looked_at, cpu = looked_at + passed, cpu + used
            return used < QUIET_SHARE * passed

        return is_quiet

    def _total(self, read: Callable[[psutil.Process], int]) -> int:
        total = 0
        for pid in self.pids:
            try:
                process = psutil.Process(pid)
                if process.status() == psutil.STATUS_ZOMBIE:
                    raise Died
                total += read(process)
            except (psutil.Error, OSError) as error:  # Linux hides a process that is ending
                raise Died from error
        return total


def _nanoseconds(process: psutil.Process) -> int:
    # psutil has CPU times only in hundredths of a second.
    threads = Path(f"/proc/{process.pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads)


@contextmanager
def ours(window: float, **variables: object) -> Iterator[Target]:
    """Start ``gateway-queue``."""
    with started(installed("gateway-queue"), window=window, **variables) as target:
        yield target


@contextmanager
def floor(window: float, **variables: object) -> Iterator[Target]:
    """Start a bare ASGI function under the same Hypercorn."""
    command = (sys.executable, "-m", "tests.benchmark.floor")
    with started(*command, window=window, **variables) as target:
        yield target


@contextmanager
def started(*command: str, window: float, **variables: object) -> Iterator[Target]:
    """Start a server by its command, with a window in seconds."""
    with serving(*command, WINDOW_SECONDS=window, **variables) as server:
        process = server.process
        yield Target(("127.0.0.1", server.port), [process.pid], window, process)


def running(url: str, window: float, pid: int | None) -> Subject:
    """Return the subject for a server that runs already.

    Args:
      url: of the server, such as ``http://127.0.0.1:5000``.
      window: seconds between two of its releases.
      pid: id of its process; None measures all processes that listen at its port.
    """
    parts = urlsplit(url)
    if not parts.hostname:
        raise SystemExit(f"--url must be http://HOST:PORT, not {url!r}")
    address = (parts.hostname, parts.port or 80)
    pids = [pid] if pid else _listening_at(address[1])
    if not pids:
        raise SystemExit(f"no process of this machine listens at port {address[1]}: name its --pid")

    @contextmanager
    def subject(_: float, **__: object) -> Iterator[Target]:
        yield Target(address, pids, window)

    return subject


def _listening_at(port: int) -> list[int]:
    return [
        connection.pid
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
        and connection.laddr
        and connection.laddr.port == port
        and connection.pid is not None
    ]
