"""Steps of the event loop: one connection at a time, and one long document at a time."""

from __future__ import annotations

import logging
import os
from collections import Counter

import pytest
import trio
import trio.testing

from gateway_queue.observing.output import Output
from gateway_queue.serving.hypercorn import frames
from gateway_queue.serving.hypercorn.descriptors import OTHERS, Descriptors
from gateway_queue.serving.hypercorn.frames import Excess, Frames
from gateway_queue.serving.hypercorn.turns import (
    SHORT_SECONDS,
    STEPS_MAX,
    Turns,
)
from gateway_queue.web.shared import Shared
from tests.attack import PREFACE, get, headers, wire
from tests.attack import reset as rst

CONNECTIONS = 50


def record(text: str) -> logging.LogRecord:
    """Return a line for the log."""
    return logging.makeLogRecord({"msg": text})


class LoopTurns(trio.abc.Instrument):
    """Counts the turns of the event loop."""

    count = 0

    def before_io_wait(self, timeout: float) -> None:  # noqa: ARG002
        self.count += 1


@pytest.mark.parametrize(("seconds", "most"), [(0.0, STEPS_MAX), (2 * SHORT_SECONDS, 1)])
async def test_few_connections_take_a_step_in_each_turn_of_the_loop(
    seconds: float, most: int, autojump_clock: trio.testing.MockClock
) -> None:
    turns, loop, steps = Turns(), LoopTurns(), Counter[int]()

    async def connection() -> None:
        for _ in range(10):
            await turns.wait()
            steps[loop.count] += 1
            autojump_clock.jump(seconds)

    trio.lowlevel.add_instrument(loop)
    async with trio.open_nursery() as nursery:
        for _ in range(CONNECTIONS):
            nursery.start_soon(connection)
    trio.lowlevel.remove_instrument(loop)
    assert steps.total() == 10 * CONNECTIONS
    assert Counter(steps.values()).most_common(1)[0][0] == most


async def test_a_cancelled_wait_passes_the_turn_on() -> None:
    turns = Turns()
    with trio.CancelScope() as scope:
        scope.cancel()
        await turns.wait()
    with trio.fail_after(1):
        await turns.wait()


async def test_a_task_that_waits_can_take_its_step_at_once() -> None:
    turns, tasks, steps = Turns(), list[trio.lowlevel.Task](), list[trio.lowlevel.Task]()

    async def connection() -> None:
        task = trio.lowlevel.current_task()
        tasks.append(task)
        await turns.wait()
        steps.append(task)
        if task is tasks[0]:
            for other in (tasks[-1], tasks[-1], tasks[0]):  # the others do not wait
                turns.skip(other)

    async with trio.open_nursery() as nursery:
        for _ in range(3 * STEPS_MAX):
            nursery.start_soon(connection)
    assert set(steps) == set(tasks)
    assert len(steps) == len(tasks)
    assert steps.index(tasks[-1]) <= STEPS_MAX + 1


async def test_frames_come_in_steps() -> None:
    cut = Frames()
    cut.add(PREFACE[:10])
    assert cut.next_step() is None
    cut.add(PREFACE[10:] + wire(headers(1, get()), *(rst(1) for _ in range(50))))
    steps = []
    while step := cut.next_step():
        steps.append(step)
    assert b"".join(steps) == PREFACE + wire(headers(1, get()), *(rst(1) for _ in range(50)))
    assert [len(step) // 13 for step in steps[2:]] == [20, 20, 10]


async def test_frames_are_allowed_again_with_time(autojump_clock: trio.testing.MockClock) -> None:
    cut = Frames()
    cut.add(PREFACE)
    cut.next_step()
    frame = rst(1).serialize()

    def count() -> int:
        taken = 0
        try:
            while True:
                cut.add(frame)
                taken += len(cut.next_step() or b"") // len(frame)
        except Excess:
            return taken

    first = count()
    assert frames.ALLOWANCE - frames.COSTS[frames.SETTINGS] == first
    autojump_clock.jump(1.0)
    assert frames.ALLOWANCE_PER_SECOND - 1 <= count() <= frames.ALLOWANCE_PER_SECOND


class Ended:
    """A connection that notes whether it is closed."""

    is_closed = False

    def close(self) -> None:
        self.is_closed = True


def test_the_oldest_connection_without_a_ticket_makes_room() -> None:
    descriptors = Descriptors(OTHERS + 4)
    connections = [Ended() for _ in range(6)]
    for connection in connections[:4]:
        descriptors.add(connection)
    assert descriptors.hold(connections[0])
    descriptors.note_request(connections[1])
    descriptors.add(connections[4])
    assert [one.is_closed for one in connections] == [False, False, True, False, False, False]
    descriptors.let_go(connections[0])
    descriptors.add(connections[5])
    assert [one.is_closed for one in connections] == [False, False, True, True, False, False]


def test_a_quarter_of_the_descriptors_is_not_for_tickets() -> None:
    descriptors = Descriptors(OTHERS + 4)
    connections = [Ended() for _ in range(4)]
    for connection in connections:
        descriptors.add(connection)
    assert [descriptors.hold(one) for one in connections] == [True, True, True, False]


async def test_requests_that_wait_for_the_same_document_share_it() -> None:
    shared = Shared()
    written: list[int] = []

    async def write() -> bytes:
        written.append(len(written))
        await trio.testing.wait_all_tasks_blocked()
        return b"%d" % len(written)

    documents = []

    async def ask(name: str) -> None:
        documents.append((name, await shared.get(name, write)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, "a")
        await trio.testing.wait_all_tasks_blocked(0.0)
        for _ in range(3):
            nursery.start_soon(ask, "a")
    assert sorted(documents) == [("a", b"1"), *[("a", b"2")] * 3]
    await ask("a")
    await ask("b")
    assert documents[4:] == [("a", b"3"), ("b", b"4")]


def test_lines_that_a_pipe_does_not_take_are_counted() -> None:
    read_end, write_end = os.pipe()
    output = Output(write_end)
    try:
        for number in range(1000):
            output.emit(record(f"{number:0200}"))
        written = os.read(read_end, 2**20)
        lost = 1000 - written.count(b"\n") - 1  # one line still waits
        assert len(written) > 2**15
        output.emit(record("the next one"))
        text = (written + os.read(read_end, 2**20)).decode()
        lines = text.splitlines()
        assert lines[-2:] == [f"stderr was full: {lost} lines of the log are lost", "the next one"]
        assert all(len(line) == 200 for line in lines[:-2])
    finally:
        os.close(read_end)
        os.close(write_end)
    output.emit(record("the reader is gone"))
