"""The places of this replica, and what the server has been told of them."""

from __future__ import annotations

import math
import re
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain, islice
from operator import attrgetter

import trio

from gateway_queue.store import DistantPlace, Standing
from gateway_queue.store.redis.clock import MICROSECONDS, ServerClock

STEP_SECONDS = 2e-6
"""Seconds between the times of places that begin at once: more than rounding to microseconds."""

LEAST_STEP_SECONDS = 0.05
"""Seconds. If the new offset of a clock differs by more, the clock was set, or is another one."""

HOST_NAME_MAX = 24
"""Characters of the machine's name in the name of a replica, which every listed place contains."""

PLACES_AT_ONCE = 100
"""Places in one command: a long one would make the other replicas wait."""

ASK_AGAIN_SECONDS = 0.1
"""Within this time, another replica usually notices that a client has left it for this one."""


@dataclass(slots=True)
class _Shared:
    place: Standing
    is_told: bool = False
    """Whether the server knows of the place."""
    expects: bool = False
    """Whether its shard has an older place at another replica, which may be free soon."""


@dataclass(frozen=True, slots=True)
class Change:
    """The change of one place, as sent to the server."""

    number: int
    shard: int | None
    since: int
    """The time of the place in microseconds; 0 if it has ended."""
    words: str
    """The argument of the script."""


class SharedLine:
    """Collects the changes of places while earlier ones are on their way to the server."""

    def __init__(self) -> None:
        self._shared: dict[int, _Shared] = {}
        self._changed: dict[int, None] = {}
        self._ended: dict[int, int | None] = {}
        """By number, the shards of places that the server still lists."""
        self._on_the_way: dict[int, None] = {}
        # Places to share again with the next look, see `_Shared.expects`, and places to share again
        # sooner, because they have just begun to expect.
        self._expecting: dict[int, None] = {}
        self._newly_expecting: dict[int, None] = {}
        self._ask_again_at = math.inf
        self._is_closed = False
        self._move: Callable[[Standing, float, float], None]
        # The server's clock minus ours. Unlike the offset of ServerClock, it outlasts a connection.
        self._offset = 0.0
        self._latest = -math.inf
        self._has_changes = trio.Event()

    def follow_moves(self, move: Callable[[Standing, float, float], None]) -> None:
        self._move = move

    def next_time(self) -> float:
        """Return the time of a new place: seconds of the server's clock, later than all before."""
        self._latest = max(self._latest + STEP_SECONDS, trio.current_time() + self._offset)
        return self._latest

    def add(self, place: Standing) -> None:
        """Note that a place is new or held, or that its client has come or left."""
        if self._is_closed:
            return
        self._shared.setdefault(place.number, _Shared(place))
        self._note(place.number)

    def remove(self, place: Standing) -> None:
        """Note that a place has ended."""
        shared = self._shared.pop(place.number, None)
        if shared is None:
            return
        self._changed.pop(place.number, None)
        self._expecting.pop(place.number, None)
        self._newly_expecting.pop(place.number, None)
        if not self._is_closed and (shared.is_told or place.number in self._on_the_way):
            self._ended[place.number] = place.shard
            self._has_changes.set()

    def close(self) -> None:
        """Ignore further changes, because other replicas take over all places."""
        self._is_closed = True

    @property
    def has_places(self) -> bool:
        """Whether the server lists places of this replica, or will list some."""
        return bool(self._shared or self._ended)

    @property
    def is_behind(self) -> bool:
        """Whether the server has to be told of a change."""
        return bool(self._changed or self._ended)

    async def has_changes(self) -> None:
        """Wait until the server has to be told of a change."""
        while not self.is_behind:
            self._has_changes = trio.Event()
            with trio.move_on_at(self._ask_again_at):
                await self._has_changes.wait()
            if trio.current_time() >= self._ask_again_at:
                self._ask_again_at = math.inf
                self._ask_again(self._newly_expecting)

    def changes(self, clock: ServerClock) -> list[Change]:
        """Return the next changes for one command, and forget them."""
        ended = list(islice(self._ended.items(), PLACES_AT_ONCE))
        changed = list(islice(self._changed, PLACES_AT_ONCE - len(ended)))
        for number, _ in ended:
            del self._ended[number]
        for number in changed:
            del self._changed[number]
        changes = [Change(number, shard, 0, _ending(number, shard)) for number, shard in ended]
        changes += [_change(self._shared[number], clock) for number in changed]
        self._on_the_way.update(dict.fromkeys(change.number for change in changes))
        return changes

    def told(self, changes: list[Change], answers: Iterable[int], clock: ServerClock) -> None:
        """Apply the server's answers about changed places.

        Args:
          changes: the changes that the server was told of.
          answers: for each of them the time of the place, and 1 if an older one may be free soon.
          clock: of the server.
        """
        answer = iter(answers)
        for change in changes:
            since, expects = next(answer), next(answer)
            self._on_the_way.pop(change.number, None)
            shared = self._shared.get(change.number)
            if shared is None or not change.since:
                continue
            shared.is_told = True
            if shared.place.connected_at is None:
                continue  # the answer about its next client will count
            if expects and shared.expects:
                self._expecting[change.number] = None
            elif expects:
                self._newly_expecting[change.number] = None
                self._ask_again_at = min(
                    self._ask_again_at, trio.current_time() + ASK_AGAIN_SECONDS
                )
            shared.expects = bool(expects)
            if since != change.since:
                self._move(shared.place, since / MICROSECONDS, clock.when(since))

    def not_told(self, changes: list[Change]) -> None:
        """Note changes again, because their command had no answer."""
        for change in changes:
            self._on_the_way.pop(change.number, None)
            if change.number in self._shared:
                self._note(change.number)
            else:
                self._ended[change.number] = change.shard
                self._has_changes.set()

    def look_again(self, clock: ServerClock) -> None:
        """Ask again whether older places of shards at other replicas are free now."""
        self._offset = -clock.when(0)
        self._ask_again(self._expecting)

    def tell_all(self, clock: ServerClock, *, is_lost: bool) -> None:
        """Tell the server of all places again.

        Args:
          clock: of the server.
          is_lost: whether the server has lost what it was told before.
        """
        step = -clock.when(0) - self._offset
        self._offset += step
        if is_lost:
            if abs(step) > LEAST_STEP_SECONDS:
                self._shift(step)
            self._ended.clear()
            for shared in self._shared.values():
                shared.is_told = False
        self._changed = dict.fromkeys(chain(self._changed, self._shared))
        self._has_changes.set()

    def _shift(self, step: float) -> None:
        """Convert the times of all places to a clock that was set, or to that of another server."""
        self._latest += step
        # If times increase, the latest place moves first, otherwise the oldest, so that no place
        # passes another.
        places = (shared.place for shared in self._shared.values())
        for place in sorted(places, key=attrgetter("since"), reverse=step > 0):
            self._move(place, place.since + step, place.joined_at)

    def _ask_again(self, expecting: dict[int, None]) -> None:
        for number in expecting:
            self._note(number)
        expecting.clear()

    def _note(self, number: int) -> None:
        self._changed[number] = None
        self._has_changes.set()


