"""Hypercorn's protocols as the server changes them, without a socket."""

from __future__ import annotations

from typing import Any, NoReturn

import h2.config
import h2.connection
import h2.events
import pytest
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState
from trio.testing import wait_all_tasks_blocked

from gateway_queue.serving import hypercorn
from gateway_queue.serving.hypercorn.http1 import HTTP1
from gateway_queue.serving.hypercorn.http2 import HTTP2
from gateway_queue.serving.hypercorn.requests import Requests
from tests.harness import REQUEST
from tests.test_http2 import GET


async def end(*_: object) -> None:
    """End without an answer."""


async def fail(*_: object) -> NoReturn:
    raise RuntimeError


async def fail_in_a_group(*_: object) -> NoReturn:
    raise ExceptionGroup("", [RuntimeError(), ValueError()])


async def stall(*_: object) -> None:
    await trio.sleep_forever()


async def sent_to_client(app: Any, protocol_class: Any, request: bytes) -> list[Event]:
    """Send one request, stop the server once the app has nothing left to do, and return all events.

    The fake connection writes at once: it has no point where a cancelled task would be stopped.
    """
    hypercorn.install()
    events = list[Event]()

    async def send(event: Event) -> None:
        events.append(event)
        if isinstance(event, Closed):
            await protocol.handle(event)

    config = Config()
    config.errorlog = None
    tasks = Requests()
    async with tasks:
        protocol = protocol_class(
            *(ASGIWrapper(app), config, WorkerContext(None), tasks, ConnectionState({})),
            *(False, None, None, send),
        )
        await protocol.initiate()
        await protocol.handle(RawData(request))
        await wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    return events


def raw(events: list[Event]) -> bytes:
    return b"".join(event.data for event in events if isinstance(event, RawData))


@pytest.mark.parametrize("app", [end, fail, fail_in_a_group, stall])
async def test_hypercorn_answers_no_http_1_request_for_the_app(app: Any) -> None:
    events = await sent_to_client(app, HTTP1, REQUEST)
    assert raw(events) == b""
    assert any(isinstance(event, Closed) for event in events) == (app is not stall)


@pytest.mark.parametrize("app", [end, fail, fail_in_a_group, stall])
@pytest.mark.parametrize("has_body", [False, True])
async def test_hypercorn_answers_no_http_2_request_for_the_app(app: Any, has_body: bool) -> None:
    """The tasks of requests that come at once start in their order."""
    client = h2.connection.H2Connection(h2.config.H2Configuration())
    client.initiate_connection()
    ids = range(1, 17, 2)
    for stream_id in ids:
        client.send_headers(stream_id, GET, end_stream=not has_body)
    events = await sent_to_client(app, HTTP2, client.data_to_send())
    received = client.receive_data(raw(events))
    assert not any(isinstance(event, h2.events.ResponseReceived) for event in received)
    resets = [event.stream_id for event in received if isinstance(event, h2.events.StreamReset)]
    assert resets == ([] if app is stall else list(ids))
    assert not any(isinstance(event, Closed) for event in events)
