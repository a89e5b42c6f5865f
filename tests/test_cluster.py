"""Replicas on a cluster of real Redis nodes."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from gateway_queue.settings import hash_tag
from tests.harness import SLACK, eventually
from tests.redis_server import RedisServer, redis_server
from tests.test_replicas import ask_in_turn, gaps, is_ready, replicas
from tests.test_sentinel import collecting, wait_for_releases

WINDOW = 1.0

LEASE = 2 * WINDOW

TIMEOUT_MILLISECONDS = 2000
"""Milliseconds until nodes notice that another node is down."""

KEYS = "{gateway-queue}"


@dataclass
class Cluster:
    """Three nodes, and a replica of the node that has the keys."""

    owner: RedisServer
    others: list[RedisServer]
    copy: RedisServer

    def slot(self) -> int:
        return int(self.owner.command("CLUSTER", "KEYSLOT", KEYS).removeprefix(":"))

    def move_keys(self, target: RedisServer) -> None:
        """Move the keys to another node, as a resharding does."""
        slot, source = str(self.slot()), self.owner
        target.command("CLUSTER", "SETSLOT", slot, "IMPORTING", node_id(source))
        source.command("CLUSTER", "SETSLOT", slot, "MIGRATING", node_id(target))
        while keys := re.findall(
            r"(?m)^([^*$\s]+)\r?$", source.command("CLUSTER", "GETKEYSINSLOT", slot, "10")
        ):
            to = ("127.0.0.1", str(target.port), '""', "0", "5000", "KEYS", *keys)
            assert "ERR" not in source.command("MIGRATE", *to)
        for node in (target, source, *self.others):
            node.command("CLUSTER", "SETSLOT", slot, "NODE", node_id(target))


def node_id(node: RedisServer) -> str:
    return str(re.findall(r"\b[0-9a-f]{40}\b", node.command("CLUSTER", "MYID"))[0])


def role(node: RedisServer) -> str:
    return str(re.findall(r"role:(\w+)", node.command("INFO", "replication"))[0])


def cluster_tool(*words: str) -> None:
    subprocess.run(["redis-cli", "--cluster", *words], check=True, stdout=subprocess.DEVNULL)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    options = ("--cluster-enabled", "yes", "--cluster-node-timeout", str(TIMEOUT_MILLISECONDS))
    with ExitStack() as stack:
        nodes = [stack.enter_context(redis_server(*options)) for _ in range(4)]
        *masters, copy = nodes
        addresses = [f"127.0.0.1:{node.port}" for node in nodes]
        cluster_tool("create", *addresses[:3], "--cluster-yes")
        eventually(lambda: all("cluster_state:ok" in state(node) for node in masters))
        slots = [node.command("GET", KEYS) for node in masters]
        (owner,) = [node for node, answer in zip(masters, slots, strict=True) if answer == "$-1"]
        primary = ("--cluster-slave", "--cluster-master-id", node_id(owner))
        cluster_tool("add-node", addresses[3], addresses[0], *primary)
        eventually(lambda: "master_link_status:up" in copy.command("INFO", "replication"))
        yield Cluster(owner, [node for node in masters if node is not owner], copy)


def state(node: RedisServer) -> str:
    return node.command("CLUSTER", "INFO")


def test_the_keys_are_found_from_every_node_and_after_they_have_moved(cluster: Cluster) -> None:
    with ExitStack() as stack:
        servers = [
            stack.enter_context(replicas(1, node.url, WINDOW_SECONDS=WINDOW))[0]
            for node in (*cluster.others, cluster.owner)
        ]
        collected = stack.enter_context(collecting(ask_in_turn(servers, 9)))
        wait_for_releases(servers, 3)
        cluster.move_keys(cluster.others[0])
        answers = collected.result()
        assert all(map(is_ready, servers))
        assert cluster.others[0].command("EXISTS", f"{KEYS}:state") == ":1"

    assert min(gaps(answers)[0]) >= WINDOW - SLACK
    assert max(gaps(answers)[0]) < LEASE + 4  # 1 of the 4 s is for a busy machine


def test_a_failover_of_the_node_with_the_keys_makes_no_shard_early_and_loses_none(
    cluster: Cluster,
) -> None:
    """The URL of the replicas leads to the node that is killed."""
    with (
        replicas(2, cluster.owner.url, WINDOW_SECONDS=WINDOW) as servers,
        collecting(ask_in_turn(servers, 8)) as collected,
    ):
        wait_for_releases(servers, 3)
        cluster.owner.kill()
        eventually(lambda: role(cluster.copy) == "master")
        answers = collected.result()
        assert all(map(is_ready, servers))
        cluster.owner.start()  # the end of the fixture kills it

    assert min(gaps(answers)[0]) >= WINDOW - SLACK
    # A failover takes two timeouts of a node or less. A reconnection takes up to 1 s per node.
    assert max(gaps(answers)[0]) < 2 * TIMEOUT_MILLISECONDS / 1000 + LEASE + 5


@pytest.mark.parametrize(
    ("prefix", "tagged"),
    [
        ("gateway-queue", "{gateway-queue}"),
        ("{bots}:a", "{bots}:a"),
        ("a{b}c", "a{b}c"),
        ("a{}b", "{a{}b}"),
        ("{}{b}", "{{}{b}}"),
    ],
)
def test_a_prefix_has_one_hash_tag(prefix: str, tagged: str) -> None:
    assert hash_tag(prefix) == tagged
