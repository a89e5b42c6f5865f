"""Random histories of clients of HTTP/1.1 and HTTP/2 at one replica, checked by exact times.

Some replicas have several bots. Each rule is checked for each bot.

``scripts/explore --http`` runs them. 2 to 12 clients run about 750 times as fast as real time: a
seed takes 0.07 s for 50 s.
"""

from __future__ import annotations

import json
import logging
import math
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from tempfile import NamedTemporaryFile
from typing import Any

import structlog
import trio
from trio.testing import MockClock

from gateway_queue.settings import Settings
from tests.exploration.wire import WireReplica, repeatable
from tests.exploration.wire_check import check, openings
from tests.exploration.wire_clients import (
    REFUSALS,
    Http1Client,
    Http2Client,
    Moment,
    WireTicket,
)

RULES = (
    "early",
    "late",
    "late-body",
    "order",
    "gone",
    "lost",
    "closed",
    "end",
    "refusal",
    "answer",
    "forgotten",
    "leftovers",
    "error",
)
"""The rules that are checked."""

MOST_HANG_UPS = 4
TOO_SLOW = 3.0
"""Seconds after which a client gives up if an answer has begun and does not end."""


@dataclass(frozen=True)
class WireScenario:
    """One run of one bot. Times are in seconds."""

    seed: int
    window: float
    keys: int
    hold_on_start: bool
    place_seconds: float
    clients: int
    latency: float
    are_slow: bool
    """Whether some clients are slow to read."""
    margin: float
    confirm_seconds: float
    bot: str | None = None
    """None for the default bot."""

    @property
    def settings(self) -> dict[str, Any]:
        """Return the settings of the bot."""
        return {
            "window_seconds": self.window,
            "hold_on_start": self.hold_on_start,
            "place_seconds": self.place_seconds,
            "max_concurrency": self.keys,
            "loop_free_starts": 0,
            "margin_seconds": self.margin,
            "confirm_seconds": self.confirm_seconds,
        }

    @property
    def table(self) -> str:
        """Return the bot's table in ``BOTS_FILE``."""
        lines = (f"{key} = {json.dumps(value)}" for key, value in self.settings.items())
        return "\n".join([f'["{self.bot}"]', *lines, ""])

    def key(self, shard: int | None) -> int:
        return (shard or 0) % self.keys


def draw_all(seed: int) -> list[WireScenario]:
    """Choose the scenarios of all bots of a run."""
    first, source = draw(seed), random.Random(f"bots on the wire {seed}")
    others = source.choices((0, 1, 2), (6, 3, 1))[0]
    return [
        first,
        *(
            replace(
                draw(source.randrange(10**9)), seed=seed, bot=f"bot.{bot}", latency=first.latency
            )
            for bot in range(1, others + 1)
        ),
    ]


def draw(seed: int) -> WireScenario:
    """Choose the scenario of a bot."""
    source = random.Random(f"wire {seed}")
    return WireScenario(
        seed,
        window=source.choice((1.0, 2.0, 5.0)),
        keys=source.choice((1, 1, 2, 3)),
        hold_on_start=source.random() < 0.5,
        place_seconds=source.choice((0.0, 3.0, 30.0)),
        clients=source.randint(2, 12),
        latency=source.choice((0.0, 0.0, 0.001, 0.05)),
        are_slow=source.random() < 0.3,
        margin=source.choice((0.0, 0.25, 1.0)),
        confirm_seconds=source.choice((0.5, 3.0, 15.0)),
    )


@dataclass(eq=False)
class WireHistory:
    """What happened in a run."""

    lines: list[str] = field(default_factory=list)
    wrong: list[tuple[str, str]] = field(default_factory=list)
    """Which rule is broken, and how."""
    records: list[WireRecord] = field(default_factory=list)
    """One for each bot."""
    ended_at: float = 0.0

    def broken(self, ignore: frozenset[str] = frozenset()) -> dict[str, str]:
        """Return an explanation for each rule that is broken."""
        return {rule: why for rule, why in reversed(self.wrong) if rule not in ignore}

    def note(self, line: str) -> None:
        self.lines.append(f"{trio.current_time():12.6f}  {line}")

    def report(self, rule: str, line: str) -> None:
        self.wrong.append((rule, line))
        self.note(f"WRONG ({rule}): {line}")

    def watch(self, ticket: WireTicket, moment: Moment) -> None:
        if moment == "asks":
            record = next(one for one in self.records if one.scenario.bot == ticket.bot)
            (record.tickets if ticket.refusal is None else record.refused).append(ticket)
        self.note(f"{ticket.name} ({ticket.method} {ticket.query or '/'}) {moment}")


