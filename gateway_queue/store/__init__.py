"""The window store: what must be known about earlier releases before the next one.

When each rate limit key opens, how many session starts the day has left, and which shards start so
often that they have to wait.
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
"""A released shard has identified after so many windows, or it will not any more. Until then
Discord's figure may be without it."""

USUAL_TOTAL = 1000
"""Session starts a day that Discord grants all but the largest bots."""

Source = Literal["discord", "configured"]


@dataclass(frozen=True)
class Rules:
    """The rules of a bot's queue, for its store."""

    window: float
    """Seconds between two IDENTIFYs of one key, as Discord demands."""
    hold: bool
    """Whether every key opens only some time after the start. A process that has just started
    cannot know when its predecessor released last."""
    session_start_limit: int | None = None
    """See :class:`~gateway_queue.store.budget.Budget`."""
    loop_free_starts: int = 0
    """See :class:`~gateway_queue.store.loop_guard.LoopGuard`."""
    releases_per_window: int | None = None
    """The most releases in any one window over all keys; None sets no limit beside the keys."""
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
    """Until when an answer may begin (:func:`trio.current_time`)."""
    answer_by: float = math.inf
    """When the answer has to be out. A window later, another replica can get the key."""
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
    """When it was asked: starts since then, and those just before, are not in ``remaining``."""


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
    """Seconds until shards may start again if none is left: later than Discord's reset, because a
    start at the very reset may count for the day before."""
    source: Source | None

    @property
    def remaining(self) -> int | None:
        return None if self.total is None else max(0, self.total - self.used)

    @property
    def spent(self) -> bool:
        """Whether no session may start before the reset."""
        return self.enforced and self.remaining == 0


class Standing(Protocol):
    """A place in the queue, as far as other replicas need it.

    Times are of :func:`trio.current_time`.
    """

    @property
    def number(self) -> int:
        """Identifies the place at this replica."""

    @property
    def shard(self) -> int | None:
        """The shard that has it; None if the client named none."""

    @property
    def since(self) -> float:
        """The time by which places are sorted, see :meth:`WindowStore.place_time`."""

    @property
    def joined_at(self) -> float:
        """When the first client came that had this place."""

    @property
    def connected_at(self) -> float | None:
        """When its client came; None while it has none."""

    @property
    def expires_at(self) -> float:
        """Until when it is kept while it has no client."""

    @property
    def confirm(self) -> bool:
        """Whether its client will say when it has identified."""

    @property
    def held_until(self) -> float:
        """Until when its shard has to wait because it starts too often."""


@dataclass(frozen=True, slots=True)
class DistantPlace:
    """A place that other replicas know of. Times are of :func:`trio.current_time`."""

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
    """When its answer was out, or a moment before (:func:`trio.current_time`)."""


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
    """Remembers releases.

    A caller that has claimed a key either releases one ticket and starts the window, or gives the
    key back. A claim includes one of the day's session starts. A store that cannot be reached
    refuses claims; once it can be reached, it is told what it has missed.

    Each async method may suspend, also where one store does not: meanwhile tickets come and leave,
    other keys are claimed, and the number of keys changes. If a claim is cancelled while it waits,
    the store gives it back.
    """

    @property
    def rules(self) -> Rules:
        """The current rules."""

    @property
    def fault(self) -> Fault | None:
        """Why the store cannot be reached, if it cannot."""

    async def claim(
        self, key: int, shard: int | None, came_at: float, *, confirm: bool = False
    ) -> Claim | Refusal:
        """Claim an open key for a shard.

        Args:
          key: the rate limit key.
          shard: whose start it will be; None if the client did not say.
          came_at: the time of its place, see :meth:`place_time`. Where several replicas have a
            ticket for the key, the oldest goes first.
          confirm: whether the client will say when it has identified. Such a claim lasts longer.
        """

    async def start_window(self, claim: Claim, at: float, *, confirmed: bool = False) -> None:
        """Count a session start, and close its key for one window.

        Args:
          claim: the claim that was used.
          at: when the window starts (:func:`trio.current_time`).
          confirmed: whether the shard has identified before. Otherwise it may do so a little later,
            and the margin is added to the window.
        """

    async def give_back(self, claim: Claim) -> None:
        """Open a claimed key again, because no client was answered.

        The caller claims the key again or withdraws: for a moment, its older tickets keep their
        place before those of other replicas.
        """

    async def withdraw(self, key: int) -> None:
        """Tell other replicas that no ticket waits for a key at this one."""

    def place_time(self) -> float:
        """Return the time of a place that begins now: seconds of a clock that all replicas share.

        It is never earlier than that of an earlier place here.
        """

    def follow_moves(self, move: Callable[[Standing, float, float], None]) -> None:
        """Set what is called with a place that has another time than it seems here.

        So it is if the shard was connected to another replica before. The second argument is the
        time by the clock of all replicas, the third by that of trio.
        """

    def share(self, place: Standing) -> None:
        """Tell other replicas of a place: it is new, its client has come or left, or it is held."""

    def unshare(self, place: Standing) -> None:
        """Tell other replicas that a place has ended."""

    async def line(self) -> Line | None:
        """Return the places of all replicas; None without Redis, or if they are not known."""

    async def retire(self) -> None:
        """Let other replicas take over all places from now on, because this replica stops."""

    def change_rules(self, rules: Rules) -> None:
        """Change the rules.

        What is known of earlier releases stays, and no key opens for one window of the new rules.
        Claims of before stay good.
        """

    def regroup(self, max_concurrency: int) -> None:
        """Change the number of rate limit keys. Earlier claims remain valid.

        A key that shares a shard with one of before that is claimed or closed opens no sooner than
        that one.
        """

    async def update_budget(self, budget: DiscordBudget) -> None:
        """Set the day's session starts that Discord grants."""

    @property
    def starts_by_shard(self) -> StartsByShard:
        """Return which shards have started, also at other replicas if this replica knows it."""

    def session_starts(self) -> SessionStarts:
        """Return the day's session starts, as far as this replica knows them."""
