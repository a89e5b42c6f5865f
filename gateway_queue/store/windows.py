"""When each rate limit key opens, in the memory of this process."""

from __future__ import annotations

import math

from gateway_queue.store import Claim


class Windows:
    """The keys that are claimed, or closed until some time. Times are of one monotonic clock.

    Args:
      first_opening: no key opens before this time.
    """

    def __init__(self, first_opening: float) -> None:
        self._first_opening = first_opening
        self._max_concurrency = 1
        # When each key opens; infinite while it is claimed. The key that changed last is the last.
        self._closed: dict[int, float] = {}
        # The same for former numbers of keys, by number and key.
        self._former: dict[tuple[int, int], float] = {}

    def opens_at(self, key: int) -> float:
        """Return when a key opens: not before any former key that shares a shard with it.

        Some shard has key *a* of *m* keys and key *b* of *n* keys if, and only if, the two are
        equal modulo the greatest common divisor of *m* and *n*.
        """
        shared = [
            until
            for (number, former), until in self._former.items()
            if (former - key) % math.gcd(number, self._max_concurrency) == 0
        ]
        return max(self._first_opening, self._closed.get(key, -math.inf), *shared)

    def hold(self, until: float) -> None:
        """Keep all keys closed until some time."""
        self._first_opening = max(self._first_opening, until)

    def claim(self, claim: Claim) -> None:
        """Close a key until :meth:`close` or :meth:`open` is called."""
        self._note(claim, math.inf)

    def close(self, claim: Claim, until: float, now: float) -> None:
        """Close a claimed key until some time, and forget the keys that are open again."""
        self._note(claim, until)
        while self._closed and self._closed[first := next(iter(self._closed))] <= now:
            del self._closed[first]
        self._forget_former(now)

    def open(self, claim: Claim) -> None:
        """Open a claimed key."""
        self._note(claim, -math.inf)

    def regroup(self, max_concurrency: int, now: float) -> None:
        """Change the number of keys; the closed keys of the former number stay closed."""
        for key, until in self._closed.items():
            self._former[self._max_concurrency, key] = until
        self._forget_former(now)
        self._max_concurrency = max_concurrency
        own = [key for number, key in self._former if number == max_concurrency]
        self._closed = {key: self._former.pop((max_concurrency, key)) for key in own}

    def _note(self, claim: Claim, until: float) -> None:
        if claim.max_concurrency == self._max_concurrency:
            self._closed.pop(claim.key, None)
            self._closed[claim.key] = until
        else:
            self._former[claim.max_concurrency, claim.key] = until

    def _forget_former(self, now: float) -> None:
        if self._former:
            self._former = {one: until for one, until in self._former.items() if until > now}
