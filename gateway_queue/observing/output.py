"""The handler of all log lines: it writes them to stderr, and never waits for a reader."""

from __future__ import annotations

import logging
import os
import select
from logging import LogRecord

STDERR = 2

PIPE_BUF = select.PIPE_BUF
"""Bytes that a pipe accepts without blocking once poll reports that it accepts any."""


class Output(logging.Handler):
    """Writes lines to a descriptor. Lines that it does not accept at once are lost, and counted.

    If nothing reads stderr, or not fast enough, a write would block the event loop, and with it all
    releases.

    Args:
      descriptor: a pipe, a terminal, a socket or a file.
    """

    def __init__(self, descriptor: int = STDERR) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._rest = b""
        """The rest of a line whose beginning is written."""
        self._lost = 0

    def emit(self, record: LogRecord) -> None:
        """Write a line if all earlier lines are written; count it as lost otherwise."""
        try:
            self._write_rest()
            if self._rest:
                self._lost += 1
                return
            lines = [record]
            if self._lost:
                lines.insert(0, _loss(self._lost))
                self._lost = 0
            self._rest = "".join(f"{self.format(line)}\n" for line in lines).encode(
                "utf-8", "backslashreplace"
            )
            self._write_rest()
        except Exception:  # noqa: BLE001
            self.handleError(record)

    def _write_rest(self) -> None:
        while self._rest and self._takes_more():
            try:
                written = os.write(self._descriptor, self._rest[:PIPE_BUF])
            except BlockingIOError:
                return
            except OSError:  # the reader is gone
                written = len(self._rest)
            self._rest = self._rest[written:]

    def _takes_more(self) -> bool:
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        return bool(poll.poll(0))


def _loss(count: int) -> LogRecord:
    return logging.makeLogRecord(
        {
            "name": __name__,
            "levelno": logging.WARNING,
            "levelname": "WARNING",
            "msg": f"stderr was full: {count} lines of the log are lost",
        }
    )
