"""Errors as problem documents (RFC 9457)."""

from __future__ import annotations

import json
from http import HTTPStatus

CONTENT_TYPE = "application/problem+json"


def problem(status: HTTPStatus, detail: str) -> bytes:
    """Write a problem document without a type of its own: the status says it all."""
    document = {"title": status.phrase, "status": status.value, "detail": detail}
    return json.dumps(document).encode()
