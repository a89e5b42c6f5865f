"""Replicas on a Redis whose primary is watched by three real sentinels."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from gateway_queue.settings import BadSetting, Settings
from gateway_queue.store.redis.servers import OVERLAP_SECONDS
from tests.harness import SLACK, Answer, Client, Server, eventually, first_answers
from tests.redis_server import RedisServer, redis_server
from tests.test_replicas import ask_in_turn, gaps, is_ready, readiness, replicas

SERVICE = "main"

WINDOW = 1.0

LEASE = 2 * WINDOW

DOWN_MILLISECONDS = 2000
"""Milliseconds until sentinels notice that a primary is down."""


@dataclass
class Watched:
    """A primary, its replicas and its sentinels."""

    primary: RedisServer
    copies: list[RedisServer]
    sentinels: list[RedisServer]

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://{hosts}/{SERVICE}"

    def named(self) -> int:
        """Return the port of the primary that most sentinels name."""
        return sorted(map(named_by, self.sentinels))[1]

    def wait_for_failover(self) -> float:
        """Wait until most sentinels name another primary, and return the time then."""
        eventually(lambda: self.named() != self.primary.port)
        return time.monotonic()


def ask_sentinel(sentinel: RedisServer, *words: str) -> list[str]:
    """Ask a sentinel about the service. It has no QUIT, which ``RedisServer.command`` sends."""
    command = ["redis-cli", "-p", str(sentinel.port), "SENTINEL", *words, SERVICE]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")


def named_by(sentinel: RedisServer) -> int:
    return int(ask_sentinel(sentinel, "GET-MASTER-ADDR-BY-NAME")[1])


def others_known(sentinel: RedisServer) -> bool:
    fields = ask_sentinel(sentinel, "MASTER")
    state = dict(zip(fields[::2], fields[1::2], strict=False))
    return state["num-slaves"] == state["num-other-sentinels"] == "2"


@pytest.fixture
def watched() -> Iterator[Watched]:
    with ExitStack() as stack, redis_server() as primary:
        leader = ("127.0.0.1", str(primary.port))
        copies = [stack.enter_context(redis_server("--replicaof", *leader)) for _ in range(2)]
        sentinels = [stack.enter_context(sentinel(primary.port)) for _ in range(3)]
        eventually(lambda: all(map(others_known, sentinels)))
        yield Watched(primary, copies, sentinels)


@contextmanager
def sentinel(primary: int) -> Iterator[RedisServer]:
    """Run a sentinel until the end of the context."""
    with TemporaryDirectory() as folder:
        file = Path(folder, "sentinel.conf")
        file.write_text(
            f"sentinel monitor {SERVICE} 127.0.0.1 {primary} 2\n"
            f"sentinel down-after-milliseconds {SERVICE} {DOWN_MILLISECONDS}\n"
            f"sentinel failover-timeout {SERVICE} 4000\n"
        )
        server = RedisServer(Path(folder), ("--sentinel",), config=file)
        server.start()
        try:
            yield server
        finally:
            with suppress(ProcessLookupError):
                server.kill()


def kill(watched: Watched) -> None:
    watched.primary.kill()


def freeze(watched: Watched) -> None:
    watched.primary.signal(signal.SIGSTOP)


def kill_with_lost_writes(watched: Watched) -> None:
    """Kill the primary when its replicas lack its last writes."""
    for copy in watched.copies:
        copy.signal(signal.SIGSTOP)
    starts = watched.primary.command("ZCARD", STARTS)
    eventually(lambda: watched.primary.command("ZCARD", STARTS) != starts)
    watched.primary.kill()
    for copy in watched.copies:
        copy.signal(signal.SIGCONT)


def keep_from_sentinels(primary: RedisServer) -> None:
    """Make a primary look down to sentinels, which cannot demote it. Clients can still use it."""
    for command in ("ping", "replicaof", "slaveof", "config"):
        primary.command("ACL", "SETUSER", "default", f"-{command}")


STARTS = "{gateway-queue}:starts"


@contextmanager
def collecting(clients: list[Client]) -> Iterator[Future[list[tuple[int, Answer]]]]:
    """Read the answers to clients while the context does other things.

    The server closes an answered connection after 5 s. If a client reads only after that, its
    answer seems to have come at that time.
    """
    with ThreadPoolExecutor(1) as executor:
        yield executor.submit(first_answers, clients, len(clients))


def released(servers: list[Server]) -> int:
    return sum(int(server.status()["released"]) for server in servers)


def wait_for_releases(servers: list[Server], more: int) -> None:
    wanted = released(servers) + more
    eventually(lambda: released(servers) >= wanted)


@pytest.mark.parametrize("fault", [kill, freeze, kill_with_lost_writes])
def test_a_failover_makes_no_shard_early_and_loses_none(
    watched: Watched, fault: Callable[[Watched], None]
) -> None:
    with (
        replicas(2, watched.url, WINDOW_SECONDS=WINDOW) as servers,
        collecting(ask_in_turn(servers, 8)) as collected,
    ):
        wait_for_releases(servers, 2)
        fault(watched)
        failed_over_at = watched.wait_for_failover()
        wait_for_releases(servers, 2)
        if fault is freeze:
            watched.primary.signal(signal.SIGCONT)  # it still acts as the primary for a while
        answers = collected.result()
        assert all(map(is_ready, servers))

    assert min(gaps(answers)[0]) >= WINDOW - SLACK
    released_at = min(answer.at for _, answer in answers if answer.at > failed_over_at)
    # A retry of the connection, and the polls of the sentinels, take one second each. Two more are
    # for a busy machine.
    assert released_at - failed_over_at < LEASE + OVERLAP_SECONDS + 4


def test_a_primary_that_sentinels_have_replaced_is_not_used(watched: Watched) -> None:
    """Replicas reach the former primary, but sentinels do not, so it still acts as the primary."""
    with (
        replicas(1, watched.url, WINDOW_SECONDS=WINDOW) as (old,),
        collecting([old.ask(shard) for shard in range(16)]) as collected,
    ):
        wait_for_releases([old], 2)
        keep_from_sentinels(watched.primary)
        watched.wait_for_failover()
        with (
            replicas(1, watched.url, WINDOW_SECONDS=WINDOW) as (new,),
            collecting([new.ask(shard) for shard in range(4)]) as others,
        ):
            answers = collected.result() + others.result()
        assert watched.primary.command("ROLE").startswith("*3\r\n$6\r\nmaster")

    times = sorted(answer.at for _, answer in answers)
    assert min(b - a for a, b in pairwise(times)) >= WINDOW - SLACK


def test_a_replica_that_was_frozen_during_a_failover_does_not_use_the_former_primary(
    watched: Watched,
) -> None:
    """It continues with old answers of the sentinels, and the former primary grants its claims."""
    with (
        replicas(2, watched.url, WINDOW_SECONDS=WINDOW) as (old, new),
        # More clients than are released until the failover.
        collecting([*ask_in_turn([old], 4), *ask_in_turn([new], 20)]) as collected,
    ):
        wait_for_releases([old], 2)
        old.process.send_signal(signal.SIGSTOP)
        keep_from_sentinels(watched.primary)
        watched.wait_for_failover()
        wait_for_releases([new], 2)
        old.process.send_signal(signal.SIGCONT)
        answers = collected.result()

    assert min(gaps(answers)[0]) >= WINDOW - SLACK


def test_without_most_sentinels_no_ticket_is_released_and_none_lost(watched: Watched) -> None:
    with (
        replicas(2, watched.url, WINDOW_SECONDS=WINDOW) as servers,
        collecting(ask_in_turn(servers, 5)) as collected,
    ):
        wait_for_releases(servers, 1)
        for one in watched.sentinels[:2]:
            one.kill()
        eventually(lambda: not any(map(is_ready, servers)))
        assert "1 of 3 sentinels name a primary of main" in readiness(servers[0])[1]
        before = released(servers)
        time.sleep(3 * WINDOW)  # in which no ticket may be released
        assert released(servers) == before
        for one in watched.sentinels[:2]:
            one.start()
        answers = collected.result()

    assert min(gaps(answers)[0]) >= WINDOW - SLACK


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://a/main",
        "redis+sentinel://a:1,b:2,10.0.0.1/main/3",
        "redis+sentinel://user:pass%40word@[::1]:26379,b/my-service.1",
        "redis+sentinel://:password@a,b/main",
    ],
)
def test_a_url_of_sentinels_is_accepted(url: str) -> None:
    assert Settings.from_environ({"REDIS_URL": url}).redis_url == url


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://a",
        "redis+sentinel://a/",
        "redis+sentinel:///main",
        "redis+sentinel://a,/main",
        "redis+sentinel://a:0/main",
        "redis+sentinel://a:70000/main",
        "redis+sentinel://a:b/main",
        "redis+sentinel://a/main/x",
        "redis+sentinel://a/main?db=1",
        "redis+sentinel://pass@a/main",
    ],
)
def test_a_wrong_url_of_sentinels_is_refused(url: str) -> None:
    with pytest.raises(BadSetting, match="REDIS_URL"):
        Settings.from_environ({"REDIS_URL": url})
