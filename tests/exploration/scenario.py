"""The scenario of a run, which its seed chooses."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields, replace
from typing import Literal

PROCESS_FAULTS = ("kill", "freeze", "stop")
PROCESS_ENDS = ("kill", "stop")
CUTS = ("cuts",)
SLOW_WAY = ("slow-way",)
PARTITION = ("partition",)
UNSTEADY_CLOCK = ("unsteady-clock",)
SENTINEL_FAILOVER = ("sentinel-failover",)
CLUSTER_FAILOVER = ("cluster-failover",)
SENTINEL_FAULTS = (*SENTINEL_FAILOVER, "sentinels-down")
REDIS_FAULTS = (
    "reset",
    "lost-request",
    "lost-reply",
    "slow",
    "down",
    "restart",
    "wipe",
    "failover",
    "proxied-failover",
    "reload",
    "delete-key",
    "evict",
    "flush",
    "set-clock",
)
DISCORD_FAULTS = ("max-concurrency", "budget", "discord-down")
CHOICES = (
    "clock-rate",
    "cap",
    "tight-budget",
    "loop-guard",
    "places",
    "hang-ups",
    "confirm",
    "bots",
    "sentinels",
    "cluster",
)
"""Parts of a scenario that are no faults, but that ``--without`` can leave out as well."""

ALL_KINDS = (
    *PROCESS_FAULTS,
    *REDIS_FAULTS,
    *CUTS,
    *SLOW_WAY,
    *PARTITION,
    *UNSTEADY_CLOCK,
    *SENTINEL_FAULTS,
    *CLUSTER_FAILOVER,
    *DISCORD_FAULTS,
    *CHOICES,
)


@dataclass(frozen=True)
class Scenario:
    """One run of one bot. Times are in seconds."""

    seed: int
    bot: int
    """Bots of the same run have the same processes, the same Redis, and the same faults of both."""
    store: Literal["memory", "redis"]
    replicas: int
    sentinels: bool
    """Whether sentinels say which server of Redis is the primary."""
    cluster: bool
    """Whether the nodes of a cluster say which of them is the primary."""
    has_token: bool
    keys: int
    """Discord's ``max_concurrency`` at the start; without a token also what is configured."""
    max_concurrency: int | None
    """The most releases per window over all keys; None if there is no such limit."""
    window: float
    margin: float
    confirm_seconds: float
    confirming: float
    """The share of clients that ask for confirmed tickets."""
    place_seconds: float
    loop_free_starts: int
    session_start_limit: int | None
    budget: int
    """Session starts that Discord has left at the start."""
    resets_in: float
    refresh: float
    hold_on_start: bool
    latency: float
    """The usual time to Redis, one way."""
    clock_rate: float
    clients: int
    hang_ups: bool
    fault_seconds: float
    faults: tuple[str, ...]

    @property
    def source(self) -> str:
        """The seed of what this bot's clients and its Discord do."""
        return f"bot {self.bot} of {self.seed}" if self.bot else str(self.seed)

    @property
    def redis_prefix(self) -> str:
        """The first part of the bot's keys in Redis."""
        return f"gateway-queue:bot:{self.bot}" if self.bot else "gateway-queue"

    @property
    def has_standbys(self) -> bool:
        """Whether another server of Redis can become the primary."""
        return self.sentinels or self.cluster

    @property
    def unconfirmed_window(self) -> float:
        """Seconds from an answer that is not confirmed to the next release of its key."""
        return self.window + self.margin

    @property
    def lease(self) -> float:
        """The longest time for which a ticket keeps its key, unless its shard is identifying."""
        return self.unconfirmed_window + min(self.window, 1) + 0.5

    def __str__(self) -> str:
        return " ".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))


def draw_all(seed: int, without: frozenset[str] = frozenset()) -> list[Scenario]:
    """Choose the scenarios of all bots of a run, see :func:`draw`."""
    first = draw(seed, without)
    source = random.Random(f"bots {seed}")
    others = 0 if "bots" in without else source.choices((0, 1, 2), (6, 3, 1))[0]
    return [first, *(_draw_other(first, bot, source, without) for bot in range(1, others + 1))]


def _draw_other(
    first: Scenario, bot: int, source: random.Random, without: frozenset[str]
) -> Scenario:
    """Choose the scenario of a further bot: its processes and Redis are those of the first."""
    own = draw(source.randrange(10**9), without)
    is_crowded = source.random() < 0.2
    shared = tuple(kind for kind in first.faults if kind not in DISCORD_FAULTS)
    its_discords = tuple(kind for kind in own.faults if kind in DISCORD_FAULTS)
    return replace(
        own,
        seed=first.seed,
        bot=bot,
        store=first.store,
        replicas=first.replicas,
        sentinels=first.sentinels,
        cluster=first.cluster,
        hold_on_start=first.hold_on_start,
        latency=first.latency,
        clock_rate=first.clock_rate,
        clients=30 if is_crowded else own.clients,
        loop_free_starts=0 if is_crowded else own.loop_free_starts,
        fault_seconds=first.fault_seconds,
        faults=(*shared, *its_discords),
    )


