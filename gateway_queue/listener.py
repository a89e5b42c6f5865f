"""The listening socket of the command."""

from __future__ import annotations

import errno
import socket

from gateway_queue.settings import BadSetting

KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_USER_TIMEOUT": 20_000}
"""Finds out clients that vanished without a word: the kernel asks after 10 s of silence and every
5 s from then on, and gives up after 20 s, as it does on an answer that nobody acknowledges."""


def listen(host: str, port: int, backlog: int) -> socket.socket:
    """Bind and listen, with options that every accepted connection inherits.

    Raises:
      BadSetting: this machine has no such host.
      OSError: the address cannot be bound, most often because it is in use.
    """
    try:
        (family, *_, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        # The wildcard of IPv6 stands for IPv4 too, as it does for most servers.
        listener = socket.create_server(
            address[:2], family=family, backlog=backlog, dualstack_ipv6=address[0] == "::"
        )
    except (socket.gaierror, UnicodeError):
        raise _no_such(host) from None
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            raise _no_such(host) from None
        raise
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option, value in KEEP_ALIVE.items():
        if hasattr(socket, option):  # all are Linux's, some are others' too
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return listener


def _no_such(host: str) -> BadSetting:
    return BadSetting("HOST", repr(host), "an address or a host name of this machine")
