"""When each rate limit key opens, in the memory of this process."""

from __future__ import annotations

import math


class Windows:
    """The closed windows. Times are of one monotonic clock, in seconds.

    Args:
      first_opening: no key opens before.
    """

    def __init__(self, first_opening: float) -> None:
        self._first_opening = first_opening
        # By key, the one that opens next in front: all windows are of the same length.
        self._closed: dict[int, float] = {}
        # Those of before the number of keys changed: by key modulo what the numbers have in common.
        self._inherited: dict[int, float] = {}
        self._modulus = 1

    def opens_at(self, key: int) -> float:
        return max(
            self._first_opening,
            self._closed.get(key, -math.inf),
            self._inherited.get(key % self._modulus, -math.inf),
        )

    def close(self, key: int, until: float, now: float) -> None:
        """Close a key, and forget those that are open again."""
        self._closed.pop(key, None)
        self._closed[key] = until
        while self._closed and self._closed[first := next(iter(self._closed))] <= now:
            del self._closed[first]

    def regroup(self, former: int, latter: int, now: float) -> None:
        """Carry the windows over to another number of keys.

        Some shard has key *a* of ``former`` and key *b* of ``latter`` if, and only if, the two are
        equal modulo the greatest common divisor of both numbers.
        """
        still_closed = [
            (key, until)
            for windows in (self._closed, self._inherited)
            for key, until in windows.items()
            if until > now
        ]
        inherits = any(until > now for until in self._inherited.values())
        self._modulus = math.gcd(former, latter, self._modulus if inherits else 0)
        self._closed, self._inherited = {}, {}
        for key, until in still_closed:
            residue = key % self._modulus
            self._inherited[residue] = max(until, self._inherited.get(residue, until))
