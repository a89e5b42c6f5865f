"""The simulation of HTTP: its connections behave as real ones, and a seed repeats exactly."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from gateway_queue.settings import Settings
from tests.exploration.wire import WireReplica, repeatable
from tests.exploration.wire_clients import Http1Client, Http2Client, Moment, WireTicket
from tests.exploration.wire_run import explore

WINDOW = 5.0
CONFIRM = 10.0

FIXED_SEEDS = (2, 6, 10, 11, 20, 106, 153, 264, 321, 385, 466, 728, 2039, 3064, 3831, 9200240)
"""Seeds that have found a fault. Add each new one."""

SEEDS_OF_SEVERAL_BOTS = (3, 7, 21, 38)

SECONDS = 15.0
"""How many seconds to try fresh seeds."""


class Fleet:
    """A replica, its clients, and what happened."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.wrong: list[str] = []
        self.replica = WireReplica(
            Settings(
                window_seconds=WINDOW,
                margin_seconds=0,
                confirm_seconds=CONFIRM,
                hold_on_start=False,
                max_concurrency=2,
            )
        )
        self.nursery: trio.Nursery

    def watch(self, ticket: WireTicket, moment: Moment) -> None:
        self.lines.append(f"{trio.current_time():.6f} {ticket.name} {ticket.shard} {moment}")

    def http1(self, **options: Any) -> Http1Client:
        client = Http1Client(self.replica, "h1", self.watch, self.wrong.append, **options)
        self.nursery.start_soon(client.run)
        return client

    def http2(self, **options: Any) -> Http2Client:
        client = Http2Client(self.replica, "h2", self.watch, self.wrong.append, **options)
        self.nursery.start_soon(client.run)
        return client


def play(story: Callable[[Fleet], Awaitable[None]], seed: int = 0) -> Fleet:
    """Run a story on the mock clock."""
    fleet = Fleet()

    async def main() -> None:
        async with trio.open_nursery() as outer:
            await outer.start(fleet.replica.run)
            async with trio.open_nursery() as fleet.nursery:
                await story(fleet)
                fleet.nursery.cancel_scope.cancel()
            fleet.replica.kill()

    with repeatable(seed):
        trio.run(main, clock=MockClock(autojump_threshold=0))
    return fleet


async def ask_in_turn(fleet: Fleet, tickets: list[WireTicket]) -> None:
    """Ask for 16 shards of both keys one after the other, 8 over each protocol."""
    shared = fleet.http2()
    for shard in range(16):
        client = (fleet.http1(), fleet.http1(), fleet.http2(), shared)[shard % 4]
        tickets.append(client.ask(shard))
        await trio.sleep(0.001)


def test_each_key_releases_one_per_window_in_order() -> None:
    tickets: list[WireTicket] = []

    async def story(fleet: Fleet) -> None:
        await ask_in_turn(fleet, tickets)
        for ticket in tickets:
            await ticket.ended.wait()

    fleet = play(story)
    assert not fleet.wrong
    for key in (0, 1):
        times = [ticket.last_at for ticket in tickets[key::2]]
        assert times == pytest.approx([times[0] + WINDOW * number for number in range(8)])


def test_a_hang_up_passes_the_slot_on() -> None:
    tickets: list[WireTicket] = []

    async def story(fleet: Fleet) -> None:
        await fleet.http1().ask(0).ended.wait()
        hang_ups: list[Callable[[], None]] = []
        for name in ("close", "reset", "half_close"):
            for client in (fleet.http1(), fleet.http2()):
                client.ask(2)
                hang_ups.append(getattr(client, name))
        await trio.sleep(0.001)
        shared = fleet.http2()
        hang_ups.append(partial(shared.reset_stream, shared.ask(4)))
        tickets.append(shared.ask(6))
        await trio.sleep(1)
        for hang_up in hang_ups:
            hang_up()
        await tickets[0].ended.wait()

    fleet = play(story)
    assert not fleet.wrong
    assert tickets[0].last_at == pytest.approx(WINDOW)


def test_a_pipelined_request_waits_for_the_one_before() -> None:
    async def story(fleet: Fleet) -> None:
        client = fleet.http1()
        first, second = client.ask(0, hold_back=5), client.ask(0)
        await trio.sleep(1)
        client.send_rest()
        await second.ended.wait()
        assert (first.last_at, second.last_at) == (1, 1 + WINDOW)

    assert not play(story).wrong


