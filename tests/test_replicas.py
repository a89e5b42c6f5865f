"""Several replicas on one Redis, as clients see them on the wire."""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from itertools import count, pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import pytest

from gateway_queue.settings import Settings
from tests.balancer import balancing, readme_compose_file
from tests.fake_discord import playing
from tests.harness import (
    GO,
    PATIENCE,
    SLACK,
    Answer,
    Client,
    Server,
    asking,
    eventually,
    first_answers,
    installed,
    metric,
    serving,
)
from tests.redis_server import Proxy, RedisServer, redis_server

ROUND_TRIP_SECONDS = 0.5
"""Longer than any round trip to Redis, also on a busy machine: tickets that come within one round
trip can change places."""


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@contextmanager
def replicas(number: int, redis_url: str, **variables: object) -> Iterator[list[Server]]:
    """Run some replicas that share a Redis, until the end of the context."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(serving(REDIS_URL=redis_url, **variables)) for _ in range(number)
        ]


def ask_in_turn(servers: list[Server], number: int, keys: int = 1) -> list[Client]:
    """Ask for the turns of some shards, so that each replica has tickets of each key."""
    return [servers[shard // keys % len(servers)].ask(shard) for shard in range(number)]


def gaps(answers: list[tuple[int, Answer]], keys: int = 1) -> dict[int, list[float]]:
    """Return the seconds between the releases of each key. A client has the number of its shard."""
    times = defaultdict[int, list[float]](list)
    for shard, answer in answers:
        assert answer.status == 200
        times[shard % keys].append(answer.at)
    return {key: [b - a for a, b in pairwise(sorted(at))] for key, at in times.items()}


def answers_to_come(
    clients: list[Client], answers: list[tuple[int, Answer]], number: int | None = None
) -> list[tuple[int, Answer]]:
    """Wait for further answers, or for all. Return each with the number of its client."""
    left = sorted(set(range(len(clients))) - set(dict(answers)))
    come = first_answers([clients[place] for place in left], number or len(left))
    return [(left[place], answer) for place, answer in come]


def readiness(server: Server) -> tuple[int, str]:
    answer = server.get("/readyz")
    return answer.status, answer.body.decode()


def is_ready(server: Server) -> bool:
    return readiness(server)[0] == 200


def test_320_waiters_of_3_replicas_are_released_one_per_window_and_key(redis: RedisServer) -> None:
    window, keys, number = 1.0, 16, 320
    with replicas(3, redis.url, WINDOW_SECONDS=window, MAX_CONCURRENCY=keys) as servers:
        calls_before, started_at = redis.calls(), time.monotonic()
        answers = first_answers(ask_in_turn(servers, number, keys), number)
        calls = redis.calls() - calls_before

    assert sorted(shard for shard, _ in answers) == list(range(number))
    by_key = gaps(answers, keys).values()
    assert min(map(min, by_key)) >= window - SLACK
    # On an idle machine it is within 3 % of one per window. This allows for other load.
    assert max(map(median, by_key)) < 1.2 * window
    assert max(map(mean, by_key)) < 1.5 * window
    # A release takes at most three commands of each replica; a ticket takes one when it comes and
    # one when it leaves. Once per second each replica looks for releases and older places.
    looks = len(servers) * 2 * (time.monotonic() - started_at)
    assert calls <= (3 * len(servers) + 2) * number + looks


def test_no_ticket_is_overtaken_by_one_that_came_over_a_window_later(redis: RedisServer) -> None:
    window = 0.5
    with replicas(3, redis.url, WINDOW_SECONDS=window) as servers:
        came_at, clients = [], []
        for number in range(16):
            came_at.append(time.monotonic())
            clients.append(servers[number * 7 % 3].ask(number))
            time.sleep(0.1)
        order = [number for number, _ in first_answers(clients, len(clients))]

    for place, number in enumerate(order):
        latest_before = max((came_at[other] for other in order[:place]), default=0.0)
        assert latest_before - came_at[number] < window


def known_places(redis: RedisServer) -> str:
    return redis.command("HLEN", "{gateway-queue}:line")


def leave(server: Server, client: Client, redis: RedisServer) -> None:
    client.hang_up()
    eventually(lambda: server.status()["away"] == 1)


def leave_and_flush(server: Server, client: Client, redis: RedisServer) -> None:
    leave(server, client, redis)
    redis.command("FLUSHALL")
    eventually(lambda: known_places(redis) == ":2")


def stop(server: Server, client: Client, redis: RedisServer) -> None:
    server.signal(signal.SIGTERM)
    server.wait()


def die(server: Server, client: Client, redis: RedisServer) -> None:
    server.signal(signal.SIGKILL)


def shards_waiting(server: Server) -> list[int]:
    (lane,) = server.status()["lanes"]
    return [ticket["shard"] for ticket in lane["tickets"] if ticket["state"] == "waiting"]


@pytest.mark.parametrize("end", [leave, leave_and_flush, stop, die])
def test_a_shard_has_its_old_place_at_another_replica(
    redis: RedisServer, end: Callable[[Server, Client, RedisServer], None]
) -> None:
    """Both replicas notice the end before the first window opens, also on a busy machine."""
    with replicas(2, redis.url, WINDOW_SECONDS=12) as (former, other):
        client = former.ask(1)
        eventually(lambda: known_places(redis) == ":1")
        time.sleep(ROUND_TRIP_SECONDS)
        later = other.ask(2)
        eventually(lambda: known_places(redis) == ":2")
        end(former, client, redis)
        back = other.ask(1)
        eventually(lambda: shards_waiting(other) == [1, 2])
        assert [number for number, _ in first_answers([later, back], 1)] == [1]


def test_all_keys_in_redis_expire(redis: RedisServer) -> None:
    with replicas(1, redis.url, WINDOW_SECONDS=60, HOLD_ON_START="false") as (server,):
        assert server.ask(1).answer().status == 200
        server.ask(1)
        eventually(lambda: known_places(redis) == ":1")
        lasting = {f"{{gateway-queue}}:{kind}" for kind in ("state", "starts", "shards")}
        keys = lasting | {"{gateway-queue}:heads", "{gateway-queue}:line"}
        eventually(
            lambda: set(re.findall(r"\{gateway-queue\}:\w+", redis.command("KEYS", "*"))) == keys
        )
        never = ":-1"
        assert all(redis.command("TTL", key) != never for key in keys)
        assert all(int(redis.command("TTL", key).removeprefix(":")) > 86_400 for key in lasting)


def test_each_replica_shows_the_tickets_of_all(redis: RedisServer) -> None:
    with replicas(2, redis.url, WINDOW_SECONDS=60, MAX_CONCURRENCY=2) as servers:
        one, other = servers
        clients = []
        for server, shard in ((one, 0), (other, 2), (one, 4), (other, 1)):
            clients.append(server.ask(shard))
            eventually(lambda: known_places(redis) == f":{len(clients)}")
            time.sleep(ROUND_TRIP_SECONDS)
        clients.pop(0).hang_up()

        def tickets(server: Server) -> list[list[Any]]:
            lanes = server.status()["lanes"]
            return [[[t["shard"], t["state"]] for t in lane["tickets"]] for lane in lanes]

        shown = [[[0, "away"], [2, "waiting"], [4, "waiting"]], [[1, "waiting"]]]
        for server in servers:
            eventually(lambda server=server: tickets(server) == shown)  # type: ignore[misc]
        first, second = (server.status() for server in servers)
        assert (first["waiting"], first["away"]) == (second["waiting"], second["away"]) == (3, 1)
        names = [
            [t["replica"] for lane in s["lanes"] for t in lane["tickets"]] for s in (first, second)
        ]
        assert names[0] == names[1]
        assert names[0][0] == names[0][2] != names[0][1] == names[0][3]
        etas = [[t["eta"] for t in s["lanes"][0]["tickets"]] for s in (first, second)]
        for eta in etas:
            assert eta[0] is None
            assert eta[2] - eta[1] == pytest.approx(60, abs=0.01)


def test_each_replica_shows_the_shards_that_are_identifying(redis: RedisServer) -> None:
    with replicas(2, redis.url, WINDOW_SECONDS=1, MAX_CONCURRENCY=4) as (one, other):
        asked_at = time.monotonic()
        client = one.connect(asking(6, confirm=True))
        while GO not in client.received:
            client.received += client.socket.recv(65536)
        answered_at = time.monotonic()

        def lanes(server: Server) -> list[tuple[int, int | None]]:
            return [
                (lane["rate_limit_key"], lane["identifying"] and lane["identifying"]["shard"])
                for lane in server.status()["lanes"]
            ]

        assert lanes(one) == [(2, 6)]
        eventually(lambda: lanes(other) == [(2, 6)])
        known_at = time.monotonic()
        (lane,) = other.status()["lanes"]
        assert known_at - answered_at - 0.01 <= lane["identifying"]["for"]
        assert lane["identifying"]["for"] <= time.monotonic() - asked_at + 0.01
        # Not known while the connection to Redis is too slow, as it may be on a busy machine.
        eventually(lambda: other.status()["lanes"][0]["opens_in"] == pytest.approx(1, abs=0.01))
        client.hang_up()
        for server in (one, other):
            eventually(lambda server=server: lanes(server) == [])  # type: ignore[misc]


def test_the_page_of_each_replica_lists_the_held_shards_of_all(redis: RedisServer) -> None:
    settings = {"WINDOW_SECONDS": 0.1, "LOOP_FREE_STARTS": 1}
    with replicas(2, redis.url, **settings) as (one, other):
        one.ask(7).answer()
        one.ask(7)
        for server in (one, other):
            eventually(lambda server=server: held_shards(server) == ["7"])  # type: ignore[misc]


def held_shards(server: Server) -> list[str]:
    """Return the shards that the page lists as held."""
    page = Client(server.port, b"GET /events HTTP/1.1\r\nHost: queue\r\n\r\n")
    with closing(page.socket):
        while b"</main>" not in page.received:
            page.received += page.socket.recv(65536)
    text = re.sub(r"\s*\ndata:\s*", "", page.received.decode())
    row = r'<td class="number">(\d+)</td><td class="number">0</td><td><span class="badge">held<'
    return re.findall(row, text)


def test_each_replica_counts_the_starts_by_shard_of_all(redis: RedisServer) -> None:
    with replicas(2, redis.url, WINDOW_SECONDS=0.1, HOLD_ON_START="false") as servers:
        for server in (*servers, *servers, servers[0]):
            server.ask(7).answer()
        servers[1].ask(8).answer()

        def starts(server: Server, shard: int) -> int:
            status = json.loads(server.get(f"/status?shard={shard}").body)
            return int(status["shard"]["starts"])

        for server in servers:
            eventually(lambda server=server: (starts(server, 7), starts(server, 8)) == (5, 1))  # type: ignore[misc]


def test_idle_replicas_only_keep_their_connection(redis: RedisServer) -> None:
    with replicas(3, redis.url, WINDOW_SECONDS=0.5) as servers:
        for server in servers:
            server.ask(0).answer()

        def calls_in_two_seconds() -> int:
            before = redis.calls()
            time.sleep(2)  # the time of the measurement
            return redis.calls() - before

        eventually(lambda: calls_in_two_seconds() <= 3 * 3)  # after some looks at the releases


def test_a_replica_that_is_killed_delays_the_others_by_two_windows_at_most(
    redis: RedisServer,
) -> None:
    window = 1.0
    with replicas(2, redis.url, WINDOW_SECONDS=window) as (doomed, other):
        for shard in range(20):
            doomed.ask(shard)
        doomed.settle()
        survivors = [other.ask(shard) for shard in (20, 21)]
        eventually(lambda: doomed.status()["released"] >= 2)
        killed_at = time.monotonic()
        doomed.signal(signal.SIGKILL)
        first, second = (client.answer().at for client in survivors)

    assert first - killed_at < 3 * window  # the window under way, and two more
    assert window - SLACK <= second - first < 2 * window


class Fleet:
    """Shards that ask again when their connection ends, as the recipes do."""

    def __init__(self, size: int, ports: list[int]) -> None:
        self.ports = ports
        """The ports to ask one after the other; a test may change them."""
        self.released_at: list[float] = []
        self._shards = [threading.Thread(target=self._start, args=(n,)) for n in range(size)]
        for shard in self._shards:
            shard.start()

    def _start(self, shard: int) -> None:
        for attempt in count(shard):
            with suppress(OSError, AssertionError):
                client = Client(self.ports[attempt % len(self.ports)], asking(shard))
                with closing(client.socket):
                    self.released_at.append(client.answer().at)
                return
            time.sleep(0.05)

    def wait_for(self, more: int) -> None:
        """Wait until ``more`` shards have been released."""
        wanted = len(self.released_at) + more
        eventually(lambda: len(self.released_at) >= wanted)

    def shortest_gap(self) -> float:
        """Wait until all have been released, and return the least time between two."""
        for shard in self._shards:
            shard.join(PATIENCE)
        assert len(self.released_at) == len(self._shards)
        return min(b - a for a, b in pairwise(sorted(self.released_at)))


def test_restarts_one_after_the_other_lose_no_shard(redis: RedisServer) -> None:
    """More shards wait than are released while the replicas start, also on a busy machine."""
    window = 0.5
    with ExitStack() as stack:

        def start() -> Server:
            return stack.enter_context(serving(REDIS_URL=redis.url, WINDOW_SECONDS=window))

        servers = [start(), start()]
        fleet = Fleet(50, [server.port for server in servers])
        for place, server in enumerate(servers):
            fleet.wait_for(5)
            server.signal(signal.SIGTERM)
            assert server.wait() == 0
            fleet.ports[place] = start().port
        assert fleet.shortest_gap() >= window - SLACK


def addresses(servers: list[Server]) -> list[str]:
    return [f"127.0.0.1:{server.port}" for server in servers]


def test_the_balancer_of_the_readme_hides_a_replica_that_is_killed(
    redis: RedisServer, tmp_path: Path
) -> None:
    window = 0.25
    with (
        # The margin covers different delays of answers, which a balancer causes.
        replicas(2, redis.url, WINDOW_SECONDS=window, MARGIN_SECONDS=0.1) as servers,
        balancing(addresses(servers), tmp_path) as port,
    ):
        fleet = Fleet(16, [port])
        fleet.wait_for(4)
        assert all(server.status()["waiting"] for server in servers)
        servers[0].signal(signal.SIGKILL)
        assert fleet.shortest_gap() >= window - SLACK


def test_the_compose_file_of_the_readme_has_valid_services_and_settings() -> None:
    services = readme_compose_file()["services"]
    assert services.keys() == {"valkey", "replica-1", "replica-2", "balancer"}
    assert services["replica-1"] == services["replica-2"]
    variables = services["replica-1"]["environment"]
    assert Settings.from_environ(variables).redis_url == "redis://valkey:6379"


def kill_and_restart(redis: RedisServer) -> None:
    redis.kill()
    redis.start()


def pause(redis: RedisServer) -> None:
    redis.signal(signal.SIGSTOP)
    time.sleep(1.5)
    redis.signal(signal.SIGCONT)


def flush(redis: RedisServer) -> None:
    redis.command("FLUSHALL")


def lose_the_script(redis: RedisServer) -> None:
    redis.command("SCRIPT", "FLUSH")


def evict_the_state(redis: RedisServer) -> None:
    redis.command("DEL", "{gateway-queue}:state")


def evict_the_starts(redis: RedisServer) -> None:
    redis.command("DEL", "{gateway-queue}:starts")


@pytest.mark.parametrize(
    "fault",
    [kill_and_restart, pause, flush, lose_the_script, evict_the_state, evict_the_starts],
)
def test_no_failure_of_redis_makes_a_release_early_or_loses_a_ticket(
    redis: RedisServer, fault: Callable[[RedisServer], None]
) -> None:
    window = 0.3
    with replicas(2, redis.url, WINDOW_SECONDS=window, LOG_FORMAT="json") as servers:
        clients = ask_in_turn(servers, 8)
        answers = first_answers(clients, 2)
        fault(redis)
        answers += answers_to_come(clients, answers)
        assert all(map(is_ready, servers))
        # A replica looks for the releases of others once per second.
        eventually(lambda: all(server.status()["waiting"] == 0 for server in servers))

    assert min(gaps(answers)[0]) >= window - SLACK


def test_connections_that_are_cut_all_the_time_delay_no_release_by_a_lease(
    redis: RedisServer,
) -> None:
    window, number = 1.0, 8
    over = threading.Event()
    with Proxy(redis.port) as proxy, replicas(2, proxy.url, WINDOW_SECONDS=window) as servers:

        def cut() -> None:
            while not over.wait(1.4 * window):
                proxy.cut()

        cutter = threading.Thread(target=cut)
        cutter.start()
        try:
            answers = first_answers(ask_in_turn(servers, number), number)
        finally:
            over.set()
            cutter.join()

    (of_key,) = gaps(answers).values()
    assert min(of_key) >= window - SLACK
    # A lease takes 2 s. So does a window that was not reported to Redis in time.
    assert sum(of_key) / len(of_key) < 1.7 * window


def test_a_connection_that_ends_in_the_middle_of_a_decision_is_no_permission(
    redis: RedisServer,
) -> None:
    """Redis has granted the claim, but the replica does not get the answer."""
    window = 0.5
    with (
        Proxy(redis.port) as proxy,
        replicas(1, proxy.url, WINDOW_SECONDS=window) as (unlucky,),
        replicas(1, redis.url, WINDOW_SECONDS=window) as (other,),
    ):
        unlucky.ask(0).answer()
        # So that the next claim is granted: Redis closes a key for a little longer than a window.
        time.sleep(1.2 * window)
        proxy.swallows_answers_to = b"claim"
        clients = [unlucky.ask(1)]
        eventually(lambda: proxy.cuts == 1)
        assert redis.command("ZCARD", "{gateway-queue}:starts") == ":2"
        proxy.swallows_answers_to = None
        clients.append(other.ask(2))
        answers = first_answers(clients, 2)
        assert redis.command("ZCARD", "{gateway-queue}:starts") == ":3"
        metrics = unlucky.get("/metrics").body.decode()

    assert min(gaps(answers)[0]) >= window - SLACK
    assert "gateway_queue_store_errors_total 0.0" not in metrics


def test_a_promoted_replica_that_missed_the_last_write_causes_no_early_release(
    redis: RedisServer,
) -> None:
    window = 0.6
    with redis_server("--replicaof", "127.0.0.1", str(redis.port)) as standby:
        eventually(lambda: "master_link_status:up" in standby.command("INFO", "replication"))
        with (
            Proxy(redis.port) as proxy,
            replicas(2, proxy.url, WINDOW_SECONDS=window) as servers,
        ):
            clients = ask_in_turn(servers, 4)
            answers = first_answers(clients, 1)
            standby.command("REPLICAOF", "NO", "ONE")
            answers += answers_to_come(clients, answers, 1)
            proxy.target = standby.port  # as if it were promoted now, without the last release
            proxy.cut()
            answers += answers_to_come(clients, answers)

    assert min(gaps(answers)[0]) >= window - SLACK


def test_a_slow_redis_causes_no_early_release(redis: RedisServer) -> None:
    window = 2.0  # so that answers which take 0.4 s come in time on a busy machine, too
    with (
        Proxy(redis.port, delay=0.2) as proxy,
        replicas(1, proxy.url, WINDOW_SECONDS=window) as (slow,),
        replicas(1, redis.url, WINDOW_SECONDS=window) as (fast,),
    ):
        answers = first_answers(ask_in_turn([slow, fast], 4), 4)

    (of_key,) = gaps(answers).values()
    assert min(of_key) >= window - SLACK
    assert sum(of_key) / len(of_key) < 2 * window


def test_a_redis_that_is_too_slow_is_reported_and_stops_releases(redis: RedisServer) -> None:
    with (
        Proxy(redis.port, delay=0.15) as proxy,
        replicas(1, proxy.url, WINDOW_SECONDS=0.5, HOLD_ON_START="false") as (server,),
    ):
        client = server.ask(0)
        eventually(lambda: any("too slow" in line for line in server.lines))
        proxy.delay = 0.0
        client.answer()
        assert redis.command("ZCARD", "{gateway-queue}:starts") == ":1"


def test_a_redis_that_is_too_slow_to_connect_to_is_reported(redis: RedisServer) -> None:
    with (
        Proxy(redis.port, delay=1.2) as proxy,
        replicas(1, proxy.url) as (server,),
    ):
        eventually(lambda: "no connection within 2 s" in readiness(server)[1])


def store_errors(server: Server) -> float:
    return metric(server, "gateway_queue_store_errors_total")


def test_clients_of_a_replica_that_is_too_slow_ask_another_one(
    redis: RedisServer, tmp_path: Path
) -> None:
    """A round trip from one replica to Redis takes 0.6 s, and from the other one less."""
    settings = {"WINDOW_SECONDS": 1, "MARGIN_SECONDS": 0.1}  # for the balancer's delays
    with (
        Proxy(redis.port) as proxy,
        replicas(1, proxy.url, **settings) as (slow,),
        replicas(1, redis.url, **settings) as (fast,),
        balancing(addresses([slow, fast]), tmp_path) as port,
    ):
        eventually(lambda: is_ready(slow) and is_ready(fast))
        fleet = Fleet(6, [port])
        eventually(lambda: waiting_at(slow) > 0)
        proxy.delay = 0.3
        eventually(lambda: "within 0.45 s" in readiness(slow)[1])
        assert store_errors(slow) == 1
        eventually(lambda: waiting_at(slow) == 0, patience=5)
        assert is_ready(fast)
        assert fleet.shortest_gap() >= 1 - SLACK
        proxy.delay = 0.0
        eventually(lambda: is_ready(slow))


def waiting_at(server: Server) -> float:
    """Return how many clients wait at this replica; /status counts those of all replicas."""
    text = server.get("/metrics").body.decode()
    return sum(map(float, re.findall(r"(?m)^gateway_queue_waiting\{.*\} (\S+)$", text)))


def test_clients_stay_where_all_replicas_are_too_slow(redis: RedisServer) -> None:
    with (
        Proxy(redis.port, delay=0.3) as proxy,
        replicas(2, proxy.url, WINDOW_SECONDS=1) as servers,
    ):
        clients = ask_in_turn(servers, 2)
        eventually(lambda: not any(map(is_ready, servers)))
        proxy.delay = 0.0
        first_answers(clients, 2)


def test_a_wrong_password_is_reported_and_tried_again(redis: RedisServer) -> None:
    redis.command("CONFIG", "SET", "requirepass", "right")
    url = redis.url.replace("//", "//:wrong-one@")
    with replicas(1, url, WINDOW_SECONDS=0.2) as (server,):
        client = server.ask(0)
        eventually(lambda: "username-password" in readiness(server)[1])
        assert readiness(server)[0] == 503
        assert server.status()["lanes"][0]["opens_in"] is None
        eventually(lambda: any("username-password" in line for line in server.lines))
        assert redis.command("AUTH", "right") == "+OK"
        admin = redis.command("AUTH right\r\nCONFIG SET requirepass wrong-one")
        assert admin.endswith("+OK")
        assert client.answer().status == 200
        assert is_ready(server)
        assert not any("wrong-one" in line for line in server.lines)


def test_a_redis_that_is_not_there_yet_is_waited_for() -> None:
    with redis_server() as redis:
        redis.kill()
        with replicas(1, redis.url, WINDOW_SECONDS=0.2) as (server,):
            client = server.ask(0)
            eventually(lambda: readiness(server)[0] == 503)
            assert "Redis cannot be used" in readiness(server)[1]
            assert server.get("/healthz").status == 200
            redis.start()
            assert client.answer().status == 200
            assert server.status()["store"] == "redis"


def test_while_redis_is_down_no_ticket_is_released_and_none_lost(redis: RedisServer) -> None:
    window = 0.2
    with replicas(2, redis.url, WINDOW_SECONDS=window) as servers:
        clients = ask_in_turn(servers, 8)
        answers = first_answers(clients, 2)
        redis.kill()
        eventually(lambda: not any(map(is_ready, servers)))
        waiting = [server.status()["waiting"] for server in servers]
        time.sleep(5 * window)  # in which no ticket may be released
        assert [server.status()["waiting"] for server in servers] == waiting
        redis.start()
        answers += answers_to_come(clients, answers)
    assert min(gaps(answers)[0]) >= window - SLACK


def test_with_max_concurrency_0_replicas_need_no_redis() -> None:
    with replicas(1, "redis://127.0.0.1:1", MAX_CONCURRENCY=0) as (server,):
        assert is_ready(server)
        assert server.ask(0).answer().status == 200


def test_a_stop_does_not_wait_for_a_redis_that_does_not_answer(redis: RedisServer) -> None:
    with replicas(1, redis.url, WINDOW_SECONDS=0.2) as (server,):
        clients = [server.ask(shard) for shard in range(20)]
        first_answers(clients, 2)
        redis.signal(signal.SIGSTOP)
        stopped_at = time.monotonic()
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert time.monotonic() - stopped_at < 2
        assert [client for client in clients[10:] if client.rest()] == []


def test_replicas_share_a_configured_limit(redis: RedisServer) -> None:
    settings = {"WINDOW_SECONDS": 0.1, "MAX_CONCURRENCY": 3, "SESSION_START_LIMIT": 7}
    with replicas(3, redis.url, **settings) as servers:
        first_answers(ask_in_turn(servers, 30, keys=3), 7)
        eventually(lambda: all(s.status()["session_starts"]["remaining"] == 0 for s in servers))
        time.sleep(0.5)  # several windows in which no ticket may be released
        statuses = [server.status() for server in servers]

    assert sum(status["released"] for status in statuses) == 7
    assert {status["session_starts"]["source"] for status in statuses} == {"configured"}


@pytest.mark.parametrize("fault", [kill_and_restart, flush, evict_the_state, evict_the_starts])
def test_used_session_starts_count_also_after_redis_has_lost_them(
    redis: RedisServer, fault: Callable[[RedisServer], None]
) -> None:
    settings = {"WINDOW_SECONDS": 0.3, "SESSION_START_LIMIT": 5}
    with replicas(2, redis.url, **settings) as servers:
        clients = ask_in_turn(servers, 10)
        first_answers(clients, 3)
        fault(redis)
        eventually(lambda: sum(server.status()["released"] for server in servers) == 5)
        eventually(lambda: all(s.status()["session_starts"]["remaining"] == 0 for s in servers))
        time.sleep(1)  # several windows in which no ticket may be released
        assert sum(server.status()["released"] for server in servers) == 5


def test_replicas_share_what_discord_has_left(redis: RedisServer) -> None:
    limit = {"total": 1000, "remaining": 6, "reset_after": 3_600_000, "max_concurrency": 2}
    with playing(**limit) as discord:
        settings = discord.variables(WINDOW_SECONDS=0.1, HOLD_ON_START="false")
        with replicas(3, redis.url, **settings) as servers:
            first_answers(ask_in_turn(servers, 20, keys=2), 6)
            eventually(lambda: all(s.status()["session_starts"]["remaining"] == 0 for s in servers))
            time.sleep(0.5)  # several windows in which no ticket may be released
            assert sum(server.status()["released"] for server in servers) == 6


def test_replicas_share_the_releases_of_all_keys(redis: RedisServer) -> None:
    """MAX_CONCURRENCY below Discord's value: that many releases in any one window, oldest first."""
    window, most, number = 0.5, 2, 16
    with playing(max_concurrency=8) as discord:
        settings = discord.variables(
            WINDOW_SECONDS=window, MAX_CONCURRENCY=most, HOLD_ON_START="false"
        )
        with replicas(2, redis.url, **settings) as servers:
            eventually(lambda: all(map(is_ready, servers)))
            clients = []
            for shard in range(number):
                clients.append(servers[shard % 2].ask(shard))
                servers[shard % 2].settle()
            answers = first_answers(clients, number)
    times = [answer.at for _, answer in answers]
    for former, latter in zip(times, times[most:], strict=False):
        assert window - SLACK <= latter - former < 1.5 * window
    order = [shard for shard, _ in answers]
    assert all(abs(place - shard) <= most for place, shard in enumerate(order)), order


