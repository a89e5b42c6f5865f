"""Trio's event loop, as the server changes it."""

from __future__ import annotations

import socket
import sys
from contextlib import ExitStack
from itertools import chain

import trio
from trio.testing import wait_all_tasks_blocked

from gateway_queue.serving import event_loop
from tests.harness import GO, serving

WITH_ANOTHER_TRIO = """
import sys, types, trio
module = types.ModuleType("trio._core._run")
vars(module).update(vars(sys.modules[module.__name__]))
del module.GLOBAL_RUN_CONTEXT
sys.modules[module.__name__] = module
from gateway_queue.__main__ import main
main([])
"""


async def test_readable_sockets_take_turns() -> None:
    """A task that becomes due waits for a few of them, not for all."""
    event_loop.install()
    woken = list[socket.socket]()

    async def wait(sock: socket.socket) -> None:
        await trio.lowlevel.wait_readable(sock)
        woken.append(sock)

    pairs = [socket.socketpair() for _ in range(50)]
    with ExitStack() as stack:
        for sock in chain(*pairs):
            stack.enter_context(sock)
        async with trio.open_nursery() as nursery:
            for here, _ in pairs:
                nursery.start_soon(wait, here)
            await wait_all_tasks_blocked()
            for _, there in pairs:
                there.send(b"news")
            while len(woken) < len(pairs):
                before = len(woken)
                await trio.lowlevel.checkpoint()
                # Tasks run in any order, so those of two polls may run between two steps.
                assert len(woken) - before <= 2 * event_loop.EVENTS_AT_ONCE


def test_a_renamed_part_of_trio_costs_one_warning() -> None:
    with serving(sys.executable, "-c", WITH_ANOTHER_TRIO, WINDOW_SECONDS=0.01) as server:
        assert server.connect().answer().body == GO
    (warning,) = [line for line in server.lines if "warning" in line]
    assert "GLOBAL_RUN_CONTEXT" in warning
