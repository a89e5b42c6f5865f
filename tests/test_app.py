"""The app through Quart's test client, on the mock clock."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import pytest
import trio
from hypercorn.typing import ASGIReceiveEvent, ASGISendEvent, HTTPScope
from trio.testing import MockClock, wait_all_tasks_blocked

from gateway_queue.queue import Queue
from gateway_queue.settings import Settings
from gateway_queue.web.app import GatewayQueue
from gateway_queue.web.tickets import ANSWER_SECONDS, Room, TicketRequest
from tests.harness import GO


def refused(line: str) -> NoReturn:
    raise AssertionError(line)


@asynccontextmanager
async def started(settings: Settings) -> AsyncIterator[GatewayQueue]:
    app = GatewayQueue(lambda: settings, refused)
    async with app.test_app():
        yield app
        await app.bots.default.queue.close()


async def test_tickets_take_turns(autojump_clock: MockClock) -> None:
    answered: list[tuple[int, float]] = []

    async def ask(app: GatewayQueue, number: int) -> None:
        await trio.sleep(number / 100)
        response = await app.test_client().get(f"/anything/{number}")
        answered.append((number, trio.current_time()))
        assert response.status_code == 200
        assert await response.get_data(as_text=False) == GO
        assert response.headers["Content-Type"] == "application/json"
        assert response.headers["Cache-Control"] == "no-store"

    async with started(Settings(window_seconds=5)) as app, trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(ask, app, number)

    assert [number for number, _ in answered] == [0, 1, 2, 3]
    assert [at for _, at in answered] == pytest.approx([5.25, 10.5, 15.75, 21.0])


async def test_endpoints_are_quarts_routes(autojump_clock: MockClock) -> None:
    async with started(Settings()) as app:
        client = app.test_client()
        assert (await client.get("/healthz")).status_code == 200
        refused = await client.post("/healthz")
        assert refused.status_code == 405
        assert refused.headers["Content-Type"] == "application/problem+json"
        assert (await refused.get_json(force=True))["status"] == 405
        assert trio.current_time() == 0


SCOPE: HTTPScope = {  # type: ignore[typeddict-item]
    "type": "http",
    "http_version": "1.1",
    "method": "GET",
    "path": "/",
    "query_string": b"",
    "headers": [],
}


class Wire:
    """Hypercorn's side of a request: what the client does, and what is sent to it."""

    def __init__(self) -> None:
        self.sent: list[ASGISendEvent] = []
        self._leave, self._events = trio.open_memory_channel[ASGIReceiveEvent](2)
        self._leave.send_nowait({"type": "http.request", "body": b"", "more_body": False})

    def hang_up(self) -> None:
        self._leave.send_nowait({"type": "http.disconnect"})

    async def receive(self) -> ASGIReceiveEvent:
        return await self._events.receive()

    async def send(self, event: ASGISendEvent) -> None:
        await trio.lowlevel.checkpoint()
        self.sent.append(event)


@dataclass
class FakeTurn:
    """A turn without a queue."""

    answer_by: float = math.inf
    confirm_seconds: float = 15.0

    def answered(self) -> None:
        pass


@asynccontextmanager
async def failing_turn(_: int | None, *, confirm: bool) -> AsyncIterator[FakeTurn]:
    """Fail at time 0, and later give an ordinary turn."""
    if trio.current_time() == 0:
        raise RuntimeError("an error of the queue")
    yield FakeTurn()


async def never_sent(_: ASGISendEvent) -> NoReturn:
    raise RuntimeError("an error of the server")


@pytest.mark.parametrize("what", ["turn", "send"])
async def test_after_an_internal_error_a_request_is_held_until_its_client_leaves(
    autojump_clock: MockClock, what: str
) -> None:
    """For a client any answer is a release, so there is none, and the request stays open."""
    wire = Wire()
    if what == "send":
        await trio.sleep(1)
    send = never_sent if what == "send" else wire.send
    room = Room(10)
    request = TicketRequest(SCOPE, wire.receive, send, lambda _: failing_turn, room)
    async with trio.open_nursery() as nursery:
        ended = trio.Event()

        async def run() -> None:
            await request.run()
            ended.set()

        nursery.start_soon(run)
        await wait_all_tasks_blocked()
        assert not ended.is_set()
        assert room.waiting == 1
        wire.hang_up()
        await ended.wait()
    assert wire.sent == []
    assert room.waiting == 0


async def test_an_unread_answer_delays_the_next_one_only_by_answer_seconds(
    autojump_clock: MockClock,
) -> None:
    """The slot counts as used, because a part of the answer may have been sent."""
    slow, next_in_line = Wire(), Wire()

    async def never(_: ASGISendEvent) -> None:
        await trio.sleep_forever()

    settings = Settings(window_seconds=5, margin_seconds=0, hold_on_start=False)
    async with started(settings) as app, trio.open_nursery() as nursery:
        turn = app.bots.default.queue.turn
        nursery.start_soon(TicketRequest(SCOPE, slow.receive, never, lambda _: turn, Room(10)).run)
        await wait_all_tasks_blocked()
        await TicketRequest(
            SCOPE, next_in_line.receive, next_in_line.send, lambda _: turn, Room(10)
        ).run()
        assert trio.current_time() == pytest.approx(5 + ANSWER_SECONDS)
        slow.hang_up()
    assert [event["type"] for event in next_in_line.sent] == [
        "http.response.start",
        "http.response.body",
        "http.response.body",
    ]


@pytest.mark.parametrize("left", [0.3, 0.0, -1.0])
async def test_no_client_is_answered_with_an_expired_slot(
    autojump_clock: MockClock, left: float
) -> None:
    """With several replicas, a slot is valid only for a limited time."""
    wire, sent_at = Wire(), list[float]()

    @asynccontextmanager
    async def turn(_: int | None, *, confirm: bool) -> AsyncIterator[FakeTurn]:
        yield FakeTurn(answer_by=trio.current_time() + left)

    async def slow_send(event: ASGISendEvent) -> None:
        await trio.sleep(0.5)
        sent_at.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            TicketRequest(SCOPE, wire.receive, slow_send, lambda _: turn, Room(10)).run
        )
        await trio.sleep(10)
        wire.hang_up()
    assert sent_at == []


class Ended(BaseException):
    """Replaces the end of the process."""


async def test_an_error_outside_of_requests_ends_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without dispatchers, its clients would wait for ever."""
    starts = iter(["lifespan.startup"])

    async def fail(_: Queue, *, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        raise RuntimeError("an error of the queue")

    def end(_: str) -> NoReturn:
        raise Ended

    async def receive() -> Any:
        for kind in starts:
            return {"type": kind}
        return await trio.sleep_forever()

    async def send(_: ASGISendEvent) -> None:
        pass

    monkeypatch.setattr(Queue, "run", fail)
    app = GatewayQueue(Settings, end)
    with pytest.raises(Ended):
        await app.asgi_app({"type": "lifespan", "asgi": {}, "state": {}}, receive, send)
