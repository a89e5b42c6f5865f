"""TCP keep-alive: finds clients that vanished without closing their connections."""

from __future__ import annotations

import socket
from contextlib import suppress
from random import randint

import trio

IDLE_SECONDS = (5, 18)
"""How long a client may be silent until the kernel asks after it: for each client another time
between these. A kernel that asks after all of a fleet at once drops what is more than it can keep
(net.core.netdev_max_backlog, 1000 on most machines), and clients that are there seem not to be."""

INTERVAL_SECONDS = 3
"""How long until it asks again, if there is no answer."""

PATIENCE_SECONDS = 25
"""How long without an answer until the kernel closes the connection. It asks every client at least
three times, and is done within 30 s."""


def keep_alive(stream: trio.SocketStream) -> None:
    """Let the kernel watch over a connection; a Unix socket needs no such thing."""
    with suppress(OSError):
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (
            ("TCP_KEEPIDLE", randint(*IDLE_SECONDS)),  # noqa: S311
            ("TCP_KEEPINTVL", INTERVAL_SECONDS),
            ("TCP_USER_TIMEOUT", PATIENCE_SECONDS * 1000),
        ):
            if hasattr(socket, name):  # all are Linux's, some are others' too
                stream.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
