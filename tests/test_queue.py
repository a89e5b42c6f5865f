"""The queue on the mock clock, against a simple model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, groupby, pairwise

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from gateway_queue.queue import Queue
from gateway_queue.store import Claim, Refusal, Rules
from gateway_queue.store.memory import MemoryStore
from tests.running import TOLERANCE, WINDOW, SlowStore, on_mock_clock, running, stopwatch


@dataclass(frozen=True)
class Client:
    """One client of a history. All times are in seconds."""

    arrives: float
    shard: int
    patience: float
    answer_takes: float
    leaves_when_chosen: bool

    @property
    def leaves(self) -> float:
        return self.arrives + self.patience


@dataclass(frozen=True)
class Release:
    """One answer: its client, when it began, and when it had been sent."""

    client: Client
    key: int
    began: float
    ended: float


clients = st.builds(
    Client,
    arrives=st.floats(0, 60),
    shard=st.integers(0, 5),
    patience=st.just(math.inf) | st.floats(0, 60),
    answer_takes=st.sampled_from([0.0, 0.1, 1.0]),
    leaves_when_chosen=st.booleans() | st.just(False),
)
histories = st.lists(clients, max_size=30, unique_by=lambda client: client.arrives)


async def act(queue: Queue, client: Client, keys: int, releases: list[Release]) -> None:
    """Run a client: wait, and leave at its own time or get an answer."""
    await trio.sleep_until(client.arrives)
    with trio.move_on_at(client.leaves) as standing:
        async with queue.turn(client.shard):
            began = trio.current_time()
            if client.leaves_when_chosen:
                standing.cancel()
                await trio.lowlevel.checkpoint()
            with trio.CancelScope(shield=True):
                await trio.sleep(client.answer_takes)
            ended = trio.current_time()
            releases.append(Release(client, client.shard % keys, began, ended))


def expected_releases(history: list[Client], keys: int, opens: float) -> Iterator[Release]:
    """Calculate when each client is released: the model of the queue, key by key."""
    for key in range(keys):
        line = sorted(
            (client for client in history if client.shard % keys == key),
            key=lambda client: client.arrives,
        )
        opens_at = opens
        while line:
            now = max(opens_at, min(client.arrives for client in line))
            line = [client for client in line if client.leaves > now]
            here = [client for client in line if client.arrives <= now]
            if not here:
                continue
            line.remove(here[0])
            if here[0].leaves_when_chosen:
                continue
            ended = now + here[0].answer_takes
            yield Release(here[0], key, now, ended)
            opens_at = ended + WINDOW


def assert_never_early(releases: list[Release]) -> None:
    by_key = sorted(releases, key=lambda release: (release.key, release.began))
    for _, one_key in groupby(by_key, key=lambda release: release.key):
        for former, latter in pairwise(one_key):
            assert latter.began - former.ended >= WINDOW - TOLERANCE


@given(histories, st.sampled_from([1, 2, 4]), st.booleans())
def test_every_history_matches_the_model(history: list[Client], keys: int, hold: bool) -> None:
    releases: list[Release] = []

    async def main() -> None:
        async with running(hold=hold, keys=keys) as queue, trio.open_nursery() as nursery:
            for client in history:
                nursery.start_soon(act, queue, client, keys, releases)

    on_mock_clock(main)

    assert_never_early(releases)
    expected = sorted(
        expected_releases(history, keys, WINDOW if hold else 0.0), key=lambda r: r.client.arrives
    )
    actual = sorted(releases, key=lambda r: r.client.arrives)
    assert [r.client for r in actual] == [r.client for r in expected]
    assert [r.began for r in actual] == pytest.approx([r.began for r in expected], abs=TOLERANCE)


@given(
    histories,
    st.lists(st.tuples(st.floats(0, 60), st.integers(1, 6)), max_size=5),
    st.sampled_from([0.0, 8.0]),
    st.sampled_from([0, 2]),
)
def test_a_slow_store_loses_no_ticket_and_makes_none_early(
    history: list[Client],
    changes: list[tuple[float, int]],
    place_seconds: float,
    loop_free_starts: int,
) -> None:
    """Clients come, leave and come back, and keys change, while the store is asked."""
    releases: list[Release] = []

    async def change(queue: Queue) -> None:
        for at, keys in sorted(changes):
            await trio.sleep_until(at)
            queue.set_max_concurrency(keys)

    async def main() -> None:
        async with (
            running(
                store_type=SlowStore,
                keys=4,
                place_seconds=place_seconds,
                loop_free_starts=loop_free_starts,
            ) as queue,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(change, queue)
            for client in history:
                nursery.start_soon(act, queue, client, 1, releases)

    on_mock_clock(main)

    patient = {c for c in history if c.patience == math.inf and not c.leaves_when_chosen}
    assert patient <= {release.client for release in releases}
    for former, latter in combinations(sorted(releases, key=lambda one: one.began), 2):
        if former.client.shard == latter.client.shard:
            assert latter.began - former.ended >= WINDOW - TOLERANCE


@given(
    histories,
    st.lists(st.tuples(st.floats(0.1, 30), st.floats(0, 3)), max_size=4),
    st.sampled_from([1, 3]),
)
def test_restarts_release_no_shard_early_and_lose_no_shard_that_asks_again(
    history: list[Client], restarts: list[tuple[float, float]], keys: int
) -> None:
    releases: list[Release] = []
    patient = [client for client in history if client.patience == math.inf]

    async def serve(lifetime: float) -> None:
        """Run one process, which is killed without warning when its lifetime is over."""
        answered = {release.client for release in releases}
        store = MemoryStore(Rules(WINDOW, hold=True))
        queue = Queue(store, max_concurrency=keys)
        with trio.move_on_after(lifetime):
            async with trio.open_nursery() as nursery:
                await nursery.start(queue.run)
                async with trio.open_nursery() as askers:
                    for client in patient:
                        if client not in answered and not client.leaves_when_chosen:
                            askers.start_soon(act, queue, client, keys, releases)
                nursery.cancel_scope.cancel()

    async def main() -> None:
        for lifetime, downtime in restarts:
            await serve(lifetime)
            await trio.sleep(downtime)
        await serve(math.inf)

    on_mock_clock(main)

    assert_never_early(releases)
    assert {r.client for r in releases} == {c for c in patient if not c.leaves_when_chosen}


async def test_a_day_of_windows(autojump_clock: MockClock) -> None:
    """24 hours of one shard after another: not one window is lost or cut short."""
    windows = int(24 * 3600 / WINDOW)
    async with running(hold=False) as queue:
        elapsed = stopwatch()
        for _ in range(windows + 1):
            async with queue.turn(None):
                pass
        assert elapsed() == pytest.approx(windows * WINDOW)


async def test_the_next_ticket_gets_the_slot_of_a_client_that_leaves_when_chosen(
    autojump_clock: MockClock,
) -> None:
    """A thousand clients leave at the instant when the first of them is chosen; one stays."""
    served = []

    async def client(queue: Queue, number: int) -> None:
        async with queue.turn(number):
            await trio.lowlevel.checkpoint()
            served.append((number, trio.current_time()))

    async with (
        running(hold=True) as queue,
        trio.open_nursery() as nursery,
        trio.open_nursery() as leavers,
    ):
        for number in range(1000):
            leavers.start_soon(client, queue, number)
        await wait_all_tasks_blocked()
        nursery.start_soon(client, queue, 1000)
        leavers.cancel_scope.deadline = WINDOW
    assert served == [(1000, WINDOW)]


async def test_an_answer_that_fails_counts_as_sent(autojump_clock: MockClock) -> None:
    async with running(hold=False) as queue:
        with pytest.raises(OSError, match="half of it"):
            async with queue.turn(None):
                raise OSError("half of it is out")
        elapsed = stopwatch()
        async with queue.turn(None):
            assert elapsed() == pytest.approx(WINDOW)


async def test_closing_finishes_the_answer_under_way_and_releases_no_other_ticket(
    autojump_clock: MockClock,
) -> None:
    answered = []

    async def client(queue: Queue, number: int) -> None:
        async with queue.turn(number):
            await trio.sleep(1)
            answered.append(number)

    async with running(hold=False) as queue, trio.open_nursery() as nursery:
        for number in range(3):
            nursery.start_soon(client, queue, number)
        await wait_all_tasks_blocked()
        assert len(queue) == 2
        await queue.close()
        assert len(answered) == 1
        await trio.sleep(10 * WINDOW)
        assert len(answered) == 1
        nursery.cancel_scope.cancel()


async def test_an_idle_queue_has_no_tasks_and_keeps_no_lanes(autojump_clock: MockClock) -> None:
    async with running(hold=False, keys=1000) as queue:
        async with trio.open_nursery() as nursery:

            async def client(shard: int) -> None:
                async with queue.turn(shard):
                    pass

            for shard in range(1000):
                nursery.start_soon(client, shard)
        assert trio.current_time() == 0  # 1000 keys release in the same instant
        await wait_all_tasks_blocked()
        assert trio.lowlevel.current_statistics().tasks_living <= 6
        assert not queue.lanes


class Stalls(trio.abc.Instrument):
    """Stalls the process after the step in which a claim is refused, until the refusal expires."""

    seconds = 0.0

    def __init__(self, clock: MockClock) -> None:
        self._clock = clock

    def after_task_step(self, task: trio.lowlevel.Task) -> None:  # noqa: ARG002
        self._clock.jump(self.seconds)
        self.seconds = 0.0


async def test_the_oldest_ticket_of_all_keys_goes_first_after_a_stall(
    autojump_clock: MockClock,
) -> None:
    stalls, order = Stalls(autojump_clock), list[int]()

    class StallingStore(MemoryStore):
        async def claim(
            self, key: int, shard: int | None, came_at: float, *, confirm: bool = False
        ) -> Claim | Refusal:
            outcome = await super().claim(key, shard, came_at, confirm=confirm)
            if isinstance(outcome, Refusal) and outcome.concerns == "queue":
                stalls.seconds = outcome.seconds
            return outcome

    async def ask(queue: Queue, shard: int) -> None:
        async with queue.turn(shard):
            order.append(shard)

    async with (
        running(store_type=StallingStore, keys=32, releases_per_window=1) as queue,
        trio.open_nursery() as nursery,
    ):
        trio.lowlevel.add_instrument(stalls)
        for shard in range(32):
            nursery.start_soon(ask, queue, shard)
            await wait_all_tasks_blocked()
    assert order == list(range(32))
