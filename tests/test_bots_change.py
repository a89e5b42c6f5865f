"""A bot whose settings change while its clients wait, on the mock clock."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import combinations

import hypothesis
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from gateway_queue.queue import Queue
from gateway_queue.queue.ticket import NotAnswered
from gateway_queue.service import Service
from gateway_queue.settings import Settings
from tests.running import TOLERANCE, WINDOW, on_mock_clock, running, service_of


@dataclass
class Release:
    """An answer, and the settings at that time."""

    shard: int
    settings: Settings
    at: float
    counts_until: float = math.inf
    """When its window ends; infinite while the shard identifies."""


class Day:
    """Clients that come, and settings that change."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.releases: list[Release] = []
        self.changes: list[tuple[float, Settings]] = []

    async def ask(self, shard: int, arrival: float, identify_seconds: float | None) -> None:
        """Ask for a turn; a client that confirms takes some time to identify."""
        await trio.sleep(arrival)
        confirm = identify_seconds is not None
        async with self._service.queue.turn(shard, confirm=confirm) as turn:
            settings = self._service.settings
            release = Release(shard, settings, trio.current_time())
            self.releases.append(release)
            if identify_seconds is None:
                margin = settings.margin_seconds
                release.counts_until = release.at + settings.window_seconds + margin
                return
            turn.answered()
            with trio.move_on_after(identify_seconds):
                await trio.sleep(turn.confirm_seconds)
            # A confirmation follows the settings at its own time.
            now, rules = trio.current_time(), self._service.settings
            release.counts_until = now + rules.window_seconds

    async def change(self, at: float, settings: Settings) -> None:
        await trio.sleep(at)
        self.changes.append((trio.current_time(), settings))
        self._service.change(settings)

    def check(self) -> None:
        """Check that no release came early."""
        for first, then in combinations(sorted(self.releases, key=lambda one: one.at), 2):
            if share_a_key(first, then):
                assert then.at >= first.counts_until - TOLERANCE, (first, then)
        for at, settings in self.changes:
            hold = settings.window_seconds + settings.margin_seconds
            for release in self.releases:
                assert not at + TOLERANCE < release.at < at + hold - TOLERANCE, (at, release)


def share_a_key(first: Release, then: Release) -> bool:
    """Return whether some shard has the key of both releases, each under its own settings."""
    former, later = first.settings.max_concurrency or 1, then.settings.max_concurrency or 1
    return (first.shard % former - then.shard % later) % math.gcd(former, later) == 0


settings_of_a_bot = st.builds(
    Settings,
    window_seconds=st.sampled_from([2.0, 5.0]),
    margin_seconds=st.sampled_from([0.0, 0.25]),
    max_concurrency=st.sampled_from([1, 2, 4]),
    place_seconds=st.sampled_from([0.0, 30.0]),
    session_start_limit=st.sampled_from([None, 0]),
    loop_free_starts=st.just(0),
    hold_on_start=st.booleans(),
    confirm_seconds=st.sampled_from([4.0, 15.0]),
)
times = st.floats(0, 60)


@given(
    settings_of_a_bot,
    st.lists(st.tuples(st.integers(0, 7), times, st.none() | st.floats(0, 3)), max_size=20),
    st.lists(st.tuples(times, settings_of_a_bot), max_size=6),
)
@hypothesis.settings(deadline=None)
def test_a_change_makes_no_release_early_and_loses_no_ticket(
    settings: Settings,
    clients: list[tuple[int, float, float | None]],
    changes: list[tuple[float, Settings]],
) -> None:
    async def main() -> None:
        service = service_of(settings)
        async with trio.open_nursery() as nursery:
            await nursery.start(service.run)
            day = Day(service)
            with trio.fail_after(10_000):
                async with trio.open_nursery() as players:
                    for client in clients:
                        players.start_soon(day.ask, *client)
                    for change in changes:
                        players.start_soon(day.change, *change)
            assert len(day.releases) == len(clients)
            assert len(service.queue) == 0
            day.check()
            nursery.cancel_scope.cancel()

    on_mock_clock(main)


async def test_when_max_concurrency_becomes_0_waiting_clients_are_closed(
    autojump_clock: MockClock,
) -> None:
    """They ask again, and with max_concurrency 0 the next request is answered at once."""
    service = service_of(Settings(window_seconds=3600, place_seconds=30))
    closed: list[int] = []

    async def ask(shard: int) -> None:
        with suppress(NotAnswered):
            async with service.queue.turn(shard):
                raise AssertionError
        closed.append(shard)

    async with trio.open_nursery() as nursery:
        await nursery.start(service.run)
        async with trio.open_nursery() as clients:
            for shard in (1, 1, 2):
                clients.start_soon(ask, shard)
            await trio.sleep(1)
            service.change(replace(service.settings, max_concurrency=0))
        assert sorted(closed) == [1, 1, 2]
        async with service.queue.turn(1):
            pass
        assert (len(service.queue), service.queue.lanes) == (0, {})
        service.change(replace(service.settings, max_concurrency=2))
        start = trio.current_time()
        async with service.queue.turn(1):
            assert trio.current_time() - start >= 3600
        nursery.cancel_scope.cancel()


async def test_a_limit_over_all_keys_can_come_and_go(autojump_clock: MockClock) -> None:
    released: list[float] = []

    async def ask(queue: Queue, shard: int) -> None:
        async with queue.turn(shard):
            released.append(trio.current_time())

    async with running(keys=4) as queue, trio.open_nursery() as nursery:
        rules = replace(queue.store.rules, releases_per_window=1)
        start = trio.current_time()
        queue.change_rules(rules)
        for shard in range(4):
            nursery.start_soon(ask, queue, shard)
        await trio.sleep(2.5 * WINDOW)
        assert len(released) == 2
        assert released[1] - released[0] >= WINDOW
        assert released[0] - start >= WINDOW
        queue.change_rules(replace(rules, releases_per_window=None))
        await trio.sleep(1.5 * WINDOW)
        assert len(released) == 4
        assert released[3] - released[2] < WINDOW / 2


async def test_a_higher_limit_of_session_starts_counts_at_once(autojump_clock: MockClock) -> None:
    async with running(session_start_limit=1) as queue:
        async with queue.turn(1):
            start = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_for_turn, queue, 2)
            await trio.sleep(3 * WINDOW)
            rules = replace(queue.store.rules, session_start_limit=2)
            queue.change_rules(rules)
        assert trio.current_time() - start <= 4 * WINDOW + TOLERANCE


async def wait_for_turn(queue: Queue, shard: int) -> None:
    async with queue.turn(shard):
        pass
