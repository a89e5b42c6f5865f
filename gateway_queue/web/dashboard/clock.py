"""Times as people read them, and so that the page's script can keep them up to date."""

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
        """Write a time of day, in UTC; the script knows the zone of its reader."""
        if math.isinf(seconds):
            return UNKNOWN
        at = datetime.fromtimestamp(self._now + seconds, UTC)
        day = "" if at.date() == self._today else f"{at:%a} "
        return Markup('<time datetime="{}">{}{} UTC</time>').format(
            f"{at:%Y-%m-%dT%H:%M:%SZ}", day, f"{at:%H:%M:%S}"
        )

    def until(self, seconds: float) -> Markup:
        """Write how long it is until then."""
        if math.isinf(seconds):
            return UNKNOWN
        return Markup('<span data-until="{:.1f}">{}</span>').format(
            self._now + seconds, duration(seconds, 1)
        )

    def since(self, seconds: float) -> Markup:
        """Write how long ago it was."""
        return Markup('<span data-since="{:.1f}">{}</span>').format(
            self._now - seconds, duration(seconds)
        )


def duration(seconds: float, decimals: int = 0) -> str:
    """Write a time of some length as briefly as it can be read."""
    if seconds < 60:
        cut = math.floor(seconds * 10**decimals) / 10**decimals
        return f"{cut:.{decimals}f} s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02} min"
    return f"{minutes // 60} h {minutes % 60:02} min"


def milliseconds(seconds: float) -> str:
    """Write a very short time."""
    return f"{seconds * 1000:.1f} ms"
