"""The window store: remembers the earlier releases that decide when the next one may happen.

It stores when each rate limit key opens, how many session starts the day has left, and which shards
start so often that they have to wait.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from gateway_queue.faults import Fault

if TYPE_CHECKING:
    from gateway_queue.store.starts_by_shard import StartsByShard

IN_FLIGHT_WINDOWS = 6
"""After this number of windows, a released shard has identified, or it never does. Until then,
Discord's figure may not include its session start."""

USUAL_TOTAL = 1000
"""Session starts per day that Discord grants to all bots except the largest."""

Source = Literal["discord", "configured"]


@dataclass(frozen=True)
class Rules:
    """The rules of a bot's queue, for its store."""

    window: float
    """Seconds between two IDENTIFYs of one key, as Discord demands."""
    hold: bool
    """Whether every key stays closed for some time after the start. A process that has just started
    cannot know when the process before it released last."""
    session_start_limit: int | None = None
    """See :class:`~gateway_queue.store.budget.Budget`."""
    loop_free_starts: int = 0
    """See :class:`~gateway_queue.store.loop_guard.LoopGuard`."""
    releases_per_window: int | None = None
    """The most releases in any one window over all keys; None sets no such limit."""
    margin: float = 0.0
    """Seconds added to the window after a release that is not confirmed, for the time in which a
    shard may identify after its answer."""
    confirm_seconds: float = 15.0
    """The longest time from the answer of a confirmed ticket to its confirmation."""
    place_seconds: float = 0.0
    """Seconds for which the place of a named shard is kept after its client was last connected."""

    @property
    def unconfirmed_window(self) -> float:
        """Seconds from an answer that is not confirmed until its key opens again."""
        return self.window + self.margin


@dataclass(frozen=True)
class Claim:
    """A key that is reserved for one release of the caller."""

    key: int
    max_concurrency: int
    """The number of rate limit keys when it was claimed."""
    shard: int | None
    confirm: bool = False
    """Whether the client confirms its IDENTIFY."""
    begin_by: float = math.inf
    """The latest time at which an answer may begin (:func:`trio.current_time`)."""
    answer_by: float = math.inf
    """The latest time at which it may be written. A window later, another replica can claim."""
    token: str = ""
    """Identifies this claim among those of all replicas."""


@dataclass(frozen=True)
class Refusal:
    """A claim that failed."""

    seconds: float
    """Ask again after this time."""
    concerns: Literal["shard", "key", "queue"]
    """What has to wait: this shard alone, all tickets of the key, or all tickets of all keys.

    All keys wait when ``releases_per_window`` is used up, or when an older ticket of another
    replica goes first.
    """


@dataclass(frozen=True)
class DiscordBudget:
    """The session starts that Discord grants, from one answer of its API.

    Times are of :func:`trio.current_time`.
    """

    total: int
    remaining: int
    resets_at: float
    asked_at: float
    """When Discord was asked. Starts after this, or just before, may not be in ``remaining``."""


@dataclass(frozen=True)
class SessionStarts:
    """The day's session starts."""

    used: int
    total: int | None
    """The day's limit; None if it is not known."""
    enforced: bool
    resets_in: float
    """Seconds until some of the used starts are available again."""
    resumes_in: float
    """Seconds until shards may start again if no start is left: later than Discord's reset, because
    a start at the moment of the reset may count for the day before."""
    source: Source | None

    @property
    def remaining(self) -> int | None:
        return None if self.total is None else max(0, self.total - self.used)

    @property
    def spent(self) -> bool:
        """Whether no session may start before the reset."""
        return self.enforced and self.remaining == 0


class Standing(Protocol):
    """What other replicas need to know of a place in the queue.

    Times are of :func:`trio.current_time`.
    """

    @property
    def number(self) -> int:
        """Identifies the place at this replica."""

    @property
    def shard(self) -> int | None:
        """The shard whose place it is; None if the client named none."""

    @property
    def since(self) -> float:
        """The time by which places are sorted, see :meth:`WindowStore.place_time`."""

    @property
    def joined_at(self) -> float:
        """When the first client of this place connected."""

    @property
    def connected_at(self) -> float | None:
        """When its client connected; None while it has no client."""

    @property
    def expires_at(self) -> float:
        """Until when it is kept while it has no client."""

    @property
    def confirm(self) -> bool:
        """Whether its client will confirm that the shard has identified."""

    @property
    def held_until(self) -> float:
        """Until when its shard has to wait because it starts too often."""


