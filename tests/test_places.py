"""Places: a shard that disconnects and asks again keeps its place in the queue."""

from __future__ import annotations

import gc
import math
import sys
from dataclasses import dataclass
from itertools import count, pairwise

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs
from trio.testing import MockClock, wait_all_tasks_blocked

from gateway_queue.queue import Queue, overview
from tests import place_simulation
from tests.harness import README
from tests.running import TOLERANCE, WINDOW, on_mock_clock, running

KEPT = 30.0
BRIEFLY_KEPT = 8.0


@dataclass(frozen=True)
class Visit:
    """One request. All times are in seconds, and no two are the same."""

    arrives: float
    leaves: float
    shard: int | None


def at_odd_times(visits: list[tuple[int, int | None, int | None]]) -> list[Visit]:
    """Make all times different, so that no result depends on the order of simultaneous events."""
    return [
        Visit(
            arrives=arrives + number * 1e-3 + 1e-4,
            leaves=math.inf if stays is None else arrives + stays + number * 1e-3 + 5e-4,
            shard=shard,
        )
        for number, (arrives, stays, shard) in enumerate(visits)
    ]


visits = st.tuples(
    st.integers(0, 60), st.none() | st.integers(0, 12), st.none() | st.integers(0, 2)
)
histories = st.lists(visits, min_size=10, max_size=60).map(at_odd_times)


def expected_releases(visits: list[Visit]) -> list[tuple[float, Visit]]:
    """Calculate when each request is released, with one key."""
    numbers = count()
    here: dict[Visit, int] = {}
    away: dict[int, tuple[int, float]] = {}  # number: shard, kept until
    releases: list[tuple[float, Visit]] = []
    arrivals = [(visit.arrives, "arrives", visit) for visit in visits]
    departures = [(visit.leaves, "leaves", visit) for visit in visits]
    now = opens_at = 0.0
    for at, event, visit in sorted(arrivals + departures, key=lambda event: event[0]):
        while here and opens_at < at:
            first = min(here, key=lambda one: here[one])
            releases.append((max(now, opens_at), first))
            opens_at = releases[-1][0] + WINDOW
            del here[first]
        now = at
        away = {number: place for number, place in away.items() if place[1] > now}
        mine = [number for number, (shard, _) in away.items() if shard == visit.shard]
        if event == "arrives":
            here[visit] = min(mine, default=next(numbers))
            away.pop(here[visit], None)
        elif visit in here:
            if visit.shard is not None:
                last = max((v for v in here if v.shard == visit.shard), key=lambda v: here[v])
                here[visit], here[last] = here[last], here[visit]
                away[here[visit]] = (visit.shard, now + BRIEFLY_KEPT)
            del here[visit]
    return releases


@given(histories)
def test_every_history_matches_the_model(visits: list[Visit]) -> None:
    releases: list[tuple[float, Visit]] = []

    async def act(queue: Queue, visit: Visit) -> None:
        await trio.sleep_until(visit.arrives)
        with trio.move_on_at(visit.leaves):
            async with queue.turn(visit.shard):
                releases.append((trio.current_time(), visit))

    async def main() -> None:
        async with (
            running(place_seconds=BRIEFLY_KEPT) as queue,
            trio.open_nursery() as nursery,
        ):
            for visit in visits:
                nursery.start_soon(act, queue, visit)

    on_mock_clock(main)

    expected = expected_releases(visits)
    assert [visit for _, visit in releases] == [visit for _, visit in expected]
    assert [at for at, _ in releases] == pytest.approx([at for at, _ in expected], abs=TOLERANCE)


class Line:
    """Clients of a queue, and the order in which they are released."""

    def __init__(self, queue: Queue, nursery: trio.Nursery) -> None:
        self.queue = queue
        self.order: list[object] = []
        self._nursery = nursery

    async def join(self, shard: int | None, name: object = None) -> trio.CancelScope:
        """Ask for a slot. To disconnect, cancel the returned scope."""
        scope = trio.CancelScope()

        async def wait() -> None:
            with scope:
                async with self.queue.turn(shard):
                    self.order.append(shard if name is None else name)

        self._nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        return scope


async def test_an_away_shard_is_passed_and_its_place_stays_in_front(
    autojump_clock: MockClock,
) -> None:
    async with running(hold=True, place_seconds=KEPT) as queue, trio.open_nursery() as nursery:
        line = Line(queue, nursery)
        away, *_ = [await line.join(shard) for shard in range(1, 6)]
        away.cancel()
        await trio.sleep(2.2 * WINDOW)
        assert line.order == [2, 3]
        (lane,) = await overview.lanes(queue)
        assert [(t.shard, t.state, t.position) for t in lane.tickets] == [
            *((1, "away", 1), (4, "waiting", 2), (5, "waiting", 3)),
        ]
        assert lane.tickets[0].eta == math.inf
        assert lane.tickets[0].waited == pytest.approx(2.2 * WINDOW)
        assert lane.tickets[1].eta == pytest.approx(0.8 * WINDOW)
        assert lane.waiting == len(queue) == 2
        await line.join(1)
        await trio.sleep(0.9 * WINDOW)
        assert line.order == [2, 3, 1]
    assert line.order == [2, 3, 1, 4, 5]