@dataclass(eq=False)
class WireRecord:
    """What happened to one bot in a run."""

    scenario: WireScenario
    history: WireHistory
    tickets: list[WireTicket] = field(default_factory=list)
    refused: list[WireTicket] = field(default_factory=list)
    """Requests that are no tickets."""

    def note(self, line: str) -> None:
        self.history.note(line)

    def report(self, rule: str, line: str) -> None:
        self.history.report(rule, line)

    def opens_at(self, shard: int | None) -> float:
        """Return when the key of a shard opens next, according to its answers so far."""
        scenario = self.scenario
        key = scenario.key(shard)
        answered = [
            ticket
            for ticket in self.tickets
            if scenario.key(ticket.shard) == key and ticket.is_answered
        ]
        start = scenario.window + scenario.margin if scenario.hold_on_start else 0
        opens = (openings(scenario, ticket)[0] for ticket in answered)
        return max(opens, default=start)


class _Run:
    def __init__(self, history: WireHistory, settings: Settings) -> None:
        self.history = history
        self.replica = WireReplica(settings)
        self.shared: list[Http2Client] = []
        """Connections that any shard of any bot may use."""
        self.nursery: trio.Nursery
        self.unreleased: dict[str, None] = {}

    async def run(self) -> None:
        history = self.history
        scenarios = [record.scenario for record in history.records]
        for scenario in scenarios:
            history.note(str(scenario))
        async with trio.open_nursery() as outer:
            await outer.start(self.replica.run)
            before = self.replica.tasks()
            with trio.move_on_after(max(map(_longest_run, scenarios))):
                async with trio.open_nursery() as self.nursery:
                    async with trio.open_nursery() as clients:
                        for record in history.records:
                            for number in range(record.scenario.clients):
                                clients.start_soon(_Shard(self, record, number).live)
                    self.nursery.cancel_scope.cancel()
            for name in self.unreleased:
                history.report("forgotten", f"{name} is not released")
            for end in list(self.replica.ends):
                end.peer.close()
            await trio.sleep(max(scenario.place_seconds for scenario in scenarios) + 10)
            self._look_for_leftovers(before)
            self.replica.kill()
        history.ended_at = trio.current_time()
        for record in history.records:
            check(record)

    def _look_for_leftovers(self, before: list[str]) -> None:
        queues = [service.queue for service in self.replica.app.bots.services().values()]
        more = Counter(self.replica.tasks()) - Counter(before)
        for what, number in (
            ("tasks", sum(more.values())),
            ("connections", len(self.replica.ends)),
            ("tickets", sum(map(len, queues))),
            ("lanes", sum(len(queue.lanes) for queue in queues)),
            ("places", sum(len(lane.away) for queue in queues for lane in queue.lanes.values())),
        ):
            if number:
                self.history.report(
                    "leftovers", f"{number} {what} {dict(more) if what == 'tasks' else ''}"
                )


def _longest_run(scenario: WireScenario) -> float:
    """Return after how many seconds every client has been released, if none is forgotten."""
    longest = scenario.window + scenario.margin + scenario.confirm_seconds
    return longest * (20 + 12 * scenario.clients) + 60


