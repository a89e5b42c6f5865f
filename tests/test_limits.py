"""What limits a queue besides its windows, on the mock clock, over whole days."""

from __future__ import annotations

import math
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import hypothesis
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs
from structlog.typing import EventDict
from trio.testing import MockClock, wait_all_tasks_blocked

from gateway_queue.discord.api import BadToken, Discord, SessionStartLimit, Unavailable
from gateway_queue.discord.limits import Limits
from gateway_queue.queue import Queue, overview
from gateway_queue.settings import Settings
from gateway_queue.store import DiscordBudget
from gateway_queue.store.loop_guard import LoopGuard
from tests.running import TOLERANCE, WINDOW, on_mock_clock, running, stopwatch

HOUR = 3600.0
DAY = 24 * HOUR


@pytest.fixture
def logged() -> Iterator[list[EventDict]]:
    with capture_logs() as events:
        yield events


def named(events: list[EventDict], words: str) -> list[EventDict]:
    """Return the warnings that have these words in them."""
    return [e for e in events if e["log_level"] == "warning" and words in e["event"]]


@dataclass
class History:
    """Which shards were released, when, and with how many keys."""

    queue: Queue
    releases: list[tuple[float, int, int]] = field(default_factory=list)
    """Time, shard, and max_concurrency at that time."""

    async def ask(self, shard: int, at: float = 0.0) -> None:
        """Run a client."""
        await trio.sleep_until(at)
        async with self.queue.turn(shard):
            assert self.queue.max_concurrency is not None
            self.releases.append((trio.current_time(), shard, self.queue.max_concurrency))


def played(
    arrivals: list[tuple[float, int]],
    *,
    session_start_limit: int | None = None,
    loop_free_starts: int = 0,
) -> list[tuple[float, int, int]]:
    """Let shards arrive, and return the releases."""
    releases: list[tuple[float, int, int]] = []

    async def main() -> None:
        async with (
            running(
                session_start_limit=session_start_limit, loop_free_starts=loop_free_starts
            ) as queue,
            trio.open_nursery() as nursery,
        ):
            history = History(queue, releases)
            for at, shard in arrivals:
                nursery.start_soon(history.ask, shard, at)

    on_mock_clock(main)
    return releases


# --- rate limit keys --------------------------------------------------------------------------


async def test_1600_shards_on_16_keys_take_100_windows(autojump_clock: MockClock) -> None:
    async with running(keys=16, hold=True) as queue:
        history = History(queue)
        async with trio.open_nursery() as nursery:
            for shard in range(1600):
                nursery.start_soon(history.ask, shard)
    assert trio.current_time() == pytest.approx(100 * WINDOW)
    assert Counter(at for at, *_ in history.releases) == pytest.approx(
        {WINDOW * turn: 16 for turn in range(1, 101)}
    )


@given(
    st.lists(st.tuples(st.floats(0, 20), st.integers(0, 40)), min_size=20, max_size=60),
    st.lists(st.tuples(st.floats(0, 20), st.integers(1, 12)), min_size=2, max_size=20),
)
def test_keys_change_while_many_wait(
    arrivals: list[tuple[float, int]], changes: list[tuple[float, int]]
) -> None:
    """No shard is lost, and none is early by the number of keys at its release."""
    histories = []

    async def change(queue: Queue) -> None:
        for at, keys in sorted(changes):
            await trio.sleep_until(at)
            queue.set_max_concurrency(keys)

    async def main() -> None:
        async with running(keys=None) as queue:
            histories.append(history := History(queue))
            async with trio.open_nursery() as nursery:
                for at, shard in arrivals:
                    nursery.start_soon(history.ask, shard, at)
                await wait_all_tasks_blocked()
                queue.set_max_concurrency(4)
                await change(queue)

    on_mock_clock(main)

    releases = histories[0].releases
    assert Counter(shard for _, shard, _ in releases) == Counter(shard for _, shard in arrivals)
    for number, (at, shard, keys) in enumerate(releases):
        for former_at, former, _ in releases[:number]:
            if former % keys == shard % keys:
                assert at - former_at >= WINDOW - TOLERANCE


