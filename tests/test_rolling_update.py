"""Replicas that are stopped and started again while many shards wait."""

from __future__ import annotations

import signal
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from itertools import chain, pairwise, repeat
from pathlib import Path

import pytest

from tests.balancer import NameServer, balancing
from tests.harness import SLACK, Client, Server, asking, eventually, free_port, serving
from tests.redis_server import RedisServer, redis_server

SHARDS = 300

ASKING_SECONDS = 0.005
"""Seconds between the first requests of two shards."""

STARTING_SECONDS = 2.0
"""A replica that starts accepts connections and reads their requests at most this much later, on a
busy machine: then a shard has its old place again."""

STOPPING_SECONDS = 0.5
"""A replica that stops closes its connections at most this much later."""

WINDOW, MARGIN = 5.0, 0.25
"""Discord's window and the default margin: short windows would not make network delays shorter."""

PATIENCE = 30.0
"""Seconds after which a client gives up and asks again."""

PAUSES = (1, 2, 4, 8)
"""Seconds until a client asks again after a refusal or without an answer; then 10 each time."""

MOST_UNUSED = 2
"""Windows by which one restart may delay a key, if it takes at most RESTART_SECONDS."""

RESTART_SECONDS = 2.0
"""On a busy machine, a restart takes longer. Clients double their pauses, so they ask again after
at most twice the time for which they were refused."""


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


def serving_with(redis: RedisServer, **variables: object) -> AbstractContextManager[Server]:
    times = {"WINDOW_SECONDS": WINDOW, "MARGIN_SECONDS": MARGIN, "PLACE_SECONDS": 30}
    return serving(REDIS_URL=redis.url, **times, **variables)


class Shard(threading.Thread):
    """Asks as the README says: again at once after a timeout, and after an error with a pause."""

    def __init__(self, number: int, port: int, over: threading.Event) -> None:
        super().__init__()
        self.number = number
        self.first_asked_at = 0.0
        self.released_at = 0.0
        self._connected: list[tuple[float, float]] = []
        self._port = port
        self._over = over

    def run(self) -> None:
        pauses = chain(PAUSES, repeat(10))
        while not self.released_at and not self._over.is_set():
            try:
                self._ask()
            except TimeoutError:
                pass
            except (OSError, AssertionError):
                self._over.wait(next(pauses))

    def _ask(self) -> None:
        client = Client(self._port, asking(self.number))
        began_at = time.monotonic()
        self.first_asked_at = self.first_asked_at or began_at
        client.socket.settimeout(PATIENCE)
        with closing(client.socket):
            try:
                answer = client.answer()
                assert answer.status == 200
                self.released_at = answer.at
            finally:
                self._connected.append((began_at, time.monotonic()))

    def has_its_place(self, at: float) -> bool:
        """Return whether it had been connected for a while at some time, and stayed so."""
        return any(
            since + STARTING_SECONDS < at < until - STOPPING_SECONDS
            for since, until in self._connected
        )


class Fleet:
    """Shards that ask for the first time one after the other."""

    def __init__(self, port: int, keys: int) -> None:
        self._over = threading.Event()
        self._keys = keys
        self.shards = [Shard(number, port, self._over) for number in range(SHARDS)]
        self.restarts: list[tuple[float, float]] = []
        """When replicas were stopped, and how many seconds later others served."""

    @contextmanager
    def asking(self) -> Iterator[None]:
        try:
            for shard in self.shards:
                shard.start()
                time.sleep(ASKING_SECONDS)
            yield
        finally:
            self._over.set()

    @contextmanager
    def restart(self) -> Iterator[None]:
        """Stop replicas, and start others, in the context."""
        stopped_at = time.monotonic()
        yield
        self.restarts.append((stopped_at, time.monotonic() - stopped_at))

    def wait_for(self, part: float) -> None:
        """Wait until a part of the shards has been released."""
        eventually(lambda: len(self._released()) >= part * SHARDS, patience=60)

    def _released(self) -> list[Shard]:
        return [shard for shard in self.shards if shard.released_at]

    def check(self) -> None:
        """Check the releases that the clients have seen, when all have been released."""
        of_key = defaultdict[int, list[Shard]](list)
        for shard in sorted(self.shards, key=lambda shard: shard.released_at):
            of_key[shard.number % self._keys].append(shard)
        for released in of_key.values():
            self._check_windows([shard.released_at for shard in released])
            self._check_order(released)

    def _check_windows(self, released_at: list[float]) -> None:
        unused = defaultdict[int, float](float)
        for former, latter in pairwise(released_at):
            gap = latter - former
            assert gap >= WINDOW - SLACK
            restart = sum(stopped_at < latter for stopped_at, _ in self.restarts)
            unused[restart] += gap / (WINDOW + MARGIN) - 1
        for restart, (_, seconds) in enumerate(self.restarts, 1):
            longer = 2 * max(0.0, seconds - RESTART_SECONDS)
            assert unused[restart] <= MOST_UNUSED + longer / (WINDOW + MARGIN), seconds

    def _check_order(self, released: list[Shard]) -> None:
        for place, shard in enumerate(released):
            for later in released[place + 1 :]:
                if later.first_asked_at < shard.first_asked_at:
                    overtaken = f"shard {later.number} by shard {shard.number}"
                    assert not later.has_its_place(shard.released_at), overtaken