def distant_place(words: str, clock: ServerClock) -> tuple[str, DistantPlace]:
    """Read a place that the script lists, and return its name and the place."""
    name, shard, since, kept_until, confirm, held_until = words.split(" ")
    at = int(since)
    return name, DistantPlace(
        replica=name.partition(":")[0],
        shard=int(shard) if shard else None,
        since=at / MICROSECONDS,
        joined_at=clock.when(at),
        is_away=kept_until != "0",
        expires_at=clock.when(int(kept_until)),
        confirm=confirm == "1",
        held_until=clock.when(int(held_until)),
    )


def host_name() -> str:
    """Return the part of this machine's name that can be in a replica's name."""
    return re.sub("[^A-Za-z0-9.-]", "", socket.gethostname())[:HOST_NAME_MAX]


def _ending(number: int, shard: int | None) -> str:
    return f"{number} {'' if shard is None else shard} e 0 0 0 0 0"


def _change(shared: _Shared, clock: ServerClock) -> Change:
    place = shared.place
    kind, since = "k" if shared.is_told else "n", round(place.since * MICROSECONDS)
    if place.connected_at is None:
        connected, kept_until = 0, clock.at(place.expires_at)
    else:
        # By the same clock as `since`: the server's clock may have been set later.
        later = place.connected_at - place.joined_at
        connected, kept_until = round((place.since + later) * MICROSECONDS), 0
    shard = "" if place.shard is None else place.shard
    held_until = clock.at(place.held_until) if place.held_until > trio.current_time() else 0
    words = (
        f"{place.number} {shard} {kind} {since} {connected} {kept_until} {place.confirm:d} "
        f"{held_until}"
    )
    return Change(place.number, place.shard, since, words)