class _Shard:
    """One shard: it asks, hangs up, and asks again until it is released."""

    def __init__(self, run: _Run, record: WireRecord, number: int) -> None:
        self._scenario = scenario = record.scenario
        of_bot = "" if scenario.bot is None else f" of {scenario.bot}"
        self._source = source = random.Random(f"client {number}{of_bot} {scenario.seed}")
        self._run = run
        self._record = record
        self._name = f"c{number}{of_bot}"
        self._shard = None if source.random() < 0.1 else source.randrange(3 * scenario.keys)
        self._hang_ups = source.choice((0, 1, MOST_HANG_UPS))
        self._connections = 0
        self._may_be_slow = scenario.are_slow and source.random() < 0.5
        self._confirms = self._shard is not None and source.random() < 0.5

    async def live(self) -> None:
        source, window = self._source, self._scenario.window
        await trio.sleep(source.choice((0, window, source.uniform(0, 3 * window))))
        for _ in range(source.choice((1, 1, 2))):
            if not await self._start():
                return
            await trio.sleep(source.choice((0, window, source.uniform(0, window))))

    async def _start(self) -> bool:
        """Ask until released. Return False if the shard gives up for good."""
        source = self._source
        self._run.unreleased[self._name] = None
        while True:
            if source.random() < 0.05:
                await self._send_bad_request()
            play = self._play_http1 if source.random() < 0.5 else self._play_http2
            if await play():
                break
            if source.random() < 0.1:
                del self._run.unreleased[self._name]
                return False
            await trio.sleep(source.choice((0, 0, 0.001, source.uniform(0, 4))))
        del self._run.unreleased[self._name]
        return True

    def _options(self) -> dict[str, Any]:
        """Choose a connection; only some connections of a slow shard are slow."""
        source, latency = self._source, self._scenario.latency
        options: dict[str, Any] = {
            "up": latency * source.choice((0, 1)),
            "down": latency * source.choice((0, 1)),
        }
        if self._may_be_slow and source.random() < 0.5:
            options["pace"] = (source.choice((1, 16, 64)), source.choice((0.001, 0.02, 0.2)))
            options["capacity"] = source.choice((16, 100, 300))
        self._connections += 1
        return options

    def _ticket_options(self) -> dict[str, Any]:
        """Choose a request."""
        source = self._source
        return {
            "confirm": self._confirms and source.random() < 0.8,
            "method": "HEAD" if source.random() < 0.05 else "GET",
            "bot": self._scenario.bot,
        }

    def _connect_http1(self) -> Http1Client:
        history = self._run.history
        name = f"{self._name}h1-{self._connections}"
        version = "1.0" if self._source.random() < 0.15 else "1.1"
        client = Http1Client(
            self._run.replica,
            name,
            history.watch,
            partial(history.report, "answer"),
            version=version,
            **self._options(),
        )
        self._run.nursery.start_soon(client.run)
        return client

    def _connect_http2(self, window: int, options: dict[str, Any]) -> Http2Client:
        history = self._run.history
        client = Http2Client(
            self._run.replica,
            f"{self._name}h2-{self._connections}",
            history.watch,
            partial(history.report, "answer"),
            window=window,
            **options,
        )
        self._run.nursery.start_soon(client.run)
        return client

    async def _send_bad_request(self) -> None:
        """Send a bad request, and wait for its refusal."""
        source = self._source
        if source.random() < 0.5:
            client: Http1Client | Http2Client = self._connect_http1()
        else:
            client = self._connect_http2(65_535, self._options())
        request = client.ask(None, refusal=source.choice(REFUSALS))
        with trio.move_on_after(TOO_SLOW):
            await request.ended.wait()
        client.close()

    async def _play_http1(self) -> bool:
        source = self._source
        client = self._connect_http1()
        pieces = source.random() < 0.2
        options = self._ticket_options()
        if source.random() < 0.2 and options["method"] == "GET":
            options["body"] = b"some body!"
        body = options.get("body")
        ticket = client.ask(
            self._shard, hold_back=source.randint(1, 20) if pieces else 0, **options
        )
        # In HTTP/1.1, the end of an answer to HEAD cannot be seen.
        is_endless = ticket.confirm and ticket.method == "HEAD"
        pipelined = not pieces and not is_endless and source.random() < 0.2
        if pipelined:
            client.ask(self._shard, **self._ticket_options())
        if pieces:
            await trio.sleep(source.choice((0, 0.01, 1, 4.9)))
            client.send_rest()
        if body:
            await trio.sleep(source.choice((0, 0.01, source.uniform(0, 10))))
            client.send_body()
        how = source.choice((client.close, client.reset, client.half_close))
        is_released = await self._wait(ticket, how)
        if pipelined and ticket.is_answered and ticket.left_at == math.inf:
            ticket = client.tickets[1]
            is_released = await self._wait(ticket, how)
        if source.random() < 0.7 or not ticket.is_answered:
            client.close()
        return is_released

    async def _play_http2(self) -> bool:
        source = self._source
        shared = [
            c for c in self._run.shared if not c.end.is_closed and c.end.hung_up_at == math.inf
        ]
        options = self._options()
        is_closed = self._may_be_slow and source.random() < 0.3
        if shared and source.random() < 0.6 and "pace" not in options and not is_closed:
            client = source.choice(shared)
        else:
            window = source.choice((0, 20)) if is_closed else 65_535
            client = self._connect_http2(window, options)
            if "pace" not in options and not is_closed:
                self._run.shared.append(client)
        upload = source.random() < 0.2
        hold_back = source.randint(1, 10) if source.random() < 0.2 and not client.holds_back else 0
        ticket = client.ask(
            self._shard, hold_back=hold_back, upload=upload, **self._ticket_options()
        )
        if hold_back:
            await trio.sleep(source.choice((0, 0.01, 1, 4.9)))
            client.send_rest()
        if is_closed:
            await ticket.begun.wait()
            await trio.sleep(source.choice((0, 0.3, 0.79, 2.0)))
            client.open_window(ticket)
        if upload:
            await trio.sleep(source.choice((0, 0.01, source.uniform(0, 10))))
            client.send_body(ticket)
        hang_ups: list[Callable[[], None]] = [partial(client.reset_stream, ticket)]
        if source.random() < 0.3:
            hang_ups = [client.close, client.reset, client.half_close]
        is_released = await self._wait(ticket, source.choice(hang_ups))
        if is_closed or (client not in self._run.shared) or source.random() < 0.1:
            client.close()
        return is_released

    async def _wait(self, ticket: WireTicket, hang_up: Callable[[], None]) -> bool:
        """Wait for the answer and identify, or hang up. Return whether the answer came."""
        await self._wait_for_answer(ticket, hang_up)
        if not ticket.is_answered or ticket.left_at < math.inf:
            return False
        if ticket.confirm:
            await self._identify(hang_up)
        return True

    async def _identify(self, hang_up: Callable[[], None]) -> None:
        """Confirm, perhaps late or not at all."""
        source, longest = self._source, self._scenario.confirm_seconds
        seconds = source.choice((0, longest, math.inf, *(source.uniform(0, longest),) * 3))
        await trio.sleep(min(seconds, longest + 1))
        if seconds < math.inf:
            hang_up()

    async def _wait_for_answer(self, ticket: WireTicket, hang_up: Callable[[], None]) -> None:
        """Wait for the answer, or hang up, perhaps at the instant in which it comes."""
        source, run = self._source, self._run
        if self._hang_ups and source.random() < 0.7:
            self._hang_ups -= 1
            window = self._scenario.window
            opens_at = self._record.opens_at(self._shard)
            until = source.choice(
                (
                    trio.current_time(),
                    opens_at,
                    opens_at,
                    opens_at - self._scenario.latency,
                    trio.current_time() + source.uniform(0, 2 * window),
                )
            )
            with trio.move_on_at(until):
                await ticket.ended.wait()
            if not ticket.ended.is_set():
                run.history.note(f"{ticket.name} hangs up")
                hang_up()
                await trio.sleep(TOO_SLOW if source.random() < 0.2 else 0)
            return
        while not ticket.ended.is_set():
            with trio.move_on_after(TOO_SLOW):
                await ticket.ended.wait()
            if ticket.is_suspect and ticket.first_at + TOO_SLOW < trio.current_time():
                break
        if ticket.ended.is_set() and not ticket.is_answered and not ticket.is_suspect:
            run.history.note(f"{ticket.name} was closed")


