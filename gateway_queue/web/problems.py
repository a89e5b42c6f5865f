"""Errors as problem documents (RFC 9457)."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import ClassVar

CONTENT_TYPE = "application/problem+json"


class RequestError(Exception):
    """A request that gets an error at once; the message says why to the client."""

    status: ClassVar[HTTPStatus]
    headers: ClassVar[tuple[tuple[bytes, bytes], ...]] = ()


def problem(status: HTTPStatus, detail: str) -> bytes:
    """Write a problem document without a type of its own: the status says it all."""
    document = {"title": status.phrase, "status": status.value, "detail": detail}
    return json.dumps(document).encode()
