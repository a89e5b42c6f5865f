"""Fleets of bots: real libraries in processes of their own, with the recipes of the README."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO, Protocol

from tests.fake_discord import TOKEN
from tests.fake_discord.gateway import Gateway
from tests.harness import README, Server, environ, metric

HERE = Path(__file__).parent
RECIPES = README.parent / "gateway_queue" / "recipes"
"""Files that users copy next to their bots."""
SHARDS, PROCESSES = 24, 4
QUEUE_IN_RECIPES = "http://127.0.0.1:5000"
JAVASCRIPT = {"discord.js", "@discordjs/ws", "discordeno", "oceanic.js", "eris"}
"""The recipes that start with the block for JavaScript."""


def recipe(library: str, port: int, *, confirm: bool = True) -> str:
    """Return the README's recipe for a library, for a queue on this port.

    Args:
      library: its name in the README.
      port: of the queue.
      confirm: whether shards confirm; if not, they ask for ordinary tickets in the same way.
    """
    titles = ("JavaScript", library) if library in JAVASCRIPT else (library,)
    code = "\n".join(map(code_block, titles))
    assert QUEUE_IN_RECIPES in code, library
    code = code.replace(QUEUE_IN_RECIPES, f"http://127.0.0.1:{port}")
    return code if confirm else without_confirmation(code)


def without_confirmation(text: str) -> str:
    """Return a recipe whose tickets are ordinary ones."""
    return re.sub(r'(confirm(?:=|": "))true', r"\1false", text)


def code_block(title: str) -> str:
    """Return the first block of code below a bold title in the README."""
    block = rf"^\*\*{re.escape(title)}\*\*.*?^```\w+\n(.*?)^```"
    found = re.search(block, README.read_text(), re.MULTILINE | re.DOTALL)
    assert found, title
    return found[1]


def identifying(queue: Server) -> list[int]:
    """Return the shards that have their answer and have not confirmed it."""
    lanes = queue.status()["lanes"]
    return [lane["identifying"]["shard"] for lane in lanes if lane["identifying"]]


def waiting_shards(queue: Server) -> list[int]:
    """Return the shards whose clients wait."""
    tickets = (ticket for lane in queue.status()["lanes"] for ticket in lane["tickets"])
    return [ticket["shard"] for ticket in tickets if ticket["state"] == "waiting"]


def all_are_confirmed(queue: Server) -> bool:
    """Tell whether each release was for a confirmed ticket, and its response has been closed."""
    confirmed = metric(queue, "gateway_queue_identify_seconds_count")
    return confirmed == queue.status()["released"] and confirmed > 0


def slots_wasted(queue: Server, window: float) -> int:
    """Return how many slots passed unused while a client waited that could have been released.

    Args:
      queue: the server.
      window: in seconds, one of the buckets of the metric.
    """
    in_time = metric(queue, rf'gateway_queue_lateness_seconds_bucket\{{le="{window}"\}}')
    return int(queue.status()["released"] - in_time)


class Library(Protocol):
    """How to run a bot on a library. The rest is in the environment, see :meth:`Bots.start`."""

    @property
    def name(self) -> str:
        """Its name in the README."""

    @property
    def folder(self) -> Path:
        """Where its processes start."""

    def command(self, port: int | None, *, confirm: bool) -> Sequence[str]:
        """Return what starts a process.

        Args:
          port: of the queue; None for no queue.
          confirm: see :func:`recipe`.
        """


@dataclass(frozen=True)
class Script:
    """A bot as text that an interpreter runs."""

    name: str
    interpreter: tuple[str, ...]
    without_recipe: str
    """Replaces the recipe in a bot that uses no queue."""
    start: str
    """Code that follows: it connects the bot to the stand-in, and starts its shards."""
    folder: Path = HERE

    def command(self, port: int | None, *, confirm: bool) -> Sequence[str]:
        head = self.without_recipe if port is None else recipe(self.name, port, confirm=confirm)
        return [*self.interpreter, head + self.start]


class Bots:
    """The processes of a fleet.

    Args:
      library: of all bots.
      gateway: where their shards start sessions.
      command: starts a process.
      folder: with the files that users copy next to their bots.
      log: receives their output.
    """

    def __init__(
        self,
        library: Library,
        gateway: Gateway,
        command: Sequence[str],
        folder: str,
        log: IO[bytes],
    ) -> None:
        self._library = library
        self._gateway = gateway
        self._command = command
        self._folder = folder
        self._log = log
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def start_all(self) -> None:
        for number in range(PROCESSES):
            self.start(number)

    def start(self, number: int) -> None:
        """Start one process, with its part of the shards."""
        shards = range(SHARDS)[number * SHARDS // PROCESSES : (number + 1) * SHARDS // PROCESSES]
        self._processes[number] = subprocess.Popen(
            self._command,
            cwd=self._library.folder,
            env=environ(
                PYTHONPATH=self._folder,
                API=self._gateway.discord.url,
                GATEWAY=self._gateway.discord.gateway_url,
                TOKEN=TOKEN,
                SHARDS=json.dumps(list(shards)),
                SHARD_COUNT=SHARDS,
                MAX_CONCURRENCY=self._gateway.discord.max_concurrency,
            ),
            stdout=self._log,
            stderr=self._log,
        )

    def kill(self, number: int) -> None:
        """End one process as a crash would."""
        process = self._processes.pop(number)
        process.kill()
        process.wait()

    def signal(self, number: int, what: signal.Signals) -> None:
        """Send a signal to one process."""
        self._processes[number].send_signal(what)

    def kill_all(self) -> None:
        for number in list(self._processes):
            self.kill(number)


@contextmanager
def running_bots(
    library: Library, gateway: Gateway, port: int | None, *, confirm: bool = True
) -> Iterator[Bots]:
    """Return a fleet. The end of the context kills it, and prints its output after an error.

    Args:
      library: see :class:`Bots`.
      gateway: see :class:`Bots`.
      port: of the queue; None for no queue.
      confirm: see :func:`recipe`.
    """
    command = library.command(port, confirm=confirm)
    with TemporaryDirectory() as folder, TemporaryFile() as log:
        for file in RECIPES.glob("*.py"):
            text = file.read_text()
            copy = Path(folder, file.name)
            copy.write_text(text if confirm else without_confirmation(text))
        bots = Bots(library, gateway, command, folder, log)
        try:
            yield bots
        except BaseException:
            log.seek(0)
            print(log.read().decode(errors="replace")[-20_000:])
            raise
        finally:
            bots.kill_all()
