"""Writes times for people, in a form that the page's script can keep up to date."""

from __future__ import annotations

import math
from datetime import UTC, datetime

from markupsafe import Markup

UNKNOWN = Markup("—")


class Clock:
    """Writes times, in seconds from one moment, as HTML.

    Args:
      now: the moment, in seconds since the epoch.
    """

    def __init__(self, now: float) -> None:
        self._now = now
        self._today = datetime.fromtimestamp(now, UTC).date()

    def time(self, seconds: float) -> Markup:
        """Write a time of day, in UTC; the script converts it to the reader's time zone."""
        if math.isinf(seconds):
            return UNKNOWN
        at = datetime.fromtimestamp(self._now + seconds, UTC)
        day = "" if at.date() == self._today else f"{at:%a} "
        return Markup('<time datetime="{}">{}{} UTC</time>').format(
            f"{at:%Y-%m-%dT%H:%M:%SZ}", day, f"{at:%H:%M:%S}"
        )

    def until(self, seconds: float) -> Markup:
        """Write a number of seconds as the time until a moment."""
        if math.isinf(seconds):
            return UNKNOWN
        return Markup('<span data-until="{:.1f}">{}</span>').format(
            self._now + seconds, duration(seconds, 1)
        )

    def since(self, seconds: float) -> Markup:
        """Write a number of seconds as the time since a moment."""
        return Markup('<span data-since="{:.1f}">{}</span>').format(
            self._now - seconds, duration(seconds)
        )


def duration(seconds: float, decimals: int = 0) -> str:
    """Write a duration in a short form."""
    if seconds < 60:
        cut = math.floor(seconds * 10**decimals) / 10**decimals
        return f"{cut:.{decimals}f} s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02} min"
    return f"{minutes // 60} h {minutes % 60:02} min"


def milliseconds(seconds: float) -> str:
    """Write a duration in milliseconds."""
    return f"{seconds * 1000:.1f} ms"