@given(st.lists(st.integers(0, 40), max_size=60, unique=True), st.integers(1, 12))
def test_tickets_that_move_to_other_lanes_stay_in_order(shards: list[int], keys: int) -> None:
    histories = []

    async def main() -> None:
        async with running(keys=None) as queue:
            histories.append(history := History(queue))
            async with trio.open_nursery() as nursery:
                for number, shard in enumerate(shards):
                    nursery.start_soon(history.ask, shard, number / 100)
                await trio.sleep(1)
                assert history.releases == []
                assert len(queue) == len(shards)
                queue.set_max_concurrency(keys)

    on_mock_clock(main)

    released = [shard for _, shard, _ in histories[0].releases]
    for key in range(keys):
        assert [s for s in released if s % keys == key] == [s for s in shards if s % keys == key]


async def test_a_change_waits_for_the_answer_under_way(autojump_clock: MockClock) -> None:
    """The window of a slow answer counts also after a change of keys."""
    began = []

    async def client(queue: Queue, shard: int) -> None:
        async with queue.turn(shard):
            began.append(trio.current_time())
            await trio.sleep(1)

    async with running(keys=2) as queue, trio.open_nursery() as nursery:
        nursery.start_soon(client, queue, 0)
        await trio.sleep(0.5)
        nursery.start_soon(client, queue, 4)
        queue.set_max_concurrency(4)
    assert began == pytest.approx([0, 1 + WINDOW])


async def test_a_client_that_leaves_after_a_change_of_keys_is_gone(
    autojump_clock: MockClock,
) -> None:
    async with running(keys=1, hold=True) as queue:
        history = History(queue)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(history.ask, 5)
            await wait_all_tasks_blocked()
            queue.set_max_concurrency(4)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert len(queue) == 0
        assert queue.abandoned == 1
        await trio.sleep(2 * WINDOW)
        assert not queue.lanes


async def test_a_ticket_without_a_shard_is_logged_if_there_are_several_keys(
    autojump_clock: MockClock, logged: list[EventDict]
) -> None:
    async def ask(queue: Queue) -> None:
        async with queue.turn(None):
            pass

    async with running(keys=1) as queue:
        await ask(queue)
        assert not named(logged, "without ?shard=")
    async with running(keys=2) as queue:
        await ask(queue)
        assert len(named(logged, "without ?shard=")) == 1
    async with running(keys=None, hold=True) as queue, trio.open_nursery() as nursery:
        nursery.start_soon(ask, queue)
        await wait_all_tasks_blocked()
        for keys in (2, 3, 1):
            queue.set_max_concurrency(keys)
            await wait_all_tasks_blocked()
            assert len(named(logged, "without ?shard=")) == 2, (
                "once the keys are known, and once only"
            )


async def test_with_max_concurrency_0_every_ticket_is_released_at_once(
    autojump_clock: MockClock,
) -> None:
    async with running(keys=0, hold=True, session_start_limit=1, loop_free_starts=1) as queue:
        for _ in range(1000):
            async with queue.turn(3):
                pass
        assert trio.current_time() == 0
        assert queue.released == 1000


# --- the day's session starts -----------------------------------------------------------------


@given(st.lists(st.floats(0, 3 * DAY), max_size=80), st.integers(1, 20))
@hypothesis.settings(deadline=None)
def test_no_day_has_more_starts_than_configured(arrivals: list[float], limit: int) -> None:
    releases = played([(at, 0) for at in arrivals], session_start_limit=limit)
    times = [at for at, *_ in releases]
    assert len(times) == len(arrivals)
    for former, latter in zip(times, times[limit:], strict=False):
        assert latter - former >= DAY - TOLERANCE
    # And no ticket is late: it is released when it arrives, or when a window or a day ends.
    for place, (arrived, at) in enumerate(zip(sorted(arrivals), times, strict=True)):
        reasons = [arrived]
        reasons += [times[place - 1] + WINDOW] if place else []
        reasons += [times[place - limit] + DAY] if place >= limit else []
        assert at == pytest.approx(max(reasons), abs=TOLERANCE)


async def test_many_starts_without_a_limit_are_logged(
    autojump_clock: MockClock, logged: list[EventDict]
) -> None:
    async with running() as queue:
        for number in range(1, 1101):
            async with queue.turn(None):
                pass
            await wait_all_tasks_blocked()
            warnings = [event["used"] for event in named(logged, "many session starts")]
            assert warnings == [level for level in (800, 900, 1000) if number >= level]
        assert trio.current_time() == pytest.approx(1099 * WINDOW)
        assert queue.store.session_starts().total is None


