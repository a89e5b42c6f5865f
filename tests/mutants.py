"""Mutation tests: small faults of the server, each of which the simulation has to find.

``python -m tests.mutants`` applies each fault to a copy of the package and runs the simulation
there, until a seed breaks an invariant that holds without the fault.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Timer

from tests.exploration import wire_run
from tests.exploration.invariants import broken
from tests.exploration.run import explore
from tests.exploration.scenario import ALL_KINDS

ROOT = Path(__file__).parent.parent

BROKEN = re.compile(r"^seed (\d+): ([\w-]+): ")
"""How a run reports a broken invariant."""


CALM = frozenset(ALL_KINDS) - {"clock-rate", "cap", "places", "hang-ups", "confirm"}
"""What to leave out of a scenario, so that nothing delays a release."""

MOVES = frozenset(ALL_KINDS) - {"kill", "stop", "places", "hang-ups"}
"""What to leave out of a scenario, so that only stops and hang-ups make clients move."""

ONLY_UNSTEADY_CLOCK = frozenset(ALL_KINDS) - {
    "unsteady-clock",
    "places",
    "hang-ups",
    "confirm",
    "bots",
}
"""What to leave out of a scenario, so that a clock that is set often is the only fault."""

ONLY_SENTINEL_FAILOVER = frozenset(ALL_KINDS) - {"sentinels", "sentinel-failover", "confirm"}
"""What to leave out of a scenario, so that a change of the primary is the only fault."""


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Args:
      file: path in the package.
      old: the correct text, which the file contains exactly once.
      new: the faulty text.
      why: what goes wrong.
      without: what to leave out of the scenarios that look for the fault.
    """

    file: str
    old: str
    new: str
    why: str
    without: frozenset[str] = frozenset()

    @property
    def is_of_http(self) -> bool:
        return self.file.startswith(("web/", "serving/"))

    def apply(self, package: Path) -> bool:
        """Write the fault into a copy of the package. Return whether ``old`` was there once."""
        path = package / self.file
        text = path.read_text()
        path.write_text(text.replace(self.old, self.new))
        return text.count(self.old) == 1