def test_a_slow_reader_is_closed_and_costs_its_slot() -> None:
    async def story(fleet: Fleet) -> None:
        slow = fleet.http1(capacity=10, pace=(1, 0.5)).ask(0)
        await trio.sleep(0.1)
        after = fleet.http1().ask(0)
        await after.ended.wait()
        assert slow.first_at == 0
        assert slow.last_at > after.last_at > WINDOW
        assert 0 < slow.closed_at < 1

    assert not play(story).wrong


def test_a_closed_flow_control_window_holds_the_body_back() -> None:
    async def story(fleet: Fleet) -> None:
        client = fleet.http2(window=0)
        ticket = client.ask(0)
        await trio.sleep(0.5)
        client.open_window(ticket)
        await ticket.ended.wait()
        assert (ticket.first_at, ticket.body_at) == (0, 0.5)

    assert not play(story).wrong


@pytest.mark.parametrize("end", ["kill", "stop"])
def test_a_replica_that_ends_closes_every_connection(end: str) -> None:
    async def story(fleet: Fleet) -> None:
        tickets = [fleet.http1().ask(0), fleet.http1().ask(0), fleet.http2().ask(0)]
        await trio.sleep(1)
        if end == "kill":
            fleet.replica.kill()
        else:
            await fleet.replica.stop()
        for ticket in tickets:
            await ticket.ended.wait()
        await fleet.replica.ended.wait()
        assert sorted(ticket.is_answered for ticket in tickets) == [False, False, True]
        with pytest.raises(ConnectionRefusedError):
            fleet.http1()

    assert not play(story).wrong


def test_a_frozen_replica_answers_when_it_goes_on() -> None:
    async def story(fleet: Fleet) -> None:
        fleet.replica.freeze()
        ticket = fleet.http1().ask(0)
        await trio.sleep(3)
        fleet.replica.thaw()
        await ticket.ended.wait()
        assert ticket.last_at == 3

    assert not play(story).wrong


@pytest.mark.simulation
def test_a_seed_repeats_itself() -> None:
    def history(hash_seed: str) -> str:
        command = [sys.executable, "-m", "tests.exploration", "--http", "--replay", "7"]
        environ = {**os.environ, "PYTHONHASHSEED": hash_seed}
        return subprocess.run(
            command, env=environ, capture_output=True, text=True, check=True
        ).stdout

    assert explore(7).lines == explore(7).lines != explore(8).lines
    assert history("1") == history("2")


@pytest.mark.simulation
@pytest.mark.parametrize("seed", FIXED_SEEDS)
def test_rules_hold_with_fixed_seed(seed: int) -> None:
    assert not explore(seed).wrong, f"scripts/explore --http --replay {seed}"


@pytest.mark.simulation
@pytest.mark.parametrize("seed", SEEDS_OF_SEVERAL_BOTS)
def test_rules_hold_for_each_of_several_bots(seed: int) -> None:
    history = explore(seed)
    assert all(record.tickets for record in history.records)
    assert len(history.records) > 1
    assert not history.wrong, f"scripts/explore --http --replay {seed}"


@pytest.mark.simulation
def test_rules_hold_with_fresh_seeds() -> None:
    seed = random.SystemRandom().randrange(10**6, 10**9)
    ends_at = time.monotonic() + SECONDS
    while time.monotonic() < ends_at:
        assert not explore(seed).wrong, f"scripts/explore --http --replay {seed}"
        seed += 1


@pytest.mark.parametrize("protocol", ["HTTP/1.0", "HTTP/1.1", "HTTP/2"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_response_without_a_confirmation_ends_when_its_time_is_over(
    protocol: str, method: str
) -> None:
    async def story(fleet: Fleet) -> None:
        client = fleet.http2() if protocol == "HTTP/2" else fleet.http1(version=protocol[5:])
        ticket = client.ask(0, confirm=True, method=method)
        await trio.sleep(0.001)
        after = fleet.http1().ask(0)
        await after.ended.wait()
        assert ticket.body_at == 0
        if (protocol, method) != ("HTTP/1.1", "HEAD"):  # its end cannot be seen
            assert ticket.last_at == CONFIRM
        assert after.last_at == CONFIRM + WINDOW

    assert not play(story).wrong
