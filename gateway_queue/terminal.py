"""The state of a running server, for people in a terminal: ``gateway-queue status``."""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
import signal
import ssl
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from http import HTTPStatus
from typing import Any, cast
from urllib.parse import urlencode, urlsplit

from gateway_queue.observing.lines import printable
from gateway_queue.settings import Settings

READY, NOT_READY = 0, 1
"""Exit statuses."""

TIMEOUT_SECONDS = 4.0

WATCH_SECONDS = 1.0
"""Seconds between two requests for the status."""

KEYS_SHOWN = 20
"""Rate limit keys to list: those with the most tickets."""

CLEAR = "\x1b[H\x1b[2J"

WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104


class NoStatus(Exception):
    """The server did not answer with its status; the message says why."""


@dataclass(frozen=True)
class Server:
    """Where to ask, with which token, and for which bot."""

    url: str
    token: str | None
    bot: str | None = None
    """None for the default bot."""

    def status(self, shard: int | None) -> dict[str, Any]:
        """Ask for the status.

        Raises:
          NoStatus: there is no answer, or it is not a status.
        """
        asked = {"bot": self.bot, "shard": shard}
        query = urlencode({name: value for name, value in asked.items() if value is not None})
        headers = {} if self.token is None else {"authorization": f"Bearer {self.token}"}
        url = urlsplit(self.url)
        connection = _connect(url.scheme, url.hostname or "", url.port)
        try:
            connection.request("GET", f"{url.path.rstrip('/')}/status?{query}", headers=headers)
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise NoStatus(f"no answer from {self.url}: {error or type(error).__name__}") from None
        finally:
            connection.close()
        if response.status == HTTPStatus.UNAUTHORIZED:
            raise NoStatus(f"{self.url} needs a valid token: set AUTH_TOKEN or AUTH_TOKEN_FILE")
        try:
            document = json.loads(body)
        except ValueError:
            document = None
        if response.status == HTTPStatus.BAD_REQUEST and isinstance(document, dict):
            raise NoStatus(f"{self.url} refuses the request: {document.get('detail')}")
        if response.status != HTTPStatus.OK or not _is_status(document):
            answer = f"{response.status} {response.reason}"
            raise NoStatus(f"{self.url} is not a gateway queue: {answer}")
        return cast("dict[str, Any]", document)


def own_server(settings: Settings) -> str:
    """Return the URL of a server with these settings on this machine."""
    host = WILDCARDS.get(settings.host, settings.host)
    scheme = "http" if settings.tls_cert_file is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{settings.port}"


def is_url(text: str) -> bool:
    """Return whether this is the URL of a server."""
    try:
        url = urlsplit(text)
        return url.scheme in {"http", "https"} and bool(url.hostname) and url.port != 0
    except ValueError:
        return False


def show(server: Server, shard: int | None) -> int:
    """Print the status, and return the exit status."""
    text, exit_status = look(server, shard)
    print(text)
    return exit_status


def watch(server: Server, shard: int | None) -> int:
    """Print the status every second until interrupted, and return the last exit status."""
    exit_status = NOT_READY
    # Not KeyboardInterrupt, which is lost where Python ignores exceptions.
    interrupted = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        while not interrupted.is_set():
            text, exit_status = look(server, shard)
            print(f"{CLEAR}{text}" if sys.stdout.isatty() else f"{text}\n", flush=True)
            interrupted.wait(WATCH_SECONDS)
    except BrokenPipeError:  # as with `| head`; Python would report it again when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return exit_status


def look(server: Server, shard: int | None) -> tuple[str, int]:
    """Describe the status as text, and return the exit status with it."""
    try:
        status = server.status(shard)
    except NoStatus as error:
        return printable(f"Not ready: {error}"), NOT_READY
    lines = _shard(status) if shard is not None else _queue(status)
    text = "\n".join(printable(line) for line in (_headline(status), *lines))
    return text, READY if status["ready"] else NOT_READY


