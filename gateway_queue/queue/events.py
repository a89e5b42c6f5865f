"""What the queue reports to its observers. Times and durations are in seconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gateway_queue.store import SessionStarts


@dataclass(frozen=True, slots=True)
class Released:
    """A ticket was answered."""

    shard: int | None
    rate_limit_key: int
    at: float
    """When the answer was written (:func:`trio.current_time`)."""
    waited: float
    lateness: float
    """Seconds from when the key was open, the client connected and its shard not held."""
    still_waiting: int


@dataclass(frozen=True, slots=True)
class ReleasedAtOnce:
    """A ticket was answered without waiting, because ``max_concurrency`` is 0."""


@dataclass(frozen=True, slots=True)
class Abandoned:
    """A client left before its turn."""

    shard: int | None


@dataclass(frozen=True, slots=True)
class Unkeyed:
    """A client named no shard, though there are several rate limit keys."""

    max_concurrency: int


@dataclass(frozen=True, slots=True)
class Held:
    """A shard starts too often, so its ticket has to wait."""

    shard: int | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Identified:
    """A client confirmed that its shard has identified."""

    shard: int | None
    at: float
    """When it confirmed (:func:`trio.current_time`)."""
    seconds: float
    """Seconds since the answer."""


@dataclass(frozen=True, slots=True)
class NotConfirmed:
    """A client did not confirm in time that its shard has identified."""

    shard: int | None
    at: float
    """When ``confirm_seconds`` were over (:func:`trio.current_time`)."""
    confirm_seconds: float


@dataclass(frozen=True, slots=True)
class SlotTooLate:
    """The store granted a claim too late to use it."""


@dataclass(frozen=True, slots=True)
class KeysChanged:
    """The number of rate limit keys is known, or has changed."""

    max_concurrency: int


@dataclass(frozen=True, slots=True)
class StartsChanged:
    """The day's session starts have changed."""

    starts: SessionStarts


Event = (
    Released
    | ReleasedAtOnce
    | Abandoned
    | Unkeyed
    | Held
    | Identified
    | NotConfirmed
    | SlotTooLate
    | KeysChanged
    | StartsChanged
)

Observer = Callable[[Event], None]
"""Called with each event, in the step of the event loop in which it happens. It must not raise or
wait."""