@dataclass
class Day:
    """Discord's own count of session starts, which begins again every 24 hours."""

    total: int
    resets: float
    """When its first day ends."""
    max_concurrency: int = 1
    answer_takes: float = 0.0
    faults: list[bool] = field(default_factory=list)
    """Whether to fail, for one request after another; no more fail after these."""
    identified: list[float] = field(default_factory=list)

    def day(self, at: float) -> int:
        return math.floor((at - self.resets) / DAY)

    def remaining(self, at: float) -> int:
        return self.total - sum(self.day(then) == self.day(at) for then in self.identified)

    def identify(self) -> None:
        self.identified.append(trio.current_time())
        assert self.remaining(trio.current_time()) >= 0, "the token is reset"

    async def session_start_limit(self) -> SessionStartLimit:
        """Answer with the limits at the time of the request."""
        now = trio.current_time()
        reset_after = self.resets + DAY * (self.day(now) + 1) - now
        answer = SessionStartLimit(
            self.total, self.remaining(now), reset_after, self.max_concurrency
        )
        await trio.sleep(self.answer_takes)
        if self.faults and self.faults.pop():
            raise Unavailable("a simulated fault")
        return answer


def following(day: Discord | Day, queue: Queue, **variables: Any) -> Limits:
    return Limits(day, queue, Settings(window_seconds=WINDOW, **variables))  # type: ignore[arg-type]


arrivals_over_days = st.floats(0, 2.5 * DAY) | st.floats(0, 2 * HOUR)


@pytest.mark.simulation
@given(
    st.lists(st.tuples(arrivals_over_days, st.floats(0, 5 * WINDOW)), max_size=60),
    st.lists(arrivals_over_days | st.floats(0, 60), max_size=5),
    st.builds(
        Day,
        total=st.integers(1, 20),
        resets=st.floats(1, DAY),
        max_concurrency=st.sampled_from([1, 4]),
        answer_takes=st.sampled_from([0.0, 0.5, 20.0]),
        faults=st.lists(st.booleans(), max_size=20),
    ),
)
# The queue's reset is an instant before Discord's, because both are rounded.
@hypothesis.example(
    shards=[(300.0, 0.0), (6_000.0, 0.0), (23_000.0, 0.0), (90_000.0, 0.0), (147_000.0, 0.0)],
    restarts=[],
    day=Day(total=1, resets=70698.95574140969),
)
# Starts are on their way when the second process asks, so Discord has not counted them.
@hypothesis.example(
    shards=[(0.0, 5 * WINDOW)] * 5 + [(0.0, 0.0)] * 3,
    restarts=[29.0],
    day=Day(total=7, resets=HOUR),
)
@hypothesis.example(
    shards=[(0.0, 0.0)] * 8 + [(1.0, 5 * WINDOW)] + [(2.0, 0.0)] * 14,
    restarts=[46.0],
    day=Day(total=22, resets=HOUR),
)
@hypothesis.settings(deadline=None)
def test_discord_never_counts_more_than_it_allows(
    shards: list[tuple[float, float]], restarts: list[float], day: Day
) -> None:
    """Shards that identify late, a Discord that answers late or not, and a queue that is killed."""
    left = list(enumerate(shards))

    async def identify(hesitates: float) -> None:
        await trio.sleep(hesitates)
        day.identify()

    async def shard(
        queue: Queue, discord: trio.Nursery, entry: tuple[int, tuple[float, float]]
    ) -> None:
        number, (arrives, hesitates) = entry
        await trio.sleep_until(arrives)
        async with queue.turn(number):
            left.remove(entry)
            discord.start_soon(identify, hesitates)

    async def process(until: float, discord: trio.Nursery) -> None:
        with trio.move_on_at(until):
            async with running(keys=None, hold=True) as queue, trio.open_nursery() as follower:
                follower.start_soon(following(day, queue).run)
                async with trio.open_nursery() as nursery:
                    for entry in tuple(left):
                        nursery.start_soon(shard, queue, discord, entry)
                follower.cancel_scope.cancel()

    async def main() -> None:
        async with trio.open_nursery() as discord:
            for until in sorted(restarts):
                await process(until, discord)
            await process(math.inf, discord)

    on_mock_clock(main)
    assert len(day.identified) == len(shards)