def duration(seconds: float) -> str:
    """Write a duration in a short form."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = int(seconds) // 60
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def _is_status(document: object) -> bool:
    return isinstance(document, dict) and {"ready", "session_starts"} <= document.keys()


def _connect(scheme: str, host: str, port: int | None) -> http.client.HTTPConnection:
    # Not urllib.request, which would go through a proxy that the environment names.
    if scheme == "http":
        return http.client.HTTPConnection(host, port, timeout=TIMEOUT_SECONDS)
    context = ssl.create_default_context()
    if _is_this_machine(host):  # its certificate is for the name by which clients know it
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return http.client.HTTPSConnection(host, port, timeout=TIMEOUT_SECONDS, context=context)


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _headline(status: dict[str, Any]) -> str:
    if not status["ready"]:
        return f"Not ready: {status['reason']}"
    if status["max_concurrency"] == 0:
        return "Ready: every request is answered at once (MAX_CONCURRENCY=0)"
    if _is_spent(status):
        resets_in = status["session_starts"]["resets_in"]
        return f"Ready, but no session start is left today: shards wait until {_time(resets_in)}"
    return "Ready"


def _is_spent(status: dict[str, Any]) -> bool:
    starts = status["session_starts"]
    return starts is not None and starts["enforced"] and starts["remaining"] == 0


def _queue(status: dict[str, Any]) -> Iterator[str]:
    up = (
        datetime.now().astimezone() - datetime.fromisoformat(status["started_at"])
    ).total_seconds()
    keys = status["max_concurrency"]
    yield (
        f"  server    gateway-queue {status['version']}, up for {duration(up)}, "
        f"window {status['window_seconds']:g} s, "
        f"keys {'not known yet' if keys is None else keys}, store {status['store']}"
    )
    yield (
        f"  tickets   {status['waiting']:,} waiting ({status['held']:,} of them held), "
        f"{status['away']:,} away, {status['released']:,} released, "
        f"{status['abandoned']:,} disconnected before their turn"
    )
    yield f"  starts    {_starts(status)}"
    for name, fault in status["faults"].items():
        if fault is not None:
            yield (
                f"  {name:<9} {fault['reason']}, for {duration(fault['for'])}, "
                f"next try in {duration(fault['retry_in'])}"
            )
    yield from _keys(status["lanes"])
    yield from _bots(status.get("bots", []))


def _starts(status: dict[str, Any]) -> str:
    starts = status["session_starts"]
    if starts is None:
        return f"{status['starts_used']:,} used today, no limit known"
    text = (
        f"{starts['remaining']:,} of {starts['total']:,} left today, "
        f"reset in {duration(starts['resets_in'])}"
    )
    waiting = status["waiting"]
    if starts["enforced"] and starts["remaining"] < waiting:
        text += (
            f"; enough for {starts['remaining']:,} of {waiting:,} waiting, "
            f"the others after {_time(starts['resets_in'])}"
        )
    return text


def _keys(lanes: list[dict[str, Any]]) -> Iterator[str]:
    if lanes:
        yield ""
        yield f"  {'key':>5}  {'waiting':>7}  {'next':>9}  identifying"
    by_length = sorted(lanes, key=lambda lane: -lane["waiting"])
    for lane in sorted(by_length[:KEYS_SHOWN], key=lambda lane: int(lane["rate_limit_key"])):
        turns = [ticket["eta"] for ticket in lane["tickets"] if ticket["eta"] is not None]
        identifying = lane["identifying"]
        line = (
            f"  {lane['rate_limit_key']:>5}  {lane['waiting']:>7,}  "
            f"{duration(min(turns)) if turns else '-':>9}"
        )
        if identifying is not None:
            line += f"  shard {identifying['shard']}, for {duration(identifying['for'])}"
        yield line
    if len(lanes) > KEYS_SHOWN:
        yield f"  and {len(lanes) - KEYS_SHOWN} more keys"


def _bots(bots: list[dict[str, Any]]) -> Iterator[str]:
    """List all bots, those that cannot release tickets first."""
    if not bots:
        return
    width = max(len("bot"), *(len(bot["bot"]) for bot in bots))
    yield ""
    yield f"  {'bot':<{width}}  {'waiting':>7}  {'next':>9}  state"
    for bot in sorted(bots, key=lambda bot: bool(bot["ready"])):
        turn = bot["next_release"]
        yield (
            f"  {bot['bot']:<{width}}  {bot['waiting']:>7,}  "
            f"{'-' if turn is None else duration(turn):>9}  {bot['reason'] or 'ready'}"
        )


def _shard(status: dict[str, Any]) -> Iterator[str]:
    shard, lanes = status["shard"], status["lanes"]
    name = f"Shard {shard['shard']} (key {shard['rate_limit_key']})"
    places = [_place(ticket, lane) for lane in lanes for ticket in lane["tickets"]]
    places += [
        f"is identifying, for {duration(lane['identifying']['for'])}"
        for lane in lanes
        if lane["identifying"] and lane["identifying"]["shard"] == shard["shard"]
    ]
    for place in places or ["is not in the queue"]:
        yield f"{name} {place}"
    last, starts = shard["last_release"], shard["starts"]
    released = (
        f"last released {duration(last['ago'])} ago, after {duration(last['waited'])}"
        if last
        else "no recent release by this server"
    )
    plural = "" if starts == 1 else "s"
    yield f"  {released}; {starts} session start{plural} in the last 24 hours"


def _place(ticket: dict[str, Any], lane: dict[str, Any]) -> str:
    if ticket["state"] == "away":
        return f"is away: its client left, its place {ticket['position']} is kept"
    turn = "not known" if ticket["eta"] is None else f"in {duration(ticket['eta'])}"
    why = ", held because it starts too often" if ticket["state"] == "held" else ""
    return (
        f"waits at place {ticket['position']} ({lane['waiting']} waiting){why}; "
        f"waited {duration(ticket['waited'])}, its turn is {turn}"
    )


def _time(seconds: float) -> str:
    """Write the time of day after some seconds, in the zone of this machine."""
    return f"{datetime.now().astimezone() + timedelta(seconds=seconds):%H:%M}"
