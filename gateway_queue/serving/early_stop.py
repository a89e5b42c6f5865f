"""Handles SIGTERM while the program still imports its modules."""

from __future__ import annotations

import os
import signal
import sys

FIRST_PROCESS = 1


def end_at_sigterm() -> None:
    """Let SIGTERM end the first process of a container, as it ends any other process.

    Linux ignores a signal to process 1 that has no handler, so `docker stop` during the first
    second would have to kill it 10 s later. The server sets its own handler when it serves.
    """
    if os.getpid() == FIRST_PROCESS and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