async def test_a_new_process_waits_for_shards_that_the_former_process_released(
    autojump_clock: MockClock,
) -> None:
    """Discord has not counted them yet when it is asked, and no other starts are left."""
    day = Day(total=3, resets=HOUR)

    async def shard(queue: Queue, discord: trio.Nursery) -> None:
        async with queue.turn(None):
            discord.start_soon(identify)

    async def identify() -> None:
        await trio.sleep(20)
        day.identify()

    async with trio.open_nursery() as discord:
        for lifetime in (50, math.inf):
            with trio.move_on_after(lifetime):
                async with (
                    running(keys=None, hold=True) as queue,
                    trio.open_nursery() as follower,
                ):
                    follower.start_soon(following(day, queue).run)
                    for _ in range(3):
                        await shard(queue, discord)
                        assert trio.current_time() < 50 or trio.current_time() >= HOUR
                    if lifetime < math.inf:
                        await trio.sleep_forever()
                    follower.cancel_scope.cancel()


async def test_when_the_day_is_spent_all_wait_for_the_reset_and_go_on_at_the_usual_pace(
    autojump_clock: MockClock, logged: list[EventDict]
) -> None:
    day = Day(total=10, resets=HOUR)
    async with running(keys=None) as queue, trio.open_nursery() as follower:
        history = History(queue)
        follower.start_soon(following(day, queue).run)
        async with trio.open_nursery() as nursery:
            for number in range(18):
                nursery.start_soon(history.ask, number)
            await trio.sleep(20 * WINDOW)
            assert len(history.releases) == 10
            assert queue.store.session_starts().spent
            assert len(named(logged, "no session start is left today")) == 1
            (lane,) = await overview.lanes(queue)
            assert lane.opens_in == pytest.approx(HOUR + WINDOW - 20 * WINDOW)
            for _ in range(10):
                day.identify()
        follower.cancel_scope.cancel()
    later = [at for at, *_ in history.releases[10:]]
    assert HOUR <= later[0] <= HOUR + WINDOW + TOLERANCE
    assert [b - a for a, b in pairwise(later)] == pytest.approx([WINDOW] * 7)


async def test_discords_figure_counts_when_others_start_sessions_too(
    autojump_clock: MockClock,
) -> None:
    day = Day(total=100, resets=HOUR)
    async with running(keys=None) as queue, trio.open_nursery() as follower:
        follower.start_soon(following(day, queue).run)
        await wait_all_tasks_blocked()
        assert queue.store.session_starts().remaining == 100
        for _ in range(100):
            day.identify()
        await trio.sleep(301)
        assert queue.store.session_starts().spent
        follower.cancel_scope.cancel()


async def test_a_session_start_limit_below_discords_replaces_the_total(
    autojump_clock: MockClock,
) -> None:
    day = Day(total=100, resets=HOUR, identified=[0.0] * 20)
    async with running(keys=None) as queue, trio.open_nursery() as follower:
        follower.start_soon(following(day, queue, session_start_limit=40).run)
        await wait_all_tasks_blocked()
        starts = queue.store.session_starts()
        assert (starts.total, starts.remaining) == (40, 20)
        follower.cancel_scope.cancel()


async def test_a_session_start_limit_of_0_does_not_enforce_discords_limit(
    autojump_clock: MockClock,
) -> None:
    day = Day(total=1, resets=HOUR)
    async with (
        running(keys=None, session_start_limit=0) as queue,
        trio.open_nursery() as follower,
    ):
        follower.start_soon(following(day, queue, session_start_limit=0).run)
        elapsed = stopwatch()
        for _ in range(5):
            async with queue.turn(None):
                pass
        assert elapsed() == pytest.approx(4 * WINDOW)
        assert not queue.store.session_starts().spent
        follower.cancel_scope.cancel()


async def test_starts_that_are_claimed_at_the_same_time_do_not_exceed_the_limit(
    autojump_clock: MockClock,
) -> None:
    """One start is left, 16 keys are open, and no answer has been sent yet."""
    began = []

    async def client(queue: Queue, shard: int) -> None:
        async with queue.turn(shard):
            began.append(shard)
            await trio.sleep(1)

    async with running(keys=16, session_start_limit=1) as queue, trio.open_nursery() as nursery:
        for shard in range(16):
            nursery.start_soon(client, queue, shard)
        await trio.sleep(HOUR)
        assert len(began) == 1
        nursery.cancel_scope.cancel()


