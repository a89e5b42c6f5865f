"""Writes the page: HTML that is complete without its script, and its content security policy."""

from __future__ import annotations

import socket
from base64 import b64encode
from collections.abc import Mapping, Sequence
from hashlib import sha256
from importlib.resources import files
from urllib.parse import quote

import trio
from jinja2 import Environment, PackageLoader

from gateway_queue.about import URL, __version__
from gateway_queue.web.dashboard.clock import Clock, duration, milliseconds
from gateway_queue.web.dashboard.snapshot import WINDOWS_AHEAD, WINDOWS_BEHIND, Snapshot
from gateway_queue.web.summary import BotSummary

PIECES_AT_ONCE = 100
"""Pieces of the page to write in one step, in a fifth of a millisecond. A whole page takes 4 ms."""


class Page:
    """Writes snapshots as HTML, with style and script inside: any other path would be a ticket."""

    def __init__(self) -> None:
        here = files("gateway_queue.web.dashboard")
        style, script = ((here / name).read_text("utf-8") for name in ("page.css", "page.js"))
        self.security_policy = "; ".join(
            (
                "default-src 'none'",
                f"style-src {_source(style)}",
                f"script-src {_source(script)}",
                "img-src data:",
                "connect-src 'self'",
                "base-uri 'none'",
                "form-action 'none'",
                "frame-ancestors 'none'",
            )
        )
        environment = Environment(
            loader=PackageLoader("gateway_queue.web", "dashboard"),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters.update(duration=duration, milliseconds=milliseconds, shard=shard)
        environment.globals.update(
            style=style,
            script=script,
            build=_digest(style + script),
            version=__version__,
            behind=WINDOWS_BEHIND,
            ahead=WINDOWS_AHEAD,
            bars=bars,
            icon=lambda *, trouble=False: f"data:image/svg+xml,{quote(icon(trouble=trouble))}",
            url=URL,
            host=socket.gethostname(),
        )
        self._page = environment.get_template("page.html")
        self._live = environment.get_template("live.html")

    def whole(
        self, snapshot: Snapshot, labels: Mapping[str, str], bots: Sequence[BotSummary]
    ) -> str:
        """Write the whole page.

        Args:
          snapshot: of the queue.
          labels: of the bot whose queue it is.
          bots: to list before the queue.
        """
        return self._page.render(_context(snapshot, labels, bots))

    async def live(
        self, snapshot: Snapshot, labels: Mapping[str, str], bots: Sequence[BotSummary]
    ) -> str:
        """Write the part of the page that changes, in steps, so that no release waits for it."""
        written: list[str] = []
        for piece in self._live.generate(_context(snapshot, labels, bots)):
            if len(written) % PIECES_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
            written.append(piece)
        return "".join(written)


def _context(
    snapshot: Snapshot, labels: Mapping[str, str], bots: Sequence[BotSummary]
) -> dict[str, object]:
    return {**labels, "now": snapshot, "clock": Clock(snapshot.taken_at), "bots": bots}


def icon(*, trouble: bool = False) -> str:
    """Draw the icon as SVG, red if something is wrong."""
    color = "#d83c3e" if trouble else "#5865f2"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">'
        f'<rect width="16" height="16" rx="4" fill="{color}"/><g fill="#fff">'
        '<circle cx="3.6" cy="8" r="1.2" opacity=".6"/><circle cx="7" cy="8" r="1.2" opacity=".8"/>'
        '<rect x="9.4" y="3.5" width="1.2" height="9" rx=".6"/><circle cx="13" cy="8" r="1.2"/>'
        "</g></svg>"
    )


def shard(number: int | None) -> str:
    """Name a shard."""
    return "not named" if number is None else str(number)


def bars(times: list[float], length: float) -> str:
    """Write the SVG path of horizontal bars: one begins at each time."""
    return "".join(f"M{at:.2f} .5h{length:.4g}" for at in times)


def _digest(text: str) -> str:
    return b64encode(sha256(text.encode()).digest()).decode()


def _source(text: str) -> str:
    return f"'sha256-{_digest(text)}'"
