"""Authorization: requests need the token, if there is one."""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Iterable
from http import HTTPStatus

from gateway_queue.web.problems import RequestError

Headers = Iterable[tuple[bytes, bytes]]


class Unauthorized(RequestError):
    """A request without the token, or with a wrong one."""

    status = HTTPStatus.UNAUTHORIZED
    # Basic, so that a browser can ask its user for the token.
    headers = (
        (b"www-authenticate", b'Bearer realm="gateway-queue"'),
        (b"www-authenticate", b'Basic realm="gateway-queue", charset="UTF-8"'),
    )


class Guard:
    """Checks requests for a token.

    Args:
      tokens: the accepted tokens; each None is ignored. Without any, every request is accepted.
    """

    def __init__(self, *tokens: str | None) -> None:
        self._tokens = [token.encode() for token in tokens if token is not None]

    def check(self, headers: Headers) -> None:
        """Check the headers of a request.

        Raises:
          Unauthorized: they do not contain an accepted token.
        """
        if not self._tokens:
            return
        credentials = [value for name, value in headers if name == b"authorization"]
        if len(credentials) != 1:
            raise Unauthorized(
                "this queue needs a token: send Authorization: Bearer TOKEN, "
                "or Basic with the token as the password"
            )
        given = _token_in(credentials[0])
        if given is None:
            raise Unauthorized(
                "the authorization scheme must be Bearer or Basic: send Authorization: Bearer TOKEN"
            )
        if not any(hmac.compare_digest(given, token) for token in self._tokens):
            raise Unauthorized("the token is wrong")


def _token_in(credentials: bytes) -> bytes | None:
    """Return the token of Bearer credentials, or the password of Basic credentials of any user.

    Return None for any other scheme.
    """
    scheme, _, value = credentials.partition(b" ")
    match scheme.lower():
        case b"bearer":
            return value.strip()
        case b"basic":
            try:
                return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
            except binascii.Error:
                return b""
        case _:
            return None