def test_replicas_share_the_loop_guard(redis: RedisServer) -> None:
    settings = {"WINDOW_SECONDS": 0.1, "LOOP_FREE_STARTS": 2}
    with replicas(2, redis.url, **settings) as (one, other):
        one.ask(7).answer()
        other.ask(7).answer()
        one.ask(7)
        # The places of the two releases may still be listed for a moment.
        eventually(lambda: [ticket["state"] for ticket in tickets_of(one)] == ["held"])
        (ticket,) = tickets_of(one)
        assert 10 < ticket["eta"] <= 15


def tickets_of(server: Server) -> list[Any]:
    return [ticket for lane in server.status()["lanes"] for ticket in lane["tickets"]]


def test_two_workers_of_hypercorn_share_their_windows(redis: RedisServer) -> None:
    window = 0.3
    command = (installed("hypercorn"), "--workers", "2", "-c", "python:gateway_queue.server")
    with serving(
        *command, "gateway_queue:app", REDIS_URL=redis.url, WINDOW_SECONDS=window
    ) as server:
        answers = first_answers([server.ask(shard) for shard in range(12)], 12)
        clients = redis.command("CLIENT", "LIST").count("lib-name=coredis") or redis.command(
            "CLIENT", "LIST"
        ).count("cmd=evalsha")

    assert clients == 2
    assert min(gaps(answers)[0]) >= window - SLACK


def test_all_keys_in_redis_begin_with_the_prefix(redis: RedisServer) -> None:
    with replicas(1, redis.url, REDIS_PREFIX="bot:7", WINDOW_SECONDS=0.1) as (server,):
        server.ask(3).answer()
        keys = redis.command("KEYS", "*").split("\r\n")[2::2]
    assert keys
    assert all(key.startswith("{bot:7}:") for key in keys)