async def test_an_unused_session_start_is_free_for_the_next_ticket(
    autojump_clock: MockClock,
) -> None:
    async def leave_when_chosen(queue: Queue) -> None:
        with trio.CancelScope() as scope:
            async with queue.turn(0):
                await trio.sleep(1)
                scope.cancel()
                await trio.lowlevel.checkpoint()

    async with (
        running(keys=2, session_start_limit=1) as queue,
        trio.open_nursery() as nursery,
    ):
        history = History(queue)
        nursery.start_soon(leave_when_chosen, queue)
        await wait_all_tasks_blocked()
        nursery.start_soon(history.ask, 1)
    assert history.releases == [(1.0, 1, 2)]


async def test_lanes_without_clients_do_not_wait_for_the_reset(
    autojump_clock: MockClock,
) -> None:
    async with running(keys=100, session_start_limit=1) as queue:
        history = History(queue)
        await history.ask(0)
        async with trio.open_nursery() as nursery:
            for shard in range(100):
                nursery.start_soon(history.ask, shard)
            await trio.sleep(2 * WINDOW)
            assert len(queue) == len(queue.lanes) == 100
            nursery.cancel_scope.cancel()
        await wait_all_tasks_blocked()
        assert not queue.lanes


async def test_a_token_that_discord_rejects_later_changes_nothing(
    autojump_clock: MockClock, logged: list[EventDict]
) -> None:
    class Revoked(Day):
        async def session_start_limit(self) -> SessionStartLimit:
            if trio.current_time() > HOUR / 2:
                raise BadToken
            return await super().session_start_limit()

    day = Revoked(total=10, resets=10 * DAY, max_concurrency=4)
    async with running(keys=None) as queue, trio.open_nursery() as follower:
        follower.start_soon(following(day, queue).run)
        await trio.sleep(HOUR)
        assert queue.max_concurrency == 4
        assert queue.store.session_starts().remaining == 10
        assert named(logged, "cannot ask Discord")[0]["reason"] == "401 Unauthorized"
        follower.cancel_scope.cancel()


async def test_the_reset_counts_when_discord_does_not_answer(autojump_clock: MockClock) -> None:
    day = Day(total=1, resets=HOUR, faults=[True] * 10_000)
    async with running(keys=None) as queue:
        await queue.update_budget(DiscordBudget(total=1, remaining=0, resets_at=HOUR, asked_at=0.0))
        async with trio.open_nursery() as follower:
            follower.start_soon(following(day, queue).run)
            queue.set_max_concurrency(1)
            async with queue.turn(None):
                assert trio.current_time() == pytest.approx(HOUR + WINDOW)
            follower.cancel_scope.cancel()


@pytest.mark.parametrize("left", [None, 20])
async def test_each_ticket_is_released_at_its_eta(
    autojump_clock: MockClock, left: int | None
) -> None:
    """50 tickets over 4 keys; with 20 session starts left, 30 are released after the reset."""
    async with running(keys=4, hold=True) as queue, trio.open_nursery() as nursery:
        if left is not None:
            await queue.update_budget(
                DiscordBudget(total=100, remaining=left, resets_at=HOUR, asked_at=0)
            )
        history = History(queue)
        for shard in range(50):
            nursery.start_soon(history.ask, shard)
            await wait_all_tasks_blocked()
        etas = {
            ticket.shard: ticket.eta
            for lane in await overview.lanes(queue)
            for ticket in lane.tickets
        }
    released = {shard: at for at, shard, _ in history.releases}
    assert len(etas) == 50
    for named, eta in etas.items():
        assert named is not None
        assert released[named] == pytest.approx(eta, abs=WINDOW / 100)


# --- crash loops ------------------------------------------------------------------------------


async def starts_of_one_shard(queue: Queue, count: int) -> list[float]:
    """Start one shard ``count`` times, each time as soon as it may."""
    times = []
    for _ in range(count):
        async with queue.turn(7):
            times.append(trio.current_time())
    return times


