"""The record of a run, which the invariants check.

Times are in seconds of the simulation's clock, which is never wrong, unlike that of Redis.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import trio

from tests.exploration.scenario import Scenario

Step = Literal["arrived", "chosen", "answered", "left", "failed", "confirmed", "unconfirmed"]


@dataclass(eq=False)
class Call:
    """One request of a shard to one process."""

    number: int
    shard: int | None
    client: int
    confirm: bool
    """Whether the client says when it has identified, by closing the response."""
    process: ProcessRecord
    leaves_when_chosen: bool
    leaves_at: float
    """When the process sees its client leave, if it still waits then; infinite if it stays."""
    sent_at: float
    arrived_at: float | None = None
    chosen_at: float | None = None
    answered_at: float | None = None
    """When the answer was on the wire."""
    ended_at: float | None = None
    """When its client left, or its connection was closed, or its answer was out."""
    identified_at: float | None = None
    """When Discord counted its session start."""
    closed_at: float | None = None
    """When its client closed the response to a confirmed ticket."""
    confirmed_at: float | None = None
    """When the process noticed that the response was closed."""
    failure: str | None = None
    """The error of the server, if it holds the request because of an error."""

    def __str__(self) -> str:
        return f"call {self.number} (client {self.client}, shard {self.shard})"

    @property
    def waits(self) -> bool:
        """Whether it waits in the queue."""
        return self.arrived_at is not None and self.chosen_at is None and self.ended_at is None


@dataclass(eq=False)
class ProcessRecord:
    """One process of the server, from its start to its end."""

    number: int
    replica: int
    started_at: float
    hold_on_start: bool
    ended_at: float | None = None
    was_killed: bool = False
    steps: list[tuple[float, Step, Call]] = field(default_factory=list)
    """What the door has noted about its calls, in order."""
    heard_at: list[float] = field(default_factory=list)
    """When answers of Redis have reached it."""
    keys_told: list[tuple[float, int]] = field(default_factory=list)
    """When it learned the number of keys, and the number."""

    def keys_at(self, time: float, since: float) -> set[int]:
        """Return the numbers of keys that the process may use at a time.

        Args:
          time: the time in question.
          since: of the numbers that it learned until then, it uses only the last one.
        """
        before = [keys for at, keys in self.keys_told if at <= since]
        return {keys for at, keys in self.keys_told if since < at <= time} | set(before[-1:])


@dataclass(eq=False)
class Overspending:
    """A session start over the limit of Discord's day."""

    at: float
    used: int
    limit: int


@dataclass(eq=False)
class Loss:
    """A loss of data in Redis, or a change of its clock."""

    at: float
    what: str
    prefix: str | None = None
    """Prefix of the affected keys; None if all keys are affected."""
    is_of_clock: bool = False
    """Whether only the clock was set."""
    copied_at: float | None = None
    """When the copy was made that was loaded, if the server changed in no other way."""


@dataclass(eq=False)
class History:
    """What happens in a run, for all bots."""

    is_full: bool
    """Whether each request to Redis is noted, too."""
    lines: list[str] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)
    clock_offsets: tuple[float, float, float] = 0.0, 0.0, 0.0
    """Seconds by which all small steps together have set the clock of Redis forward: the minimum so
    far, the current value, and the maximum so far."""
    clock_steps: list[float] = field(default_factory=list)
    """When there was a small step."""
    records: list[Record] = field(default_factory=list)
    """One for each bot."""

    @property
    def ended_at(self) -> float:
        return max(record.ended_at for record in self.records)

    def note_clock_step(self, seconds: float) -> None:
        """Note by how many seconds the clock of Redis was set forward."""
        self.clock_steps.append(trio.current_time())
        least, offset, most = self.clock_offsets
        offset += seconds
        self.clock_offsets = min(least, offset), offset, max(most, offset)

    def note(self, line: str) -> None:
        self.lines.append(f"{trio.current_time():12.6f}  {line}")

    def note_detail(self, line: Callable[[], str]) -> None:
        """Note a line only in a full history, because it takes time to write."""
        if self.is_full:
            self.note(line())


@dataclass(eq=False)
class Record:
    """Everything that can be seen of one bot in a run from outside."""

    scenario: Scenario
    history: History
    calls: list[Call] = field(default_factory=list)
    processes: list[ProcessRecord] = field(default_factory=list)
    overspent: list[Overspending] = field(default_factory=list)
    cuts: list[float] = field(default_factory=list)
    """When connections to Redis were cut that can be opened again at once."""
    slow_ways: list[tuple[ProcessRecord, float, float]] = field(default_factory=list)
    """Processes to which the answers of Redis came too late, from when and until when."""
    wrong: list[tuple[str, str]] = field(default_factory=list)
    """What was seen to be wrong during the run: the invariant's name and an explanation."""
    healed_at: float = 0.0
    settled_at: float = 0.0
    """From when on no earlier fault can delay a release."""
    unreleased: list[Call] = field(default_factory=list)
    """Calls that were still connected when the run gave up on them."""
    ended_at: float = 0.0

    @property
    def calm_since(self) -> float:
        """From when on no fault can delay a release: without faults, from the start."""
        return self.settled_at if self.scenario.faults else 0.0

    @property
    def losses(self) -> list[Loss]:
        """Return the losses that affect this bot."""
        own = None, self.scenario.redis_prefix
        return [loss for loss in self.history.losses if loss.prefix in own]

    def note(self, line: str) -> None:
        self.history.note(self.of_bot(line))

    def of_bot(self, line: str) -> str:
        """Name the bot in a line, if it is not the first one."""
        bot = self.scenario.bot
        return f"bot {bot}: {line}" if bot else line

    def step(self, call: Call, step: Step) -> None:
        now = trio.current_time()
        if step == "arrived":
            call.arrived_at = now
        elif step == "chosen":
            call.chosen_at = now
        elif step == "confirmed":
            call.confirmed_at = now
        elif step == "unconfirmed":
            pass
        else:
            call.ended_at = now
            if step == "answered":
                call.answered_at = now
        call.process.steps.append((now, step, call))
        self.note(f"replica {call.process.replica}: {call} {step}")

    @property
    def answers(self) -> list[Call]:
        """Return the calls that were answered, in the order of their answers."""
        answered = [call for call in self.calls if call.answered_at is not None]
        return sorted(answered, key=lambda call: call.answered_at or 0)
