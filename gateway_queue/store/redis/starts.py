"""The session starts of the day that a replica knows, to restore what the server has lost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

from gateway_queue.store.budget import DAY
from gateway_queue.store.redis.script import shard_of
from gateway_queue.store.starts_by_shard import StartsByShard

KEPT_STARTS = 10_000
"""Session starts to remember: more than any bot may have between two answers of Discord."""

STARTS_AT_ONCE = 500
"""Session starts in one command: a long one would make the other replicas wait."""

T = TypeVar("T")


class KnownStarts:
    """The times of session starts by the tokens of their claims, also those of other replicas.

    Times are of :func:`trio.current_time`.

    Args:
      replica: the first part of this replica's own tokens.
      limit: the user's own limit of the starts of a day.
    """

    def __init__(self, replica: str, limit: int | None) -> None:
        self._replica = replica
        self.keep(limit)
        self._times: dict[str, float] = {}
        self.by_shard = StartsByShard()
        """Includes the starts that need not be restored any more."""
        # The last own claims that will not be used.
        self._unused: dict[str, None] = {}

    def keep(self, limit: int | None) -> None:
        """Change how many starts are remembered: at least as many as the limit."""
        self._kept = max(KEPT_STARTS, limit or 0)

    def add(self, token: str, at: float) -> None:
        """Remember a start, and forget the starts that are a day older."""
        self._times[token] = at
        self.by_shard.add(token, shard_of(token), at)
        while len(self._times) > self._kept or self._oldest() + DAY <= at:
            del self._times[next(iter(self._times))]

    def _oldest(self) -> float:
        return next(iter(self._times.values()))

    def forget_until(self, time: float) -> None:
        """Forget all starts up to some time."""
        self._times = {token: at for token, at in self._times.items() if at > time}

    def add_unused(self, token: str) -> None:
        """Remember that an own claim will not be used."""
        self._unused[token] = None
        if len(self._unused) > KEPT_STARTS:
            del self._unused[next(iter(self._unused))]

    def compare(self, listed: dict[str, float], since: float | None) -> None:
        """Update the starts of other replicas from the server's list.

        A start is listed from its claim on, so one that is not listed any more was given back.

        Args:
          listed: the starts on the server by token.
          since: from when on the list is complete; None if it may lack starts.
        """
        of_others = {token: at for token, at in listed.items() if not self._is_own(token)}
        if since is not None:
            for token, at in list(self._times.items()):
                if at > since and token not in of_others and not self._is_own(token):
                    del self._times[token]
                    self.by_shard.remove(token)
        for token, at in of_others.items():
            self.add(token, at)

    def unused(self, listed: Iterable[str]) -> Iterator[list[str]]:
        """Find own claims that another replica restored after they were given back, in parts."""
        return _parts(token for token in listed if token in self._unused)

    def to_restore(self, *, also_of_others: bool) -> Iterator[list[tuple[str, float]]]:
        """Return the starts that a server may have lost, in parts."""
        return _parts(
            (token, at)
            for token, at in tuple(self._times.items())
            if also_of_others or self._is_own(token)
        )

    def _is_own(self, token: str) -> bool:
        return token.startswith(self._replica)


def _parts(items: Iterable[T]) -> Iterator[list[T]]:
    rest = iter(items)
    while part := list(islice(rest, STARTS_AT_ONCE)):
        yield part
