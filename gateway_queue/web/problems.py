"""Errors as problem documents (RFC 9457)."""

from __future__ import annotations

import html
import json
from http import HTTPStatus
from typing import ClassVar

CONTENT_TYPE = "application/problem+json"


class RequestError(Exception):
    """A request that gets an error at once; the message tells the client why."""

    status: ClassVar[HTTPStatus]
    headers: ClassVar[tuple[tuple[bytes, bytes], ...]] = ()


def problem(status: HTTPStatus, detail: str) -> bytes:
    """Write a problem document without its own type: the status is enough."""
    document = {"title": status.phrase, "status": status.value, "detail": detail}
    return json.dumps(document).encode()


def page(status: HTTPStatus, detail: str) -> bytes:
    """Write a problem as HTML, for a browser."""
    title = f"{status.value} {status.phrase}"
    hint = "<p>Reload this page, and enter the token as the password, with any user name."
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="color-scheme" content="light dark">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>body{{font:1.125rem/1.5 system-ui;margin:15vh auto;"
        "max-width:36rem;padding:0 1rem}</style>"
        f"<h1>{title}</h1><p>{html.escape(detail)}</p>"
        f"{hint if status is HTTPStatus.UNAUTHORIZED else ''}"
    ).encode()