def draw(seed: int, without: frozenset[str] = frozenset()) -> Scenario:
    """Choose the scenario of a bot.

    Args:
      seed: chooses the scenario.
      without: the kinds of fault, or of :data:`CHOICES`, that must not be in it.
    """
    source = random.Random(f"scenario {seed}")
    own = random.Random(f"confirmed tickets {seed}")
    only = own.choices((None, (), PROCESS_ENDS, ("max-concurrency",)), (7, 1, 1, 1))[0]
    store: Literal["memory", "redis"] = source.choices(("memory", "redis"), (3, 7))[0]
    has_token = source.random() < 0.5
    keys = source.choice((1, 1, 2, 3, 4, 16))
    cap = source.randint(1, keys) if has_token and source.random() < 0.3 else None
    window = source.choice((1.0, 2.0, 5.0))
    tight = source.random() < 0.3
    limit = source.choice((None, None, None, None, 0, source.randint(3, 20)))
    possible = (
        *PROCESS_FAULTS,
        *(REDIS_FAULTS if store == "redis" else ()),
        *(DISCORD_FAULTS if has_token else ()),
    )
    faults = tuple(kind for kind in possible if source.random() < 0.3 and kind not in without)
    cutting = random.Random(f"cutting {seed}").random()
    if store == "redis" and cutting < 0.15:
        faults, only = (faults + CUTS, only) if cutting < 0.05 else (faults, CUTS)
    elif store == "redis" and 0.88 < cutting < 0.95:
        only = SLOW_WAY
    if store == "redis" and random.Random(f"cutting off {seed}").random() < 0.1:
        faults += tuple(kind for kind in PARTITION if kind not in without)
    unsteady = random.Random(f"unsteady clock {seed}").random()
    if store == "redis" and unsteady < 0.1 and not without.issuperset(UNSTEADY_CLOCK):
        faults, only = faults + UNSTEADY_CLOCK, UNSTEADY_CLOCK if unsteady < 0.05 else only
    naming = random.Random(f"sentinels {seed}")
    kind = naming.random()
    sentinels = store == "redis" and kind < 0.1 and "sentinels" not in without
    cluster = store == "redis" and 0.1 < kind < 0.16 and "cluster" not in without
    if sentinels:
        chosen = tuple(kind for kind in SENTINEL_FAULTS if naming.random() < 0.7)
        faults += tuple(kind for kind in chosen if kind not in without)
        only = naming.choice((only, SENTINEL_FAULTS, SENTINEL_FAILOVER))
    elif cluster:
        faults += tuple(kind for kind in CLUSTER_FAILOVER if kind not in without)
        only = naming.choice((only, CLUSTER_FAILOVER))
    confirming = own.choice((0.0, 0.5, 0.5, 1.0))
    place_seconds = source.choice((0.0, 2.0, 10.0, 30.0))
    loop_free_starts = source.choice((0, 1, 2, 5))
    return Scenario(
        seed=seed,
        bot=0,
        store=store,
        replicas=source.choice((1, 1, 2, 3)) if store == "redis" else 1,
        sentinels=sentinels,
        cluster=cluster,
        has_token=has_token,
        keys=keys,
        max_concurrency=None if "cap" in without else cap,
        window=window,
        margin=own.choice((0.0, 0.25, 0.25, 0.5)),
        confirm_seconds=own.uniform(2, 15),
        confirming=0.0 if "confirm" in without else confirming,
        place_seconds=0.0 if "places" in without else place_seconds,
        loop_free_starts=0 if "loop-guard" in without else loop_free_starts,
        session_start_limit=None if "tight-budget" in without else limit,
        budget=source.randint(0, 10) if tight and "tight-budget" not in without else 1000,
        resets_in=source.uniform(5, 60),
        refresh=source.choice((2.0, 5.0, 20.0)),
        hold_on_start=source.random() < 0.7,
        latency=source.choice((0.0001, 0.0005, 0.003, 0.04)),
        clock_rate=1 + (0 if "clock-rate" in without else source.choice((0, 0, 5e-4, -5e-4))),
        clients=source.randint(2, 10),
        hang_ups=source.random() < 0.8 and "hang-ups" not in without,
        fault_seconds=window * source.uniform(4, 14),
        faults=faults if only is None else tuple(kind for kind in only if kind not in without),
    )
