"""Keeps pages of other sites from reading a server on the same machine as the browser."""

from __future__ import annotations

import re
from contextlib import suppress
from http import HTTPStatus
from ipaddress import ip_address

from hypercorn.typing import HTTPScope

from gateway_queue.web.problems import RequestError


class OtherHost(RequestError):
    """A request names a host that is not this machine."""

    status = HTTPStatus.MISDIRECTED_REQUEST


def check_host(scope: HTTPScope) -> None:
    """Check the Host header of a request over the loopback interface.

    A site can make its own name resolve to 127.0.0.1. Then a browser lets pages of this site read
    the server's answers. A name without dots belongs to no site.

    Raises:
      OtherHost: the header has neither an address nor a local name.
    """
    if not scope["server"] or not _is_loopback(scope["server"][0]):
        return
    for name, value in scope["headers"]:
        if name == b"host" and not _is_local(value.decode("latin-1")):
            raise OtherHost(
                "this host name is not accepted over the loopback interface: use localhost, "
                "or set AUTH_TOKEN"
            )


def _is_loopback(address: str) -> bool:
    with suppress(ValueError):
        return ip_address(address).is_loopback
    return False


def _is_local(host: str) -> bool:
    name = re.sub(r":[0-9]*\Z", "", host).strip("[]").removesuffix(".").lower()
    if "." not in name or name.endswith(".localhost"):
        return True
    with suppress(ValueError):
        return bool(ip_address(name))
    return False