@contextmanager
def _log_into(history: WireHistory) -> Iterator[None]:
    """Write the log to the history. An error in it breaks a rule."""

    def note(_: object, level: str, event: structlog.typing.EventDict) -> str:
        words = " ".join(f"{k}={v}" for k, v in event.items() if k != "exc_info")
        history.note(f"log: {words}")
        if level in {"error", "exception", "critical"}:
            error = sys.exc_info()[1]
            history.report("error", f"{words}: {error!r}")
        raise structlog.DropEvent

    class Handler(logging.Handler):
        def emit(self, line: logging.LogRecord) -> None:
            error = line.exc_info[1] if line.exc_info else None
            history.report("error", f"Hypercorn: {line.getMessage()}: {error!r}")

    before = structlog.get_config()
    structlog.configure(
        processors=[note],
        wrapper_class=structlog.make_filtering_bound_logger("warning"),
        cache_logger_on_first_use=False,
    )
    logger, handler = logging.getLogger("gateway_queue.hypercorn"), Handler(logging.WARNING)
    logger.addHandler(handler)
    propagates, logger.propagate = logger.propagate, False
    try:
        yield
    finally:
        structlog.configure(**before)
        logger.removeHandler(handler)
        logger.propagate = propagates


async def run(seed: int) -> list[str]:
    """Run a seed, on a mock clock and in the context of :func:`repeatable`. Return its history."""
    history = _new_history(seed)
    await _play(history)
    return history.lines


def _new_history(seed: int) -> WireHistory:
    history = WireHistory()
    history.records = [WireRecord(scenario, history) for scenario in draw_all(seed)]
    return history


async def _play(history: WireHistory) -> None:
    default, *others = [record.scenario for record in history.records]
    with _log_into(history), _bots_file(others) as path:
        await _Run(history, Settings(**default.settings, bots_file=path)).run()


@contextmanager
def _bots_file(scenarios: Sequence[WireScenario]) -> Iterator[str | None]:
    """Write a file with some bots, if there are any."""
    if not scenarios:
        yield None
        return
    with NamedTemporaryFile("w", suffix=".toml") as file:
        file.writelines(scenario.table for scenario in scenarios)
        file.flush()
        yield file.name


def explore(seed: int) -> WireHistory:
    """Run the scenarios of a seed."""
    history = _new_history(seed)
    with repeatable(seed):
        trio.run(_play, history, clock=MockClock(autojump_threshold=0))
    return history