@dataclass(frozen=True, slots=True)
class DistantPlace:
    """A place whose client is away, or waits at another replica.

    Times are of :func:`trio.current_time`, except ``since``.
    """

    replica: str
    """The replica where its client waits, or has waited."""
    shard: int | None
    since: float
    """The time by which places are sorted, see :meth:`WindowStore.place_time`."""
    joined_at: float
    is_away: bool
    expires_at: float
    """Until when it is kept, if it is away."""
    confirm: bool
    held_until: float


@dataclass(frozen=True, slots=True)
class Identifying:
    """A shard that has the answer to a confirmed ticket, but has not confirmed it yet."""

    shard: int | None
    since: float
    """When its answer was written, or a moment before (:func:`trio.current_time`)."""


@dataclass(frozen=True, slots=True)
class Line:
    """The places of all replicas at one moment."""

    replica: str
    """The name of this replica."""
    elsewhere: list[DistantPlace]
    """The places that are away, and those whose clients wait at other replicas."""
    opens_at: dict[int, float]
    """When each key opens, if that is known."""
    identifying: dict[int, Identifying]
    """The shards that are identifying after an answer of another replica, by their keys."""


class WindowStore(Protocol):
    """Remembers releases, and grants claims.

    A caller that has claimed a key either releases one ticket and starts the window, or gives the
    key back. A claim includes one of the day's session starts. A store that cannot be reached
    refuses claims; once it can be reached, it is told what it has missed.

    Each async method may suspend, even if it does not in one of the stores. Meanwhile tickets come
    and leave, other keys are claimed, and the number of keys changes. If a claim is cancelled while
    it waits, the store gives it back.
    """

    @property
    def rules(self) -> Rules:
        """The current rules."""

    @property
    def fault(self) -> Fault | None:
        """Why the store cannot be used; None if it can."""

    async def claim(
        self, key: int, shard: int | None, came_at: float, *, confirm: bool = False
    ) -> Claim | Refusal:
        """Claim an open key for a shard.

        Args:
          key: the rate limit key.
          shard: the shard that will start; None if the client named none.
          came_at: the time of its place, see :meth:`place_time`. If several replicas have a ticket
            for the key, the oldest ticket goes first.
          confirm: whether the client will confirm that the shard has identified. Such a claim lasts
            longer.
        """

    async def start_window(self, claim: Claim, at: float, *, confirmed: bool = False) -> None:
        """Count a session start, and close its key for one window.

        Args:
          claim: the claim that was used.
          at: when the window starts (:func:`trio.current_time`).
          confirmed: whether the shard has identified already. Otherwise it may identify a little
            later, so the margin is added to the window.
        """

    async def give_back(self, claim: Claim) -> None:
        """Open a claimed key again, because no client was answered.

        The caller then claims the key again, or withdraws. Until then, for a moment, its older
        tickets still go before younger ones of other replicas.
        """

    async def withdraw(self, key: int) -> None:
        """Tell other replicas that no ticket waits for a key at this one."""

    def place_time(self) -> float:
        """Return the time of a place that begins now: seconds of a clock that all replicas share.

        It is never earlier than the time of an earlier place of this replica.
        """

    def follow_moves(self, move: Callable[[Standing, float, float], None]) -> None:
        """Set the function to call when the time of a place changes.

        It changes if the shard has an older place at another replica, or if the shared clock was
        set. The arguments are the place, its new time by the shared clock, and when its first
        client connected (:func:`trio.current_time`).
        """

    def share(self, place: Standing) -> None:
        """Tell other replicas that a place is new or held, or that its client has come or left."""

    def unshare(self, place: Standing) -> None:
        """Tell other replicas that a place has ended."""

    async def line(self) -> Line | None:
        """Return the places of all replicas; None without Redis, or if they are not known."""

    async def retire(self) -> None:
        """Let other replicas take over all places from now on, because this replica stops."""

    def change_rules(self, rules: Rules) -> None:
        """Change the rules.

        Earlier releases stay known, and earlier claims stay valid. No key opens for one window of
        the new rules.
        """

    def regroup(self, max_concurrency: int) -> None:
        """Change the number of rate limit keys. Earlier claims remain valid.

        A key opens no sooner than each former key that is claimed or closed and shares a shard
        with it.
        """

    async def update_budget(self, budget: DiscordBudget) -> None:
        """Set the day's session starts that Discord grants."""

    @property
    def starts_by_shard(self) -> StartsByShard:
        """The session starts of each shard, including those known from other replicas."""

    def session_starts(self) -> SessionStarts:
        """Return the day's session starts, as far as this replica knows them."""
