"""A stand-in for Discord. This module has its HTTP API, which can also fail, others its gateway.

Of the API, it has the part that the queue and the libraries request when they start.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "MTk4NjIyNDgzNDcxOTI1MjQ4.Cl2FMQ.ZnCjm1XVW7vRze4b7Cq4se7kKWs"

USER = {
    "id": "198622483471925248",
    "username": "bot",
    "discriminator": "0",
    "global_name": None,
    "avatar": None,
    "bot": True,
    "mfa_enabled": True,
    "verified": True,
    "email": None,
    "flags": 0,
}
APPLICATION = {
    "id": USER["id"],
    "name": "bot",
    "icon": None,
    "description": "",
    "summary": "",
    "bot_public": True,
    "bot_require_code_grant": False,
    "verify_key": "",
    "flags": 0,
    "owner": USER,
}

Trick = Callable[[BaseHTTPRequestHandler], None]
"""Answers one request in another way than Discord usually does."""


@dataclass
class FakeDiscord:
    """The answers of the API, and the requests that it got."""

    total: int = 1000
    remaining: int = 1000
    reset_after: int = 86_400_000
    """Milliseconds, as in the answer of Discord."""
    max_concurrency: int = 1
    tricks: deque[Trick] = field(default_factory=deque)
    """How to answer the next requests, one trick for each."""
    requests: list[tuple[float, str, dict[str, str]]] = field(default_factory=list)
    """Time, path and headers of each request."""
    url: str = ""
    gateway_url: str = "wss://x"

    def documents(self) -> dict[str, Any]:
        """Return Discord's usual answers, by the last part of the path."""
        limit = {
            "total": self.total,
            "remaining": self.remaining,
            "reset_after": self.reset_after,
            "max_concurrency": self.max_concurrency,
        }
        gateway = {"url": self.gateway_url, "shards": 9, "session_start_limit": limit}
        return {
            "/gateway": {"url": self.gateway_url},
            "/gateway/bot": gateway,
            "/users/@me": USER,
            "/oauth2/applications/@me": APPLICATION,
        }

    def answer_to(self, path: str) -> Trick:
        """Return Discord's usual answer to a path."""
        for end, document in self.documents().items():
            if path.endswith(end):
                return answer(200, json.dumps(document).encode(), content_type="application/json")
        return answer(404)

    def variables(self, **variables: object) -> dict[str, object]:
        """Return the environment variables with which a server asks this stand-in."""
        return {"DISCORD_TOKEN": TOKEN, "DISCORD_API_URL": self.url, **variables}


def answer(status: int, body: bytes = b"{}", **headers: str) -> Trick:
    """Answer with a status, a body and headers."""

    def act(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.send_header("content-length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    return act


def raw(data: bytes) -> Trick:
    """Write some bytes, and close the connection."""

    def act(request: BaseHTTPRequestHandler) -> None:
        request.wfile.write(data)
        request.close_connection = True

    return act


def after(event: threading.Event, trick: Trick) -> Trick:
    """Wait for an event before the answer."""

    def act(request: BaseHTTPRequestHandler) -> None:
        event.wait(20)
        trick(request)

    return act


@contextmanager
def playing(**figures: int) -> Iterator[FakeDiscord]:
    """Run the stand-in until the end of the context."""
    discord = FakeDiscord(**figures)  # type: ignore[arg-type]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            discord.requests.append((time.monotonic(), self.path, headers))
            trick = discord.tricks.popleft() if discord.tricks else None
            (trick or discord.answer_to(self.path))(self)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        discord.url = f"http://127.0.0.1:{server.server_port}/api/v10"
        thread = threading.Thread(target=server.serve_forever, args=[0.05])
        thread.start()
        try:
            yield discord
        finally:
            server.shutdown()
            thread.join()
