"""The real app under the real Hypercorn, over in-memory connections, on any clock of trio's.

On a mock clock it runs much faster than real time, see :mod:`tests.exploration.wire_run`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import NoReturn, cast
from unittest.mock import patch

import hypercorn.trio.run
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.lifespan import Lifespan
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ASGIFramework, ConnectionState, LifespanState

from gateway_queue import server
from gateway_queue.__main__ import GRACE_SECONDS
from gateway_queue.serving.hypercorn import install
from gateway_queue.settings import Settings
from gateway_queue.web import app
from gateway_queue.web.app import GatewayQueue
from gateway_queue.web.dashboard.page import Page
from tests.exploration.wire_stream import ClientEnd, ServerEnd, connection

DATE = "Thu, 01 Jan 1970 00:00:00 GMT"
"""The date of all answers in the context of :func:`repeatable`."""


class Refusal(BaseException):
    """The process cannot serve."""


class WireReplica:
    """One process of the server.

    Args:
      settings: the settings from its environment.
    """

    def __init__(self, settings: Settings) -> None:
        install()
        self.app = GatewayQueue(lambda: settings, self._refuse)
        self.refused: str | None = None
        """Why it could not serve, if so."""
        self.accepts = False
        self.ended = trio.Event()
        self.ends: dict[ServerEnd, None] = {}
        """Its connections. Not a set, because the order of a set differs from run to run."""
        self._wrapped = ASGIWrapper(cast("ASGIFramework", self.app))
        self._config = Config.from_object(server)
        self._state: LifespanState = {}
        self._context = WorkerContext(None)
        self._lifespan = Lifespan(self._wrapped, self._config, self._state)
        self._scope = trio.CancelScope()
        self._ice: trio.Event | None = None
        self._accepted = 0
        self._hang_ups = trio.lowlevel.ParkingLot()
        self._nursery: trio.Nursery
        self._connections: trio.Nursery

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until stopped or killed, as Hypercorn's ``worker_serve`` does."""
        try:
            with self._scope:
                async with trio.open_nursery() as self._nursery:
                    await self._nursery.start(self._lifespan.handle_lifespan)
                    await self._lifespan.wait_for_startup()
                    async with trio.open_nursery() as self._connections:
                        self.accepts = True
                        task_status.started()
                        await trio.sleep_forever()
        except* Refusal:
            pass
        finally:
            self._hang_up()
            self.ended.set()

    def connect(
        self, *, up: float = 0.0, down: float = 0.0, capacity: int = 65_536
    ) -> tuple[ClientEnd, ServerEnd]:
        """Open a connection, see :func:`~tests.exploration.wire_stream.connection`.

        Raises:
          ConnectionRefusedError: the replica does not listen.
        """
        if not self.accepts:
            raise ConnectionRefusedError
        self._accepted += 1
        client, end = connection(self._accepted, up=up, down=down, capacity=capacity)
        end.thawed = self._thawed
        self.ends[end] = None
        self._connections.start_soon(self._serve, end)
        return client, end

    async def _serve(self, end: ServerEnd) -> None:
        serve = hypercorn.trio.run.TCPServer  # type: ignore[attr-defined]  # the class that the app has put there
        state = ConnectionState(self._state.copy())
        try:
            await serve(
                self._wrapped,
                self._config,
                self._context,
                state,
                cast("trio.SSLStream[trio.SocketStream]", end),
            )
        finally:
            end.close()
            self.ends.pop(end, None)
            self._hang_ups.unpark_all()

    def freeze(self) -> None:
        """Stop its reads and writes. Its timers go on, unlike after SIGSTOP."""
        self._ice = self._ice or trio.Event()

    def thaw(self) -> None:
        if self._ice is not None:
            self._ice.set()
            self._ice = None

    async def _thawed(self) -> None:
        while self._ice is not None:
            await self._ice.wait()

    async def stop(self) -> None:
        """End it as SIGTERM ends the command."""
        self.accepts = False
        with trio.move_on_after(GRACE_SECONDS):
            await self.app.bots.close()
        await self.stop_hypercorn()

    async def stop_hypercorn(self) -> None:
        """End it as SIGTERM ends Hypercorn's command."""
        self.accepts = False
        await self._context.terminated.set()
        grace = self._config.graceful_timeout
        self._connections.cancel_scope.deadline = trio.current_time() + grace
        while self.ends:
            await self._hang_ups.park()
        await self._lifespan.wait_for_shutdown()
        self.kill()
        await self.ended.wait()

    def kill(self) -> None:
        """End it as SIGKILL does: it sends nothing more."""
        self._hang_up()
        self._scope.cancel()

    def _hang_up(self) -> None:
        self.accepts = False
        for end in list(self.ends):
            end.close()

    def tasks(self) -> list[str]:
        """Return the names of its tasks, including those of connections."""
        names: list[str] = []
        nurseries = [self._nursery]
        while nurseries:
            for task in nurseries.pop().child_tasks:
                names.append(task.name)
                nurseries += task.child_nurseries
        return sorted(names)

    def _refuse(self, line: str) -> NoReturn:
        self.refused = line
        self.kill()
        raise Refusal(line)


@cache
def _page() -> Page:
    """Return the same page for all replicas: its templates take longer to compile than a run."""
    return Page()


@contextmanager
def repeatable(seed: int) -> Iterator[None]:
    """Make a run on a mock clock repeat exactly with the same seed.

    Without this, Trio's scheduler and deadlines, the kernel's keep-alive times (``randint``) and
    the date in answers differ from run to run.
    """
    state = random.getstate()
    random.seed(seed)
    core = trio._core._run  # noqa: SLF001
    core._r.seed(seed)  # noqa: SLF001
    with ExitStack() as stack:
        stack.enter_context(patch.object(core, "_ALLOW_DETERMINISTIC_SCHEDULING", new=True))
        stack.enter_context(patch("hypercorn.config.time", return_value=0.0))
        stack.enter_context(patch.object(app, "Page", _page))
        yield
    random.setstate(state)
