"""The command: ``gateway-queue``, or ``python -m gateway_queue``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from functools import partial

import structlog
import trio
from hypercorn.config import Config
from hypercorn.trio import serve

from gateway_queue import __version__, app, terminal
from gateway_queue.serving.listener import address, listen
from gateway_queue.serving.process import exit_with_usage_error, load_settings
from gateway_queue.settings import BadSetting, describe
from gateway_queue.web.query import BadParameter, shard_number

GRACE_SECONDS = 1.0
"""How long the server waits, when it stops, for answers that it is writing."""

UNWIND_SECONDS = 0.5
"""How long the tasks may take to end after that. Then the process exits without waiting for them,
which closes every connection: a waiting client has two tasks, and ending both takes 0.2 ms, most of
it in trio."""

log = structlog.stdlib.get_logger(__name__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until SIGTERM or SIGINT, or show the status of a server."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command == "status":
        sys.exit(_status(options))
    # Not at the top: it reads the environment, and --help has to work with wrong settings too.
    from gateway_queue import server  # noqa: PLC0415

    host, port = server.settings.host, server.settings.port
    config = Config.from_object(server)
    try:
        listeners = listen(host, port, config.backlog)
    except BadSetting as error:
        exit_with_usage_error(error)
    except OSError as error:
        sys.exit(f"cannot listen on {host}:{port}: {error.strerror}")
    app.addresses = tuple(map(address, listeners))
    config.bind = [f"fd://{listener.detach()}" for listener in listeners]
    trio.run(_serve, config)
    signal.setitimer(signal.ITIMER_REAL, 0)  # the alarm would kill Python while it exits


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gateway-queue",
        description="Lets the shards of a Discord bot identify in turn, one per window and rate "
        "limit key.",
        epilog=f"environment variables:\n{describe()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"gateway-queue {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="[status]")
    status = commands.add_parser(
        "status",
        help="show the state of a running server (status --help)",
        description="Show the state of a running server. Exit status: 0 if it can release "
        "tickets, 1 if not, 2 for a usage error. It reads the token from AUTH_TOKEN or "
        "AUTH_TOKEN_FILE.",
    )
    status.add_argument("--url", type=_url, help="URL of the server (default: from HOST and PORT)")
    status.add_argument("--bot", metavar="NAME", help="bot of BOTS_FILE (default: the default bot)")
    status.add_argument("--watch", action="store_true", help="repeat every second")
    status.add_argument("shard", nargs="?", type=_shard, metavar="SHARD", help="show this shard")
    return parser


def _url(text: str) -> str:
    if not terminal.is_url(text):
        raise argparse.ArgumentTypeError(f"must be a URL with http:// or https://, not {text!r}")
    return text


def _shard(text: str) -> int:
    try:
        return shard_number(text)
    except BadParameter as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _status(options: argparse.Namespace) -> int:
    settings = load_settings()
    url = options.url or terminal.own_server(settings)
    server = terminal.Server(url, settings.auth_token, options.bot)
    return (terminal.watch if options.watch else terminal.show)(server, options.shard)


async def _serve(config: Config) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        await serve(app, config, shutdown_trigger=partial(_until_stopped, signals))


async def _until_stopped(signals: AsyncIterator[int]) -> None:
    """Wait for a signal, and then for the answers that the server is writing."""
    await anext(signals)
    log.info("stopping", waiting=app.room.waiting)
    with trio.move_on_after(GRACE_SECONDS):
        await app.bots.close()
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
    signal.setitimer(signal.ITIMER_REAL, UNWIND_SECONDS)


if __name__ == "__main__":
    main()
