"""The real server, which can be killed and is started again on its port."""

from __future__ import annotations

import signal
from contextlib import ExitStack

import trio

from tests.harness import free_port, serving


class Server:
    """Runs until the end of a stack.

    Args:
      stack: its end stops the server.
      variables: its settings.
    """

    def __init__(self, stack: ExitStack, **variables: object) -> None:
        self.port = free_port()
        self._stack = stack
        self._variables = variables
        self._start()

    async def kill(self) -> None:
        """Kill the server, and start it again."""
        self._running.signal(signal.SIGKILL)
        await trio.to_thread.run_sync(self._running.wait)
        await trio.to_thread.run_sync(self._start)

    def _start(self) -> None:
        self._running = self._stack.enter_context(serving(PORT=self.port, **self._variables))
