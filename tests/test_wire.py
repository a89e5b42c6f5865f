"""The rules of the queue, as clients see them on the wire."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from itertools import pairwise

import pytest

from tests.harness import GO, SLACK, Client, first_answers, serving


def test_2000_waiters_are_released_one_per_window_in_order() -> None:
    window, released = 0.25, 60
    with serving(WINDOW_SECONDS=window) as server:
        clients = [server.connect() for _ in range(2000)]
        answers = first_answers(clients, released)

    assert [number for number, _ in answers] == list(range(released))
    assert {(answer.status, answer.body) for _, answer in answers} == {(200, GO)}
    gaps = [latter.at - former.at for (_, former), (_, latter) in pairwise(answers[1:])]
    assert min(gaps) >= window - SLACK
    assert sum(gaps) / len(gaps) < 1.1 * window


def test_a_start_holds_all_tickets_for_one_window() -> None:
    before = time.monotonic()
    with serving(WINDOW_SECONDS=1.5) as server:
        assert server.connect().answer().at - before >= 1.5


def test_hold_on_start_can_be_turned_off() -> None:
    with serving(WINDOW_SECONDS=3600, HOLD_ON_START="false") as server:
        assert server.connect().answer().status == 200


def test_a_killed_server_that_comes_back_is_not_early() -> None:
    window = 1.0
    with serving(WINDOW_SECONDS=window, HOLD_ON_START="false") as server:
        last = server.connect().answer().at
        server.signal(signal.SIGKILL)
    with serving(WINDOW_SECONDS=window) as server:
        assert server.connect().answer().at - last >= window


@pytest.mark.parametrize("leave", [Client.hang_up, Client.reset])
def test_a_client_that_hangs_up_in_the_queue_gets_no_slot(leave: Callable[[Client], None]) -> None:
    window = 0.5
    with serving(WINDOW_SECONDS=window) as server:
        clients = [server.connect() for _ in range(6)]
        answers = first_answers(clients, 1)
        for gone in (1, 2, 4):
            leave(clients[gone])
        answers += [(number, clients[number].answer()) for number in (3, 5)]

    gaps = [latter.at - former.at for (_, former), (_, latter) in pairwise(answers)]
    assert all(window - SLACK <= gap < 2 * window for gap in gaps)


@pytest.mark.parametrize("leave", [Client.hang_up, Client.reset])
def test_a_client_that_hangs_up_when_chosen_leaves_the_slot_to_the_next(
    leave: Callable[[Client], None],
) -> None:
    """The server is paused (SIGSTOP) while the window passes and the next client hangs up."""
    window = 0.6
    with serving(WINDOW_SECONDS=window) as server:
        for _ in range(5):
            clients = [server.connect() for _ in range(3)]
            last = clients[0].answer().at
            server.settle()
            server.signal(signal.SIGSTOP)
            leave(clients[1])
            time.sleep(max(0.0, last + 1.2 * window - time.monotonic()))
            server.signal(signal.SIGCONT)
            woken = time.monotonic()
            assert clients[2].answer().at - woken < window / 2


def test_hundreds_of_clients_that_hang_up_at_their_turn_cost_no_slot() -> None:
    """More clients than the server looks at in one step, from the last to the first."""
    window = 1.0
    with serving(WINDOW_SECONDS=window) as server:
        clients = [server.connect() for _ in range(301)]
        server.settle()
        last = server.connect()
        server.settle()
        first = clients[0].answer().at
        server.settle()
        server.signal(signal.SIGSTOP)
        for client in reversed(clients):
            client.hang_up()
        time.sleep(max(0.0, first + 1.2 * window - time.monotonic()))
        server.signal(signal.SIGCONT)
        woken = time.monotonic()
        assert last.answer().at - woken < window / 2