def stop(*servers: Server) -> None:
    for server in servers:
        server.signal(signal.SIGTERM)
    assert {server.wait() for server in servers} == {0}


def test_a_rolling_update_of_three_replicas_keeps_the_order(
    redis: RedisServer, tmp_path: Path
) -> None:
    """A third of the shards ask again after their timeout, and each restart closes connections."""
    keys, ports = SHARDS // 4, [free_port() for _ in range(3)]
    with ExitStack() as stack:

        def start(port: int) -> Server:
            variables = {"PORT": port, "MAX_CONCURRENCY": keys}
            return stack.enter_context(serving_with(redis, **variables))

        servers = [start(port) for port in ports]
        addresses = [f"127.0.0.1:{port}" for port in ports]
        balancer = stack.enter_context(balancing(addresses, tmp_path))
        fleet = Fleet(balancer, keys)
        with fleet.asking():
            for done, server in enumerate(servers, 1):
                fleet.wait_for(done / 5)
                with fleet.restart():
                    stop(server)
                    start(server.port)
            fleet.wait_for(1)
    fleet.check()


def test_a_restart_of_the_only_replica_keeps_the_order(redis: RedisServer) -> None:
    """Clients are refused meanwhile."""
    port, keys = free_port(), SHARDS // 2
    variables = {"PORT": port, "MAX_CONCURRENCY": keys}
    with ExitStack() as stack:
        server = stack.enter_context(serving_with(redis, **variables, HOLD_ON_START="false"))
        fleet = Fleet(port, keys)
        with fleet.asking():
            fleet.wait_for(1 / 2)
            with fleet.restart():
                stop(server)
                stack.enter_context(serving_with(redis, **variables))
            fleet.wait_for(1)
    fleet.check()


def test_the_order_stays_when_compose_replaces_both_replicas_at_once(
    redis: RedisServer, tmp_path: Path
) -> None:
    """``docker compose up`` stops each container, then starts another one, with another address."""
    port, keys = free_port(), SHARDS // 2
    variables = {"PORT": port, "MAX_CONCURRENCY": keys}
    with ExitStack() as stack:
        names = stack.enter_context(NameServer())

        def start(name: str, host: str, **more: object) -> Server:
            server = stack.enter_context(serving_with(redis, HOST=host, **variables, **more))
            names.hosts[name] = host
            return server

        old = [
            start("replica-1", "127.0.1.1", HOLD_ON_START="false"),
            start("replica-2", "127.0.1.2", HOLD_ON_START="false"),
        ]
        addresses = [f"{name}:{port}" for name in names.hosts]
        balancer = stack.enter_context(balancing(addresses, tmp_path, name_server=names))
        fleet = Fleet(balancer, keys)
        with fleet.asking():
            fleet.wait_for(1 / 2)
            with fleet.restart():
                names.hosts.clear()
                stop(*old)
                # Compose does not wait for one container to start the other.
                with ThreadPoolExecutor() as pool:
                    list(pool.map(start, ("replica-1", "replica-2"), ("127.0.1.3", "127.0.1.1")))
            fleet.wait_for(1)
    fleet.check()
