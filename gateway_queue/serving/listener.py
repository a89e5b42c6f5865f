"""The listening sockets of the command."""

from __future__ import annotations

import errno
import socket

from gateway_queue.settings import BadSetting

NOT_HERE = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}
"""Errors of an address that this machine does not have, for example without IPv6."""


def listen(host: str, port: int, backlog: int) -> list[socket.socket]:
    """Bind and listen.

    Args:
      host: the name of the addresses to bind; ``localhost`` has two on many machines.
      port: the same for all addresses; 0 picks a free port.
      backlog: connections that the kernel keeps ready.

    Raises:
      BadSetting: this machine has no such host.
      OSError: an address cannot be bound, most often because it is in use.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError):
        raise _no_such(host) from None
    listeners: list[socket.socket] = []
    for family, address in dict.fromkeys((family, to[0]) for family, *_, to in found):
        try:
            listeners.append(_listen(family, str(address), port, backlog))
        except OSError as error:
            if error.errno not in NOT_HERE:
                raise
        else:
            port = listeners[0].getsockname()[1]
    if not listeners:
        raise _no_such(host)
    return listeners


def address(listener: socket.socket) -> str:
    """Return the address of a listening socket as text."""
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _listen(family: int, address: str, port: int, backlog: int) -> socket.socket:
    # The IPv6 wildcard includes IPv4, as in most servers.
    listener = socket.create_server(
        (address, port), family=family, backlog=backlog, dualstack_ipv6=address == "::"
    )
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _no_such(host: str) -> BadSetting:
    return BadSetting("HOST", f"must be an address or a host name of this machine, not {host!r}")