async def test_a_shard_that_starts_too_often_waits_longer_and_longer(
    autojump_clock: MockClock, logged: list[EventDict]
) -> None:
    async with running(loop_free_starts=5) as queue:
        times = await starts_of_one_shard(queue, 14)
    gaps = [round(b - a, 3) for a, b in pairwise(times)]
    assert gaps[:4] == [WINDOW] * 4
    assert gaps[4:] == [15, 30, 60, 120, 240, 480, 600, 600, 600]
    held = [(event["shard"], event["held_for"]) for event in named(logged, "held")]
    assert held == [(7, gap) for gap in gaps[4:]]


async def test_free_starts_come_back_after_an_hour(autojump_clock: MockClock) -> None:
    async with running(loop_free_starts=5) as queue:
        first = await starts_of_one_shard(queue, 4)
        await trio.sleep(HOUR - 10)
        async with queue.turn(7):
            fifth = trio.current_time()
        async with queue.turn(7):
            # Sooner than 15 s: the first start is an hour ago by then.
            assert trio.current_time() == pytest.approx(max(first[0] + HOUR, fifth + WINDOW))


@pytest.mark.parametrize("guard", [0, 5])
async def test_others_pass_a_shard_that_is_held(autojump_clock: MockClock, guard: int) -> None:
    others = list(range(20, 50))
    async with running(loop_free_starts=guard) as queue, trio.open_nursery() as nursery:
        history = History(queue)
        await starts_of_one_shard(queue, 8)
        nursery.start_soon(history.ask, 7)
        await trio.sleep(7)
        start = trio.current_time()
        for shard in others:
            nursery.start_soon(history.ask, shard)
            await wait_all_tasks_blocked()
        if guard:
            (lane,) = await overview.lanes(queue)
            assert [t.state for t in lane.tickets] == ["held"] + ["waiting"] * 29
            assert lane.tickets[0].shard == 7
            assert lane.tickets[0].eta == pytest.approx(120 - 7)
            assert lane.waiting == len(queue) == 30
    if guard:  # the held shard costs no window
        times = [(at - start) / WINDOW for at, *_ in history.releases]
        assert times == pytest.approx(range(31))
    order = [shard for _, shard, _ in history.releases]
    assert order.index(7) == (23 if guard else 0)
    order.remove(7)
    assert order == others


async def test_a_held_ticket_can_leave_without_a_trace(autojump_clock: MockClock) -> None:
    async with running(loop_free_starts=1) as queue:
        await starts_of_one_shard(queue, 1)
        with trio.move_on_after(3):
            await starts_of_one_shard(queue, 1)
        assert len(queue) == 0
        assert await overview.lanes(queue) == []
        await wait_all_tasks_blocked()
        assert not queue.lanes
        assert trio.current_time() == 3


async def test_a_held_ticket_moves_when_the_keys_change(autojump_clock: MockClock) -> None:
    async with running(keys=1, loop_free_starts=1) as queue, trio.open_nursery() as nursery:
        history = History(queue)
        await starts_of_one_shard(queue, 1)
        nursery.start_soon(history.ask, 7)
        await wait_all_tasks_blocked()
        queue.set_max_concurrency(4)
        await wait_all_tasks_blocked()
        (lane,) = await overview.lanes(queue)
        assert lane.rate_limit_key == 3
    assert history.releases == [(15.0, 7, 4)]


def test_the_guard_forgets_shards_that_have_not_started_for_an_hour() -> None:
    guard = LoopGuard(free_starts=5)
    tracemalloc.start()
    for number in range(10_000):
        guard.start(number, number / 1000)
        guard.start(0, number / 1000)
    grown, _ = tracemalloc.get_traced_memory()
    guard.start(0, HOUR + 11)
    left, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown > 1_000_000
    assert left < grown / 10


@given(
    st.lists(st.tuples(st.floats(0, 3 * HOUR), st.integers(0, 2)), max_size=60), st.integers(1, 6)
)
@hypothesis.settings(deadline=None)
def test_the_guard_holds_for_every_history(arrivals: list[tuple[float, int]], free: int) -> None:
    releases = played(arrivals, loop_free_starts=free)
    assert len(releases) == len(arrivals)
    for one in range(3):
        times = [at for at, shard, _ in releases if shard == one]
        for place, at in enumerate(times):
            in_last_hour = [then for then in times[:place] if then > at - HOUR + TOLERANCE]
            if len(in_last_hour) >= free:
                delay = min(15.0 * 2 ** (len(in_last_hour) - free), 600.0)
                assert at - times[place - 1] >= delay - TOLERANCE