MUTANTS = (
    Mutant(
        "queue/queue.py",
        "self._list(self._places.leave(ticket))",
        "self._places.leave(ticket)",
        "a client that has left stays in its lane for ever",
    ),
    Mutant(
        "queue/ticket.py",
        "self._receive.receive_nowait().outcome.close()",
        "self._receive.receive_nowait()",
        "the slot of a client that leaves as it is chosen is lost",
    ),
    Mutant(
        "queue/queue.py",
        "            if answer is None:\n                await self.store.give_back(claim)",
        "            if answer is None:\n                pass",
        "an unused claim stays claimed",
    ),
    Mutant(
        "queue/queue.py",
        '            if place.state == "chosen":\n                place.state = "waiting"',
        '            if False:\n                place.state = "waiting"',
        "a place whose client left as it was chosen is lost",
    ),
    Mutant(
        "queue/queue.py",
        "        lane.retry_claim()\n\n    async def _claim_for_first",
        "\n    async def _claim_for_first",
        "a key is not claimed again after a release",
    ),
    Mutant(
        "queue/queue.py",
        "            lane.opens_at = min(lane.opens_at, trio.current_time())\n"
        "            lane.retry_claim()\n",
        "            lane.opens_at = min(lane.opens_at, trio.current_time())\n",
        "no lane claims again when a session start is free again",
    ),
    Mutant(
        "queue/queue.py",
        "at = answer.at + confirm_seconds",
        "at = answer.at",
        "without a confirmation, the window starts at the answer",
    ),
    Mutant(
        "queue/queue.py",
        "ticket.confirm != claim.confirm",
        "False",
        "a confirmed ticket gets the short claim of an ordinary one",
    ),
    Mutant(
        "queue/queue.py",
        "at, confirmed = await answer.outcome.receive(), True",
        "at, confirmed = answer.at, True",
        "the window of a confirmed ticket starts at its answer",
    ),
    Mutant(
        "queue/queue.py",
        "            self._list(place)\n            if not was_known",
        "            if not was_known",
        "places are in no lane when the number of keys has changed",
    ),
    Mutant(
        "queue/lane.py",
        "return self.waiting.peekitem(0)[1] if self.waiting else None",
        "return self.waiting.peekitem(-1)[1] if self.waiting else None",
        "last come, first served",
    ),
    Mutant(
        "queue/queue.py",
        "place.held_until = trio.current_time() + seconds",
        "place.held_until = trio.current_time() + 2 * seconds",
        "a shard is held twice as long as the store says",
    ),
    Mutant(
        "queue/places.py",
        "            if last is not place and last.ticket is not None:",
        "            if False:",
        "a client loses its place when another client of its shard leaves",
    ),
    Mutant(
        "queue/places.py",
        "            last.expires_at = trio.current_time() + self._store.rules.place_seconds",
        "            last.expires_at = trio.current_time() + self._store.rules.place_seconds / 2",
        "a place is kept for half of its time",
    ),
    Mutant(
        "queue/gate.py",
        "lane = min(self._waiting, key=_oldest)",
        "lane = max(self._waiting, key=_oldest)",
        "within MAX_CONCURRENCY the youngest ticket goes first",
    ),
    Mutant(
        "store/memory.py",
        "until = at + (self.rules.window if confirmed else self.rules.unconfirmed_window)",
        "until = at + self.rules.window",
        "the margin is left out in memory",
    ),
    Mutant(
        "store/memory.py",
        "        self._windows.open(claim)\n        self._pace.give_back()",
        "        self._windows.open(claim)",
        "an unused claim counts against MAX_CONCURRENCY for ever",
    ),
    Mutant(
        "store/memory.py",
        "now + rules.unconfirmed_window if rules.hold else now",
        "now",
        "no hold on start",
    ),
    Mutant(
        "store/windows.py",
        "% math.gcd(number, self._max_concurrency) == 0",
        "% math.gcd(number, self._max_concurrency) != 0",
        "windows of another number of keys count for the wrong keys",
    ),
    Mutant(
        "store/windows.py",
        "            self._former[self._max_concurrency, key] = until",
        "            pass",
        "windows are forgotten when the number of keys changes",
    ),
    Mutant(
        "store/pace.py",
        "len(self._over_at) + self._claimed < self._most",
        "len(self._over_at) < self._most",
        "claims under way do not count against MAX_CONCURRENCY",
    ),
    Mutant(
        "store/budget.py",
        "seen.remaining <= self._claimed",
        "seen.remaining < self._claimed",
        "one session start too many",
    ),
    Mutant(
        "store/redis/decisions.lua",
        "total >= 0 and used >= total then",
        "total >= 0 and used > total then",
        "one session start too many in Redis",
    ),
    Mutant(
        "store/loop_guard.py",
        "        if excess < 0 or",
        "        if excess <= 0 or",
        "a shard has one free start too many",
    ),
    Mutant(
        "store/redis/store.py",
        "lease = self._confirm_lease if confirm else self._claim_lease",
        "lease = self._claim_lease",
        "the claim of a confirmed ticket ends before its shard has identified",
    ),
    Mutant(
        "store/redis/store.py",
        "ago = math.floor((trio.current_time() - window.at) * (1 - DRIFT) * MICROSECONDS)",
        "ago = math.floor((trio.current_time() - window.at + 0.01) * MICROSECONDS)",
        "windows in Redis start 10 ms too early",
    ),
    Mutant(
        "store/redis/store.py",
        "        if asked_at < self._opens_at:",
        "        if False:",
        "a server that may have missed leases is trusted at once",
    ),
    Mutant(
        "store/redis/store.py",
        '            await self._ask("restore", *arguments)',
        "            pass",
        "session starts are not restored after a loss of data",
    ),
    Mutant(
        "store/redis/store.py",
        '            connection.close("its data was lost")',
        "            self._since = answer.since",
        "a loss of data is overlooked",
    ),
    Mutant(
        "store/redis/store.py",
        "            if self._since != self._trusted_since or not is_identified:",
        "            if True:",
        "a connection that is lost costs a whole lease though nothing else was lost",
    ),
    Mutant(
        "store/redis/store.py",
        "            self._send_away()",
        "            pass",
        "clients wait at a replica for which Redis is too slow, though others could release them",
    ),
    Mutant(
        "store/redis/decisions.lua",
        "    and replid == server\n",
        "",
        "a server that has taken over counts as the former one",
    ),
    Mutant(
        "store/redis/store.py",
        "wait = asked_at + answer.wait / MICROSECONDS - trio.current_time()",
        "wait = asked_at + answer.wait / MICROSECONDS - trio.current_time() + 1",
        "a replica asks a second late whether a key is open",
        without=CALM,
    ),
    Mutant(
        "store/redis/clock.py",
        "        return step <= self._small_step",
        "        return True",
        "a clock that was set is not noticed",
    ),
    Mutant(
        "store/redis/clock.py",
        "            former[-1] = former[-1][0], now",
        "            former.clear()",
        "a window does not last longer when the clock is set forward meanwhile",
        without=ONLY_UNSTEADY_CLOCK,
    ),
    Mutant(
        "store/redis/servers.py",
        " if named and 2 * named[0][1] > len(self._url.sentinels) else None",
        " if named else None",
        "one of three sentinels is enough to name the primary",
        without=ONLY_SENTINEL_FAILOVER,
    ),
    Mutant(
        "store/redis/decisions.lua",
        "        latest, closing = until_when, other .. ':' .. its_key",
        "        latest, closing = latest, other .. ':' .. its_key",
        "windows of another number of keys do not count",
    ),
    Mutant(
        "store/redis/decisions.lua",
        "    and now > tonumber(last) -- otherwise the clock was set back",
        "",
        "a clock that was set back is not noticed by the script",
    ),
    Mutant(
        "store/redis/decisions.lua",
        "  return math.min(wait, glance)\nend",
        "  return 0\nend",
        "an older ticket of another replica does not go first",
        without=CALM,
    ),
    Mutant(
        "store/redis/decisions.lua",
        "    and (seen_since ~= since or tonumber(seen_here or 0) >= seen_at)",
        "",
        "an older copy of the data counts as the current data",
    ),
    Mutant(
        "store/redis/decisions.lua",
        "  local excess = used - free_starts",
        "  local excess = used - free_starts - 1",
        "a shard has one free start too many in Redis",
    ),
    Mutant(
        "store/redis/decisions.lua",
        "    set_release(token, until_when, '?' .. useless_at)\n",
        "",
        "claims under way do not count against MAX_CONCURRENCY in Redis",
    ),
    Mutant(
        "store/redis/decisions.lua",
        "  redis.call('ZREM', starts, token)\n",
        "",
        "a claim that was given back counts as a session start",
    ),
    Mutant(
        "store/redis/decisions.lua",
        "    take_oldest(places, mine, has_client and connected or came, is_new)\n",
        "",
        "a client that comes back to another replica has no place there",
        without=MOVES,
    ),
    Mutant(
        "store/redis/line.py",
        "self._move(shared.place, since / MICROSECONDS, clock.when(since))",
        "pass",
        "a replica does not learn of the place that its client had at another one",
        without=MOVES,
    ),
    Mutant(
        "store/redis/store.py",
        "        self._prefix = prefix\n",
        '        self._prefix = "gateway-queue"\n',
        "all bots have the windows of the default bot",
    ),
    Mutant(
        "web/access.py",
        "service = self._bots.get(next(iter(names))) if len(names) == 1 else None",
        "service = self._bots.default",
        "each ticket is one of the default bot",
    ),
    Mutant(
        "web/tickets.py",
        '        self._is_http_1 = scope["http_version"] != "2"',
        "        self._is_http_1 = True",
        "an answer of HTTP/2 does not end",
    ),
    Mutant(
        "serving/hypercorn/requests.py",
        "            self._here.cancel()",
        "            pass",
        "a client that has left still gets a slot",
    ),
    Mutant(
        "serving/hypercorn/http2.py",
        "            with trio.CancelScope(deadline=buffer.send_by):\n"
        "                await self._flush()\n"
        "            await buffer.pop(len(data))\n",
        "            await buffer.pop(len(data))\n"
        "            with trio.CancelScope(deadline=buffer.send_by):\n"
        "                await self._flush()\n",
        "a window starts before the answer of HTTP/2 is written",
    ),
    Mutant(
        "serving/hypercorn/http1.py",
        "            self.task_group.spawn(self._read_on)",
        "            pass",
        "a request that comes behind one that stalls is never read",
    ),
)


