"""The releases of the last window, over all keys, in the memory of this process."""

from __future__ import annotations

from bisect import insort


class Pace:
    """Limits the releases in any one window over all keys. Times are in seconds, of one clock.

    Args:
      window: the length of a window.
      most: how many releases one window may have; None limits none.
    """

    def __init__(self, window: float, most: int | None) -> None:
        self._window = window
        self._most = most
        self._claimed = 0
        self._over_at: list[float] = []
        """When the window after each release is over."""

    def change(self, window: float, most: int | None) -> None:
        """Change the limits, see the constructor. Earlier releases stay counted."""
        self._window = window
        self._most = most

    def wait(self, now: float) -> float:
        """Return for how many seconds no key may be claimed; 0 if a key may be claimed now."""
        while self._over_at and self._over_at[0] <= now:
            del self._over_at[0]
        if self._most is None or len(self._over_at) + self._claimed < self._most:
            return 0.0
        # The window of a claimed release ends no earlier than one window from now.
        return self._over_at[0] - now if self._over_at else self._window

    def claim(self) -> None:
        """Count a release that is about to happen."""
        self._claimed += 1

    def give_back(self) -> None:
        """Take back a claimed release that did not happen."""
        self._claimed -= 1

    def start(self, until: float) -> None:
        """Count a claimed release that has happened, until its window is over."""
        self._claimed -= 1
        if self._most is not None:
            insort(self._over_at, until)
