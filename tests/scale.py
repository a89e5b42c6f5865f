"""What several replicas cost one Redis: commands, CPU time, memory.

``scripts/measure-redis`` prints the table of the README.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from tests.harness import Server, allow_10_000_connections, eventually, serving
from tests.redis_server import RedisServer, redis_server

WINDOW, MARGIN = 5.0, 0.25
SHARE = 0.1
"""The part of a core that Redis may use, for the last column."""

CASES = (
    *("1:100:2000", "2:100:2000", "3:100:2000", "5:25:2000", "5:100:2000", "5:100:9000"),
    "10:100:2000",
)
SECONDS = 20.0
SETUP_SECONDS = 25.0
"""Rough time to start the processes of a case, connect the shards, and wait for releases."""


@dataclass(frozen=True)
class Case:
    """Replicas on one Redis."""

    replicas: int
    keys: int
    waiters: int

    @classmethod
    def parse(cls, text: str) -> Case:
        replicas, keys, waiters = map(int, text.split(":"))
        if not 0 < replicas <= 50 or not 0 < keys <= waiters <= 10_000:
            raise ValueError(text)
        return cls(replicas, keys, waiters)


@dataclass(frozen=True)
class Counters:
    """Counters of Redis and of its replicas at some time."""

    at: float
    commands: int
    cpu: float
    """Seconds of CPU time of the whole process. The times that Redis counts for each command are
    not CPU times, so they are too long on a busy machine."""
    releases: float

    @classmethod
    def read(cls, redis: RedisServer, servers: list[Server]) -> Counters:
        used = re.findall(r"used_cpu_(?:user|sys):([\d.]+)", redis.command("INFO", "cpu"))
        cpu = sum(map(float, used))
        return cls(time.monotonic(), redis.calls(), cpu, sum(map(released, servers)))


@dataclass(frozen=True)
class Cost:
    """The measured cost of a case."""

    case: Case
    releases: float
    """Per second."""
    commands: float
    """Per second."""
    core: float
    """The part of a core that Redis uses."""
    memory: float
    """Bytes of one waiting ticket."""

    @property
    def command(self) -> float:
        """CPU seconds of a command, on average."""
        return self.core / self.commands

    @property
    def most_keys(self) -> float:
        """How many keys one Redis serves, if each of them releases in each window."""
        return SHARE / self.core * self.releases * (WINDOW + MARGIN)


def measure(case: Case, seconds: float) -> Cost:
    """Let the shards of a case wait, and count commands and releases for some time."""
    with ExitStack() as stack:
        redis = stack.enter_context(redis_server())
        variables = {
            "REDIS_URL": redis.url,
            "MAX_CONCURRENCY": case.keys,
            "WINDOW_SECONDS": WINDOW,
            "MARGIN_SECONDS": MARGIN,
            "SESSION_START_LIMIT": 0,
        }
        servers = [stack.enter_context(serving(**variables)) for _ in range(case.replicas)]
        memory_before = used_memory(redis)
        for shard in range(case.waiters):
            servers[shard // case.keys % len(servers)].ask(shard)
        # The first releases come while shards still connect, and only at some of the replicas.
        began = sum(map(released, servers))
        eventually(lambda: sum(map(released, servers)) >= began + case.keys)
        eventually(lambda: known_places(redis) + sum(map(released, servers)) >= case.waiters)
        before = Counters.read(redis, servers)
        memory = (used_memory(redis) - memory_before) / known_places(redis)
        time.sleep(seconds)  # the time of the measurement
        after = Counters.read(redis, servers)
    passed, commands = after.at - before.at, after.commands - before.commands
    return Cost(
        case=case,
        releases=(after.releases - before.releases) / passed,
        commands=commands / passed,
        core=(after.cpu - before.cpu) / passed,
        memory=memory,
    )


def used_memory(redis: RedisServer) -> int:
    (found,) = re.findall(r"used_memory:(\d+)", redis.command("INFO", "memory"))
    return int(found)


def released(server: Server) -> float:
    """Return how many tickets a server has released."""
    text = server.get("/metrics").body.decode()
    found = re.findall(r"(?m)^gateway_queue_released_total\{.*\} (\S+)$", text)
    return sum(map(float, found))


def known_places(redis: RedisServer) -> int:
    return int(redis.command("HLEN", "{gateway-queue}:line").removeprefix(":"))


HEAD = (
    "| replicas | keys | waiting tickets | commands/s | commands per release "
    f"| CPU of a command | of one core | bytes per ticket | keys at {SHARE:.0%} |\n"
    "| " + "---: | " * 9
).rstrip()


def row(cost: Cost) -> str:
    """Write the row of a case."""
    case = cost.case
    return (
        f"| {case.replicas} | {case.keys} | {case.waiters:,} | {cost.commands:.0f} "
        f"| {cost.commands / cost.releases:.1f} | {1e6 * cost.command:.0f} µs | {cost.core:.1%} "
        f"| {cost.memory:.0f} | {cost.most_keys:,.0f} |"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="scripts/measure-redis",
        description=(
            "Measures what replicas cost one Redis, with windows of 5 s. Each case takes "
            f"about {SETUP_SECONDS:.0f} s and the time of --seconds; all of them take about "
            f"{len(CASES) * (SETUP_SECONDS + SECONDS) / 60:.0f} minutes."
        ),
    )
    parser.add_argument(
        "cases",
        nargs="*",
        type=Case.parse,
        metavar="REPLICAS:KEYS:WAITERS",
        default=[Case.parse(text) for text in CASES],
        help=f"what to measure, at most 10,000 waiting tickets (default: {' '.join(CASES)})",
    )
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="how long to count (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    allow_10_000_connections()
    print(HEAD, flush=True)
    for case in options.cases:
        print(row(measure(case, options.seconds)), flush=True)


if __name__ == "__main__":
    main()