Broken = tuple[int, str]
"""A seed, and the invariant that it breaks."""


class Simulation:
    """The simulation of a copy of the package.

    Args:
      mutant: what to change in the copy.
    """

    def __init__(self, mutant: Mutant) -> None:
        self._mutant = mutant

    def run(self, seeds: int, seconds: float) -> Iterator[Broken]:
        """Yield broken invariants until the time is over."""
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            for part in ("gateway_queue", "tests"):
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / part, root / part, ignore=ignored)
            if not self._mutant.apply(root / "gateway_queue"):
                raise LookupError(f"{self._mutant.file} does not have {self._mutant.old!r} once")
            with self._process(root, seeds) as process:
                end = Timer(seconds, _kill, [process])
                end.start()
                assert process.stdout is not None
                try:
                    for line in process.stdout:
                        if found := BROKEN.match(line):
                            yield int(found[1]), found[2]
                finally:
                    end.cancel()
                    _kill(process)

    def _process(self, root: Path, seeds: int) -> subprocess.Popen[str]:
        module = ["tests.exploration", "--go-on", "--seeds", str(seeds)]
        if self._mutant.without:
            module += ["--without", *sorted(self._mutant.without)]
        if self._mutant.is_of_http:
            module.append("--http")
        return subprocess.Popen(
            [sys.executable, "-u", "-m", *module],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )


