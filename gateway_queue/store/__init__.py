"""The window store: what has to be known of earlier releases before the next one.

When each rate limit key opens, how many session starts the day has left, and which shards start so
often that they have to wait.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

IN_FLIGHT_WINDOWS = 6
"""A released shard has identified after so many windows, or it will not any more. Until then
Discord's figure may be without it."""

USUAL_TOTAL = 1000
"""Session starts a day that Discord grants all but the largest bots."""

Source = Literal["discord", "configured"]


@dataclass(frozen=True)
class Refusal:
    """A claim that failed."""

    seconds: float
    """Ask again after this time."""
    concerns: Literal["key", "shard"]
    """Whether nobody with this key may start now, or only this shard may not."""


@dataclass(frozen=True)
class Allowance:
    """The session starts that Discord grants, as it has said at some time.

    Times are of :func:`trio.current_time`.
    """

    total: int
    remaining: int
    resets_at: float
    asked_at: float
    """When it was asked: starts since then, and those just before, are not in ``remaining``."""


@dataclass(frozen=True)
class SessionStarts:
    """The day's session starts."""

    used: int
    total: int | None
    """How many there may be; None where no limit is known."""
    enforced: bool
    resets_in: float
    """Seconds until some of those used are free again."""
    source: Source | None

    @property
    def remaining(self) -> int | None:
        return None if self.total is None else max(0, self.total - self.used)

    @property
    def spent(self) -> bool:
        """Whether nobody may start before the reset."""
        return self.enforced and self.remaining == 0


class WindowStore(Protocol):
    """Remembers releases.

    Whoever has claimed a key either releases one ticket and starts the window, or gives the key
    back. A claim takes one of the day's session starts along.
    """

    async def claim(self, key: int, shard: int | None) -> Refusal | None:
        """Claim an open key for a shard.

        Returns:
          None if the key is the caller's now.
        """

    async def start_window(self, key: int, shard: int | None, answered_at: float) -> None:
        """Count a start, and close its key for one window from the answer.

        Args:
          key: the rate limit key.
          shard: whose start it is; None if the client did not say.
          answered_at: when the answer was out, on this process's :func:`trio.current_time`.
        """

    async def give_back(self, key: int) -> None:
        """Open a claimed key again: nobody was there to be released."""

    async def regroup(self, max_concurrency: int) -> None:
        """Change the number of rate limit keys, while none is claimed.

        A key that shares a shard with a closed one of before opens no sooner than that.
        """

    async def allow(self, allowance: Allowance) -> None:
        """Take over what Discord says of the day's session starts."""

    def session_starts(self) -> SessionStarts:
        """Tell what is known here of the day's session starts."""
