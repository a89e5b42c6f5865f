"""The README's recipes for Node, with their libraries, against a stand-in for Discord."""

from __future__ import annotations

import dataclasses
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio

from tests.fake_discord.gateway import enforcing
from tests.harness import GO, PATIENCE, Server, eventually, free_port, serving
from tests.libraries import Script, identifying, recipe, running_bots, waiting_shards
from tests.libraries.chaos import WINDOW
from tests.libraries.node import (
    DISCORD_JS,
    DISCORDENO,
    DISCORDJS_WS,
    ERIS,
    FOLDER,
    NODE,
    OCEANIC,
)

FLEETS = {
    library.name: library for library in (DISCORD_JS, DISCORDJS_WS, DISCORDENO, OCEANIC, ERIS)
}
KEYS = 4

every_library = pytest.mark.parametrize("library", FLEETS.values(), ids=FLEETS)


def no_shard_waits_twice(queue: Server) -> bool:
    shards = waiting_shards(queue)
    return len(shards) == len(set(shards))


@pytest.mark.parametrize("library", [DISCORD_JS, DISCORDJS_WS, DISCORDENO], ids=lambda it: it.name)
def test_a_shard_whose_connection_ends_asks_anew(library: Script) -> None:
    """The other libraries ask again, too, but only after 5 s."""
    port = free_port()
    with (
        enforcing(WINDOW, max_concurrency=KEYS) as gateway,
        running_bots(library, gateway, port) as bots,
    ):
        variables = gateway.discord.variables(PORT=port, WINDOW_SECONDS=3600)
        with serving(**variables) as queue:
            bots.start(0)
            eventually(lambda: queue.status()["waiting"] > 3)
            trio.from_thread.run(gateway.reconnect_all, trio_token=gateway.trio_token)
            eventually(lambda: queue.status()["abandoned"] > 3)
            eventually(lambda: len(waiting_shards(queue)) > 3)
            eventually(lambda: no_shard_waits_twice(queue))


STOP = {
    "discord.js": "client.destroy()",
    "@discordjs/ws": "manager.destroy()",
    "discordeno": "manager.shutdown(3000, 'stop')",
    "oceanic.js": "client.disconnect(false)",
    "eris": "client.disconnect({ reconnect: false })",
}


@every_library
def test_a_bot_that_stops_leaves_the_queue(library: Script) -> None:
    port = free_port()
    stop_when_told = f"""
process.once("SIGUSR2", () => {STOP[library.name]});
setInterval(() => {{}}, 1000); // the process does not end with the bot
"""
    stopping = dataclasses.replace(library, start=stop_when_told + library.start)
    with (
        enforcing(WINDOW, max_concurrency=KEYS) as gateway,
        running_bots(stopping, gateway, port) as bots,
    ):
        variables = gateway.discord.variables(PORT=port, WINDOW_SECONDS=3600)
        with serving(**variables) as queue:
            bots.start(0)
            eventually(lambda: len(waiting_shards(queue)) > 3)
            bots.signal(0, signal.SIGUSR2)
            eventually(lambda: not waiting_shards(queue))


def test_discordeno_still_calls_the_events_of_the_bot() -> None:
    program = """
const { events } = queued({
  events: {
    message: "message",
    identified: (shard) => console.log("identified", shard.id),
    disconnected: (shard) => console.log("disconnected", shard.id),
  },
});
events.identified({ id: 3 });
events.disconnected({ id: 4 });
console.log(events.message);
"""
    with node(recipe("discordeno", 0) + program) as process:
        output, _ = process.communicate(timeout=PATIENCE)
    assert output == "identified 3\ndisconnected 4\nmessage\n"


@contextmanager
def node(program: str) -> Iterator[subprocess.Popen[str]]:
    """Run a program of Node until the end of the context."""
    process = subprocess.Popen(
        [*NODE, program],
        cwd=FOLDER,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def test_the_response_stays_open_until_the_recipe_closes_it() -> None:
    program = """
import { setFlagsFromString } from "node:v8";
import { runInNewContext } from "node:vm";
setFlagsFromString("--expose-gc");
const collectGarbage = runInNewContext("gc");
await Promise.all([0, 1, 2].map(ask));
for (let i = 0; i < 4; i++) {
  collectGarbage();
  await sleep(100);
}
console.log("collected");
process.stdin.once("data", () => [0, 1, 2].forEach(close));
"""
    with (
        serving(WINDOW_SECONDS=0.1, MAX_CONCURRENCY=3, CONFIRM_SECONDS=600) as queue,
        node(recipe("JavaScript", queue.port) + program) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "collected\n"
        assert identifying(queue) == [0, 1, 2]
        process.stdin.write("\n")
        process.stdin.flush()
        eventually(lambda: identifying(queue) == [])
        assert process.poll() is None


@contextmanager
def asking(listener: socket.socket, head: str = "") -> Iterator[subprocess.Popen[str]]:
    """Ask for shard 3 until the end of the context, at a server that the test imitates."""
    port = listener.getsockname()[1]
    listener.settimeout(PATIENCE)
    program = head + recipe("JavaScript", port) + 'await ask(3); console.log("go"); close(3);'
    with node(program) as process:
        yield process


def next_request(listener: socket.socket) -> socket.socket:
    """Wait for the next request, and return its connection."""
    connection, _ = listener.accept()
    assert connection.recv(65536).startswith(b"GET /?shard=3&confirm=true HTTP/1.1\r\n")
    return connection


def test_the_recipe_asks_again_at_once_after_nodes_own_timeout() -> None:
    shorten = """
import { Agent, setGlobalDispatcher } from "undici";
setGlobalDispatcher(new Agent({ headersTimeout: 100 }));
"""
    started = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as listener, asking(listener, shorten):
        connections = [next_request(listener) for _ in range(5)]
        waited = time.monotonic() - started
        for connection in connections:
            connection.close()
    assert waited < 15, "four errors would take 1 + 2 + 4 + 8 s"


HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
MESSAGE = b"%x\r\n%s\r\n" % (len(GO), GO)


@pytest.mark.parametrize(
    "answer",
    [b"", b"HTTP/1.1 503 Busy\r\ncontent-length: 2\r\n\r\n{}", HEAD, HEAD + b"0\r\n\r\n"],
    ids=["none", "503", "no message", "an empty message"],
)
def test_the_recipe_asks_again_a_second_after_an_error(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, asking(listener) as process:
        with next_request(listener) as first:
            first.sendall(answer)
        failed = time.monotonic()
        with next_request(listener) as second:
            assert time.monotonic() - failed > 0.9
            second.sendall(HEAD + MESSAGE)
            assert process.stdout is not None
            assert process.stdout.readline() == "go\n"
            assert second.recv(1) == b""