def _kill(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


@cache
def _broken_anyway(seed: int, without: frozenset[str], *, of_http: bool) -> frozenset[str]:
    """Return the invariants that a seed breaks without a mutant."""
    if of_http:
        return frozenset(name for name, _ in wire_run.explore(seed).wrong)
    return frozenset(broken(explore(seed, without=without)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Try mutants, print which are caught, and return the exit status."""
    options = _parser().parse_args(arguments)
    chosen = [MUTANTS[number] for number in options.only or range(len(MUTANTS))]
    survivors = 0
    for mutant in chosen:
        started_at, caught = time.monotonic(), "SURVIVES"
        for seed, name in Simulation(mutant).run(options.seeds, options.seconds):
            if name not in _broken_anyway(seed, mutant.without, of_http=mutant.is_of_http):
                caught = f"{name} at {seed + 1} seeds"
                break
        survivors += caught == "SURVIVES"
        seconds = time.monotonic() - started_at
        number = MUTANTS.index(mutant)
        print(
            f"{number:2}  {mutant.file:24} {caught:36} {seconds:3.0f} s  {mutant.why}", flush=True
        )
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants are caught")
    return int(survivors > 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants",
        description="Applies small faults to copies of the package, and runs the simulation on "
        "each until an invariant breaks. All of them take about 20 minutes on 2 cores. The exit "
        "status is 1 if a fault is not found.",
    )
    add = parser.add_argument
    add("--only", type=int, nargs="+", metavar="NUMBER", help="run only these, from 0")
    add("--seeds", type=int, default=4000, metavar="N", help="seeds for each mutant (4000)")
    add("--seconds", type=float, default=250, metavar="S", help="time for each mutant (250)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