async def test_a_shard_that_returns_at_its_turn_is_released_once(
    autojump_clock: MockClock,
) -> None:
    """Its old connection is chosen, the new one arrives, and then the old one is closed."""
    answered = []
    seen_to_go = trio.Event()

    async def old(queue: Queue, scope: trio.CancelScope) -> None:
        with scope:
            async with queue.turn(7):
                await seen_to_go.wait()
                scope.cancel()
                await trio.lowlevel.checkpoint()

    async def client(queue: Queue, shard: int) -> None:
        async with queue.turn(shard):
            answered.append((shard, trio.current_time()))

    async with (
        running(hold=True, place_seconds=KEPT) as queue,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(old, queue, trio.CancelScope())
        await wait_all_tasks_blocked()
        for shard in range(3):
            nursery.start_soon(client, queue, shard)
            await wait_all_tasks_blocked()
        await trio.sleep(WINDOW)
        nursery.start_soon(client, queue, 7)
        await wait_all_tasks_blocked()
        assert answered == []
        with capture_logs() as logged:
            seen_to_go.set()
            await trio.sleep(WINDOW / 2)
        assert answered == [(7, WINDOW)]
        assert [event["waited"] for event in logged] == [WINDOW], "since its old connection came"
    assert [shard for shard, _ in answered] == [7, 0, 1, 2]
    assert [b - a for (_, a), (_, b) in pairwise(answered)] == pytest.approx([WINDOW] * 3)
    assert queue.abandoned == 1


async def test_two_live_requests_of_one_shard_are_two_tickets(autojump_clock: MockClock) -> None:
    """One of them gets the place that was kept."""
    async with running(hold=True, place_seconds=KEPT) as queue, trio.open_nursery() as nursery:
        line = Line(queue, nursery)
        away = await line.join(1)
        await line.join(2, "other")
        away.cancel()
        await wait_all_tasks_blocked()
        await line.join(1, "first")
        await line.join(1, "second")
        assert len(queue) == 3
    assert line.order == ["first", "other", "second"]


async def test_of_several_places_the_oldest_is_taken_first(autojump_clock: MockClock) -> None:
    async with running(hold=True, place_seconds=KEPT) as queue, trio.open_nursery() as nursery:
        line = Line(queue, nursery)
        clients = [await line.join(shard) for shard in (1, 2, 1, 3)]
        clients[0].cancel()
        clients[2].cancel()
        await wait_all_tasks_blocked()
        await line.join(1, "back")
        await line.join(1, "back as well")
    assert line.order == ["back", 2, "back as well", 3]


@pytest.mark.parametrize(
    ("away_for", "place_seconds", "shard", "keeps"),
    [(29, 30, 1, True), (31, 30, 1, False), (1, 0, 1, False), (1, 30, None, False)],
)
async def test_which_shards_keep_a_place(
    autojump_clock: MockClock, away_for: float, place_seconds: float, shard: int | None, keeps: bool
) -> None:
    others = list(range(10, 22))
    async with (
        running(place_seconds=place_seconds, hold=True) as queue,
        trio.open_nursery() as nursery,
    ):
        line = Line(queue, nursery)
        away = await line.join(shard, "away")
        for other in others:
            await line.join(other)
        away.cancel()
        await trio.sleep(away_for)
        gone = len(line.order)
        await line.join(shard, "away")
    expected = list[object](others)
    expected.insert(gone if keeps else len(others), "away")
    assert line.order == expected


async def test_places_move_to_their_new_keys_when_the_number_of_keys_changes(
    autojump_clock: MockClock,
) -> None:
    async with running(place_seconds=KEPT, hold=True) as queue, trio.open_nursery() as nursery:
        line = Line(queue, nursery)
        (await line.join(7)).cancel()
        await line.join(5)
        queue.set_max_concurrency(2)
        await wait_all_tasks_blocked()
        (lane,) = await overview.lanes(queue)
        assert [(t.shard, t.state) for t in lane.tickets] == [(7, "away"), (5, "waiting")]
        assert lane.rate_limit_key == 1
        await line.join(7)
    assert line.order == [7, 5]


async def test_a_held_shard_keeps_its_place_too(autojump_clock: MockClock) -> None:
    async with (
        running(place_seconds=KEPT, loop_free_starts=1) as queue,
        trio.open_nursery() as nursery,
    ):
        line = Line(queue, nursery)
        await line.join(7)
        held = await line.join(7)
        await trio.sleep(9)
        held.cancel()
        for shard in range(20, 23):
            await line.join(shard)
        await line.join(7)
        await wait_all_tasks_blocked()
        (lane,) = await overview.lanes(queue)
        assert [(t.shard, t.state) for t in lane.tickets] == [
            *((7, "held"), (21, "waiting"), (22, "waiting")),
        ]
    assert line.order == [7, 20, 21, 7, 22]


async def test_20_000_clients_that_come_and_go_leave_nothing_behind(
    autojump_clock: MockClock,
) -> None:
    async def visit(queue: Queue, shard: int) -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            async with queue.turn(shard):
                raise AssertionError

    async with running(place_seconds=KEPT, hold=True) as queue:
        await visit(queue, 0)
        await trio.sleep(2 * KEPT)
        before = sys.getallocatedblocks()
        for number in range(10_000):
            await visit(queue, 0)
            await visit(queue, number)
        await wait_all_tasks_blocked()
        assert sum(len(lane.away) for lane in queue.lanes.values()) == 10_000
        await trio.sleep(KEPT + 1)
        gc.collect()
        assert sys.getallocatedblocks() - before < 1000
        assert not queue.lanes


def test_the_simulation_prints_the_table_of_the_readme() -> None:
    with capture_logs():
        kept = place_simulation.simulate(KEPT)
        table = place_simulation.table()
    assert kept.order == list(range(place_simulation.SHARDS)), "as they first came"
    assert [b - a for a, b in pairwise(kept.times)] == pytest.approx([WINDOW] * 199)
    assert table in README.read_text(encoding="utf-8")
