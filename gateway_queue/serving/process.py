"""The process: its settings, its system limits and its garbage collector."""

from __future__ import annotations

import errno
import fcntl
import gc
import hmac
import multiprocessing
import os
import resource
import signal
import socket
import ssl
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from gateway_queue.bots_file import read_bots
from gateway_queue.observing import logs
from gateway_queue.serving import event_loop, hypercorn
from gateway_queue.settings import BadSetting, Settings

EXIT_USAGE = 2


def load_settings() -> Settings:
    """Read the settings from the environment, or end the process with one line on stderr."""
    try:
        return _checked_settings()
    except BadSetting as error:
        exit_with_usage_error(error)


def _checked_settings() -> Settings:
    settings = Settings.from_environ(os.environ)
    read_bots(settings)
    _check_certificate(settings)
    return settings


def _check_certificate(settings: Settings) -> None:
    certificate, key = settings.tls_cert_file, settings.tls_key_file
    if certificate is None and key is None:
        return
    if certificate is None or key is None:
        lacks = "TLS_CERT_FILE" if certificate is None else "TLS_KEY_FILE"
        raise BadSetting(lacks, "is not set; TLS needs both TLS_CERT_FILE and TLS_KEY_FILE")
    for setting, path in (("TLS_CERT_FILE", certificate), ("TLS_KEY_FILE", key)):
        try:
            Path(path).read_bytes()
        except OSError as error:
            problem = f"must be the path of a PEM file, not {path!r} ({error.strerror})"
            raise BadSetting(setting, problem) from None
    try:
        # A key with a password would ask for it on the terminal.
        ssl.create_default_context().load_cert_chain(certificate, key, password="")
    except OSError:
        problem = (
            f"and TLS_KEY_FILE must be a certificate and its key, not {certificate!r} and {key!r}"
        )
        raise BadSetting("TLS_CERT_FILE", problem) from None


def exit_with_usage_error(error: BadSetting) -> NoReturn:
    """End the process with one line on stderr."""
    print(error, file=sys.stderr)
    sys.exit(EXIT_USAGE)


def prepare() -> Settings:
    """Make this process ready to serve, however it is started, and return its settings."""
    settings = prepare_process()
    try:
        hypercorn.install()
    except hypercorn.UnknownHypercorn as error:
        exit_unable_to_serve(str(error))
    event_loop.install()
    return settings


def prepare_process() -> Settings:
    """Prepare the process, without changing Hypercorn and trio."""
    try:
        settings = _checked_settings()
    except BadSetting as error:
        exit_unable_to_serve(str(error))
    if settings.redis_url is None and not _is_sole_worker():
        exit_unable_to_serve(
            "a second worker would release twice as fast as the limit, because each worker would "
            "keep its own windows: run hypercorn with --workers 1, or set REDIS_URL to share them"
        )
    logs.configure(settings)
    _raise_open_files_limit()
    _tune_garbage_collector()
    return settings


def exit_unable_to_serve(line: str) -> NoReturn:
    """End the server with one line on stderr, however it was started.

    Hypercorn cannot handle an app that does not start: it continues without the app, or prints the
    stacks of all its tasks, and reports success although its workers failed.
    """
    # In one write, unlike print(): another worker may write a line at the same time.
    sys.stderr.write(f"{line}\n")
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid == os.getppid() and _is_worker_of_hypercorns_command():
        _end_hypercorn(os.getppid())
    os._exit(EXIT_USAGE)


def _is_worker_of_hypercorns_command() -> bool:
    """Return whether the parent is Hypercorn's command, and not a program that uses Hypercorn.

    Hypercorn spawns its workers. So Python also imports the main module of the parent here or, if
    that is the main module of a package, passes on its path. A process that the app starts has the
    same main module, but does not run a function of Hypercorn.
    """
    started = getattr(multiprocessing.current_process(), "_target", None)
    main = Path(getattr(sys.modules["__main__"], "__file__", None) or sys.argv[0])
    return getattr(started, "__module__", "").startswith("hypercorn.") and (
        main.name == "hypercorn" or main.parts[-2:] == ("hypercorn", "__main__.py")
    )


def _end_hypercorn(parent: int) -> None:
    """End the processes of Hypercorn's command, so that its exit status is not 0."""
    workers: list[str] = []
    with suppress(OSError):
        workers = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    for process in (parent, *map(int, workers)):
        if process != os.getpid():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def _is_sole_worker() -> bool:
    """Return whether this is the only worker of its Hypercorn, and keep others from starting."""
    if multiprocessing.parent_process() is None:
        return True
    # Only the children of a program know its key, so no other server or user can hold this name.
    key = multiprocessing.current_process().authkey
    name = f"gateway-queue-{hmac.digest(key, b'%d' % os.getppid(), 'sha256').hex()}"
    if sys.platform == "linux":
        return hold_socket(name)
    return hold_file(Path(tempfile.gettempdir(), f"{name}.lock"))


def hold_socket(name: str) -> bool:
    """Hold an abstract socket until this process ends; return False if another process holds it."""
    holder = socket.socket(socket.AF_UNIX)
    try:
        holder.bind(f"\0{name}")
    except OSError as error:
        holder.close()
        if error.errno != errno.EADDRINUSE:
            raise
        return False
    holder.detach()  # stays open
    return True


def hold_file(path: Path) -> bool:
    """Hold a lock file, on systems without abstract sockets. The file stays."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    return True


def _raise_open_files_limit() -> None:
    """Allow a socket for every client: the soft limit is mostly 1024, the hard one far higher."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS grants less than its hard limit says
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _tune_garbage_collector() -> None:
    """Collect seldom: to scan the objects of thousands of waiting clients makes releases late.

    Measured with 9,000 waiting clients: worst lateness 287 ms before, 6 ms after, and 43 % less
    CPU. To scan 50,000 new objects takes 15 ms, which delays releases under heavy load. So the
    collector scans 5,000 new objects at a time. It scans older objects only after 2.5 million new
    ones, as many as 20,000 waiting clients have.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 500, 1000)
