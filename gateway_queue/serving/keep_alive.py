"""TCP keep-alive: finds clients that vanished without closing their connections."""

from __future__ import annotations

import socket
from contextlib import suppress
from random import randint

import trio

IDLE_SECONDS = (5, 18)
"""Seconds for which a client may be silent until the kernel probes it: a random time between these
for each client. If the kernel probed a whole fleet at once, it would drop all packets over
net.core.netdev_max_backlog (1000 on most machines), and connected clients would seem to be gone."""

INTERVAL_SECONDS = 3
"""Seconds until the kernel sends another probe, if there is no answer."""

PATIENCE_SECONDS = 25
"""Seconds without an answer until the kernel closes the connection. It sends every client at least
three probes, and closes the connection of a vanished one within 30 s."""


def keep_alive(stream: trio.SocketStream) -> None:
    """Turn on TCP keep-alive for a connection; a Unix socket does not need it."""
    with suppress(OSError):
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (
            ("TCP_KEEPIDLE", randint(*IDLE_SECONDS)),  # noqa: S311
            ("TCP_KEEPINTVL", INTERVAL_SECONDS),
            ("TCP_USER_TIMEOUT", PATIENCE_SECONDS * 1000),
        ):
            if hasattr(socket, name):  # Linux has all of these, other systems have some
                stream.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
