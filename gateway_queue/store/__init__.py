"""The window store: when each rate limit key opens next, and nothing else."""

from __future__ import annotations

from typing import Protocol


class WindowStore(Protocol):
    """Remembers the window of each rate limit key.

    A key is open, claimed, or closed until its window has passed. Whoever has claimed a key
    either releases one ticket and starts the window, or gives the key back.
    """

    async def claim(self, key: int) -> float:
        """Claim an open key.

        Returns:
          0 if the key is the caller's now, otherwise the seconds to wait before asking again.
        """

    async def start_window(self, key: int, answered_at: float) -> None:
        """Close a claimed key for one window, counted from the answer.

        Args:
          key: the rate limit key.
          answered_at: when the answer was out, on this process's :func:`trio.current_time`.
        """

    async def give_back(self, key: int) -> None:
        """Open a claimed key again: nobody was there to be released."""
