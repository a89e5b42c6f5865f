"""The command: ways to run it, settings that it refuses, and how it stops."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import trustme

import gateway_queue
from gateway_queue.serving.listener import listen
from gateway_queue.settings import BadSetting, Settings
from tests.harness import (
    GO,
    PATIENCE,
    REQUEST,
    allow_10_000_connections,
    environ,
    first_answers,
    free_port,
    installed,
    serving,
    with_open_files,
)

GATEWAY_QUEUE = installed("gateway-queue")
HYPERCORN = installed("hypercorn")

WAYS = {
    "command": (GATEWAY_QUEUE,),
    "module": (sys.executable, "-m", "gateway_queue"),
    "hypercorn": (
        HYPERCORN,
        "--worker-class",
        "trio",
        "--bind",
        "127.0.0.1:0",
        "gateway_queue:app",
    ),
    "hypercorn with our settings": (
        *(HYPERCORN, "-c", "python:gateway_queue.server", "gateway_queue:app"),
    ),
    "hypercorn module": (
        *(sys.executable, "-m", "hypercorn", "--worker-class", "trio"),
        *("--bind", "127.0.0.1:0", "gateway_queue:app"),
    ),
}


HYPERCORNS_GRACE_SECONDS = 3.0
"""Hypercorn waits this much for requests when it stops, unless its settings say otherwise."""


def run(*command: str, **variables: object) -> subprocess.CompletedProcess[str]:
    """Run a command until it ends by itself."""
    return subprocess.run(
        command, env=environ(**variables), capture_output=True, text=True, check=False, timeout=20
    )


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_run_it_serves(way: str) -> None:
    with serving(*WAYS[way], WINDOW_SECONDS=0.1) as server:
        assert [server.connect().answer().body for _ in range(3)] == [GO] * 3


@pytest.mark.parametrize("way", ["command", "hypercorn with our settings"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_and_answers_no_client(way: str, number: signal.Signals) -> None:
    with serving(*WAYS[way], WINDOW_SECONDS=3600) as server:
        clients = [server.connect() for _ in range(100)]
        server.settle()
        server.signal(number)
        start = time.monotonic()
        assert {client.rest() for client in clients} == {b""}
        assert server.wait() == 0
        assert time.monotonic() - start < HYPERCORNS_GRACE_SECONDS
        with pytest.raises(ConnectionRefusedError):
            server.connect()


def test_the_command_ends_its_tasks_when_it_stops() -> None:
    """``main`` returns, unless so many clients wait that this would take too long."""
    code = "from gateway_queue.__main__ import main; main([]); print('returned')"
    with serving(sys.executable, "-c", code, WINDOW_SECONDS=3600) as server:
        [server.connect() for _ in range(100)]
        server.settle()
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
    assert server.lines[-1] == "returned"


def test_the_command_stops_within_2_seconds_with_10_000_waiting() -> None:
    allow_10_000_connections()
    with serving(WINDOW_SECONDS=3600) as server:
        clients = [server.connect() for _ in range(10_000)]
        server.settle()
        start = time.monotonic()
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert time.monotonic() - start < 2
        assert {client.rest() for client in clients} == {b""}


def test_a_stop_between_releases_answers_no_other_client() -> None:
    with serving(WINDOW_SECONDS=0.2) as server:
        clients = [server.connect() for _ in range(50)]
        first_answers(clients[:5], 5)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        answers = [client.rest() for client in clients[5:]]
    whole = [answer.endswith(GO) for answer in answers]
    assert whole == sorted(whole, reverse=True)
    assert all(
        answer == b"" for answer, is_whole in zip(answers, whole, strict=True) if not is_whole
    )
    assert sum(whole) <= 2


@pytest.mark.parametrize("arguments", [(), ("-c", "python:gateway_queue.server")])
def test_a_second_worker_is_refused(arguments: tuple[str, ...], tmp_path: Path) -> None:
    refused = run(
        *(HYPERCORN, "--worker-class", "trio", "--workers", "2", "--bind", "127.0.0.1:0"),
        *(*arguments, "gateway_queue:app"),
        TMPDIR=tmp_path,
    )
    assert refused.returncode != 0
    first = ("gateway-queue starts", "Running on")
    (line,) = [
        line for line in refused.stderr.splitlines() if not any(words in line for words in first)
    ]
    assert "second worker" in line
    assert "Traceback" not in refused.stderr
    assert list(tmp_path.glob("gateway-queue*")) == []


def test_two_servers_side_by_side_do_not_disturb_each_other(tmp_path: Path) -> None:
    command = WAYS["hypercorn"]
    variables = {"WINDOW_SECONDS": 0.1, "TMPDIR": tmp_path}
    with serving(*command, **variables) as one, serving(*command, **variables) as two:
        assert one.connect().answer().status == two.connect().answer().status == 200
    assert list(tmp_path.glob("gateway-queue*")) == []


def test_a_worker_holds_its_name_until_it_ends(tmp_path: Path) -> None:
    """Also on systems without abstract sockets."""
    code = (
        "import sys, time; from pathlib import Path; from gateway_queue.serving import process; "
        "print(process.hold_socket(sys.argv[1]), process.hold_file(Path(sys.argv[1])), flush=True);"
        "time.sleep(float(sys.argv[2]))"
    )
    command = (sys.executable, "-c", code, str(tmp_path / "name"))
    with subprocess.Popen([*command, "60"], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "True True\n"
        assert run(*command, "0").stdout == "False False\n"
        first.kill()
    assert run(*command, "0").stdout == "True True\n"


BAD_VALUES = {
    "PORT": ["", "abc", "-1", "65536", "80.0", "\uff15", "1_0", " 80"],
    "WINDOW_SECONDS": ["", "0", "-1", "nan", "inf", "1e999", "1_0", "5s", "86400.1", "1e13"],
    "MARGIN_SECONDS": ["", "-1", "86400.1"],
    "HOLD_ON_START": ["", "maybe", "2"],
    "MAX_CONCURRENCY": ["", "-1", "1.5", "many", "1" * 20],
    "SESSION_START_LIMIT": ["", "-1", "1e3"],
    "LOOP_FREE_STARTS": ["", "-1", "no"],
    "DISCORD_REFRESH_SECONDS": ["", "0", "-1", "never"],
    "DISCORD_API_URL": [
        *("", "discord.com", "ftp://discord.com", "http://", "http://:80/", "http://h:0/"),
        *("http://h:99999/", "http://[::1/", "http://user:word@h/", "http://h/?a=b"),
        *("http://h/ /", "http://h/\n"),
    ],
    "LOG_LEVEL": ["", "loud"],
    "LOG_FORMAT": ["", "xml"],
    "HOST": ["", "no host"],
    "REDIS_PREFIX": ["", "a b", "}a"],
}


@pytest.mark.parametrize("variable", BAD_VALUES)
def test_a_bad_value_is_named(variable: str) -> None:
    for value in BAD_VALUES[variable]:
        with pytest.raises(BadSetting) as bad:
            Settings.from_environ({variable: value})
        assert_explains(str(bad.value), variable, value)


def assert_explains(line: str, variable: str, value: str) -> None:
    assert "\n" not in line
    if not value:
        assert line == f"{variable} is empty; set it or unset it"
    else:
        assert line.startswith(f"{variable} must be ")
        assert line.endswith(f", not {value!r}")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        *((variable, values[-1]) for variable, values in BAD_VALUES.items()),
        *(("HOST", value) for value in ("300.1.1.1", "198.51.100.1", "host.invalid")),
    ],
)
def test_a_bad_value_ends_the_command(variable: str, value: str) -> None:
    refused = run(GATEWAY_QUEUE, **{"PORT": 0, variable: value})
    assert refused.returncode == 2
    assert refused.stdout == ""
    (line,) = refused.stderr.splitlines()
    assert_explains(line, variable, value)


@pytest.mark.parametrize(
    "url",
    [
        *("localhost", "http://h", "redis://", "redis://:word@", "redis://h:99999"),
        *("redis://h:0", "redis://h/name", "redis://h /0", "redis://[::1", "unix://"),
    ],
)
def test_a_bad_redis_url_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(BadSetting) as bad:
        Settings.from_environ({"REDIS_URL": url})
    assert str(bad.value).startswith("REDIS_URL must be a URL such as redis://")
    assert str(bad.value).endswith(f", not the given value of {len(url)} characters")


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        (
            "redis://h?foo=bar",
            "an unknown option foo after the question mark; redis:// supports only db",
        ),
        (
            "redis://h/0?ssl_ca_certs=/ca.pem",
            "an unknown option ssl_ca_certs after the question mark",
        ),
        (
            "rediss://h/0?ca=/ca.pem",
            "an unknown option ca after the question mark; rediss:// supports",
        ),
        ("unix:///run/redis.sock?timeout=1", "an unknown option timeout after the question mark"),
        (
            "redis://user:12?word@h:6379",
            "an unknown option after the question mark; redis:// supports",
        ),
        ("redis://h?db=1&db=2", "the option db twice"),
        ("redis://h?db=", "a wrong value of the option db"),
        ("redis://h?db=word", "a wrong value of the option db"),
        ("rediss://h?ssl_check_hostname=ja", "a wrong value of the option ssl_check_hostname"),
        ("rediss://h?ssl_cert_reqs=all", "a wrong value of the option ssl_cert_reqs"),
    ],
)
def test_an_option_of_a_redis_url_that_cannot_be_used_is_refused(url: str, problem: str) -> None:
    with pytest.raises(BadSetting) as bad:
        Settings.from_environ({"REDIS_URL": url})
    assert str(bad.value).startswith(f"REDIS_URL has {problem}")
    assert "word" not in str(bad.value)


def test_an_unknown_option_of_a_redis_url_ends_the_command() -> None:
    refused = run(GATEWAY_QUEUE, PORT=0, REDIS_URL="redis://localhost?foo=bar")
    assert (refused.returncode, refused.stdout) == (2, "")
    (line,) = refused.stderr.splitlines()
    assert line.startswith("REDIS_URL has an unknown option foo ")


def test_redis_urls_of_all_kinds_are_accepted() -> None:
    for url in (
        *("redis://h", "redis://h:6379/0", "rediss://user:word@h:1/2?ssl_ca_certs=/ca.pem"),
        "rediss://h?ssl_certfile=/c&ssl_keyfile=/k&ssl_cert_reqs=none&ssl_check_hostname=True&db=1",
        *("redis://[::1]:6379", "unix:///run/redis.sock", "unix://:word@/run/redis.sock?db=3"),
    ):
        assert Settings.from_environ({"REDIS_URL": url}).redis_url == url


def test_a_bad_secret_is_not_shown(tmp_path: Path) -> None:
    secret = "Bot MTk4NjIy.Cl2FMQ.ZnCjm1XVW7vRze4b"
    in_file = tmp_path / "secret"
    in_file.write_text(secret)
    for variables in ({"DISCORD_TOKEN": secret}, {"DISCORD_TOKEN_FILE": in_file}):
        refused = run(GATEWAY_QUEUE, **{"PORT": 0, **variables})
        assert refused.returncode == 2
        (line,) = refused.stderr.splitlines()
        assert line.startswith(f"{next(iter(variables))} must be the token of a bot, ")
        assert line.endswith(", not the given value of 36 characters")
        assert "ZnCjm1" not in line


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe"])
def test_a_secret_file_that_cannot_be_used_is_named(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content)
    refused = run(GATEWAY_QUEUE, PORT=0, DISCORD_TOKEN_FILE=path)
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert line.startswith("DISCORD_TOKEN_FILE must be the path of a text file, not ")


def test_a_secret_is_taken_from_one_place(tmp_path: Path) -> None:
    refused = run(GATEWAY_QUEUE, PORT=0, DISCORD_TOKEN="a", DISCORD_TOKEN_FILE=tmp_path)
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert line == "DISCORD_TOKEN_FILE and DISCORD_TOKEN are both set; unset one of them"


def test_tls_needs_a_certificate_and_its_key(tmp_path: Path) -> None:
    names = ("certificate", "other", "none", "text")
    certificate, other, none, text = (str(tmp_path / f"{name}.pem") for name in names)
    for path in certificate, other:
        issued = trustme.CA().issue_cert("localhost")
        issued.private_key_and_cert_chain_pem.write_to_path(path)
    Path(text).write_text("text")
    for cert_file, key_file, problem in (
        (certificate, None, "TLS_KEY_FILE is not set; TLS needs both"),
        (None, certificate, "TLS_CERT_FILE is not set; TLS needs both"),
        (none, certificate, "TLS_CERT_FILE must be the path of a PEM file, not "),
        (certificate, none, "TLS_KEY_FILE must be the path of a PEM file, not "),
        (text, text, "TLS_CERT_FILE and TLS_KEY_FILE must be a certificate and its key, not "),
        (certificate, other, "TLS_CERT_FILE and TLS_KEY_FILE must be a certificate and its key, "),
    ):
        files = {"TLS_CERT_FILE": cert_file, "TLS_KEY_FILE": key_file}
        refused = run(GATEWAY_QUEUE, **{name: path for name, path in files.items() if path})
        assert refused.returncode == 2
        (line,) = refused.stderr.splitlines()
        assert line.startswith(problem)


@pytest.mark.parametrize("way", ["hypercorn", "hypercorn with our settings", "hypercorn module"])
def test_hypercorn_refuses_a_bad_value_as_well(way: str) -> None:
    refused = run(*WAYS[way], WINDOW_SECONDS="0")
    assert refused.returncode != 0
    assert refused.stderr.splitlines() == [
        "WINDOW_SECONDS must be a number over 0 and up to 86400, not '0'"
    ]


PROGRAM = """
import multiprocessing, sys, hypercorn.run, hypercorn.trio, trio
from hypercorn.config import Config

config = Config.from_mapping(
    worker_class="trio", bind="127.0.0.1:0", application_path="gateway_queue:app"
)

def bot(end):
    sys.exit(0 if end.wait(20) else 1)

def queue():
    from gateway_queue import app
    trio.run(hypercorn.trio.serve, app, config)

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    end = context.Event()
    children = [context.Process(target=bot, args=(end,))]
    children[0].start()
    if sys.argv[2] == "serve":
        children.append(context.Process(target=queue))
        children[1].start()
        children[1].join()
    else:
        hypercorn.run.run(config)
    end.set()
    children[0].join()
    print([child.exitcode for child in children])
"""


@pytest.mark.parametrize(
    ("arguments", "status"),
    [(("spawn", "serve"), "[0, 2]"), (("fork", "serve"), "[0, 2]"), (("spawn", "run"), "[0]")],
)
def test_a_bad_value_does_not_end_a_program_that_starts_the_queue_and_a_bot(
    arguments: tuple[str, ...], status: str, tmp_path: Path
) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    ended = run(sys.executable, str(program), *arguments, WINDOW_SECONDS="0")
    assert ended.returncode == 0
    assert ended.stdout.splitlines()[-1] == status
    assert ended.stderr.splitlines() == [
        "WINDOW_SECONDS must be a number over 0 and up to 86400, not '0'"
    ]


@pytest.mark.parametrize("change", ["del tcp_server.TaskGroup", "tcp_server.TaskGroup = int"])
def test_an_unknown_version_of_hypercorn_is_refused(change: str) -> None:
    code = (
        "from hypercorn.trio import tcp_server; import gateway_queue.serving.hypercorn; "
        f"{change}; from gateway_queue.__main__ import main; main([])"
    )
    refused = run(sys.executable, "-c", code, PORT=0)
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert "hypercorn.trio.tcp_server.TaskGroup" in line


def test_a_port_in_use_is_reported_in_one_line() -> None:
    with serving() as server:
        refused = run(GATEWAY_QUEUE, PORT=server.port)
    assert refused.returncode == 1
    (line,) = refused.stderr.splitlines()
    assert str(server.port) in line
    assert "in use" in line


@pytest.mark.parametrize("host", ["::1", "localhost", "0.0.0.0", "::"])
def test_the_server_binds_to_its_host(host: str) -> None:
    with serving(HOST=host, WINDOW_SECONDS=0.01) as server:
        if host == "::1":
            with socket.create_connection(("::1", server.port)) as client:
                client.sendall(REQUEST)
                assert client.recv(12) == b"HTTP/1.1 200"
        else:
            assert server.connect().answer().status == 200


def test_a_name_with_several_addresses_is_bound_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with localhost on most machines. The address of another machine is skipped."""
    addresses = [
        found
        for host in ("::1", "127.0.0.1", "198.51.100.1")
        for found in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: addresses)
    listeners = listen("localhost", 0, 10)
    bound = [listener.getsockname()[:2] for listener in listeners]
    for listener in listeners:
        listener.close()
    assert [address for address, _ in bound] == ["::1", "127.0.0.1"]
    assert len({port for _, port in bound}) == 1


def test_help_and_version_need_no_good_environment() -> None:
    assert run(GATEWAY_QUEUE, "--version", PORT="x").stdout == (
        f"gateway-queue {gateway_queue.__version__}\n"
    )
    explained = run(GATEWAY_QUEUE, "--help", PORT="x")
    assert explained.returncode == 0
    for field in dataclasses.fields(Settings):
        assert field.name.upper() in explained.stdout
    assert "DISCORD_TOKEN_FILE" in explained.stdout


def test_json_logs_are_one_object_per_line() -> None:
    with serving(LOG_FORMAT="json", WINDOW_SECONDS=0.01) as server:
        server.connect(b"GET /?shard=7 HTTP/1.1\r\nHost: q\r\n\r\n").answer()
        server.connect(b"GET /?shard=x HTTP/1.1\r\nHost: q\r\n\r\n").answer()
        server.signal(signal.SIGTERM)
        server.wait()
    lines = [json.loads(line) for line in server.lines]
    assert [line["event"].split()[0] for line in lines] == [
        *("gateway-queue", "Running", "released", "refused", "stopping"),
    ]
    assert lines[2]["shard"] == 7
    assert lines[3]["level"] == "warning"


def test_the_log_level_is_respected() -> None:
    port = free_port()
    quiet = subprocess.Popen(
        [GATEWAY_QUEUE],
        env=environ(PORT=port, WINDOW_SECONDS=0.01, LOG_LEVEL="warning"),
        stderr=subprocess.PIPE,
        text=True,
    )
    give_up = time.monotonic() + 20
    while time.monotonic() < give_up:
        try:
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(REQUEST)
                assert client.recv(12) == b"HTTP/1.1 200"
            break
        except ConnectionRefusedError:
            time.sleep(0.05)
    quiet.terminate()
    assert quiet.communicate()[1] == ""
    assert quiet.returncode == 0


WITHOUT_PYGMENTS = """
import sys
sys.modules["pygments"] = None
"""
SERVER_WITHOUT_PYGMENTS = f"""{WITHOUT_PYGMENTS}
from gateway_queue.__main__ import main
main([])
"""
LIBRARIES = "import quart_trio, hypercorn.trio, structlog.dev, prometheus_client"
"""Imports of most of the server's libraries."""


def test_an_idle_server_neither_wakes_up_nor_grows() -> None:
    """An idle server has no voluntary context switch in 2 s, and its memory stays small.

    The command runs without pygments, as where only the server is installed: with pygments, httpx
    imports rich. The limit is relative to the imports, whose memory differs by 9 MiB between
    versions of Python.
    """
    imports = peak_memory_of(WITHOUT_PYGMENTS + LIBRARIES)
    with serving(sys.executable, "-c", SERVER_WITHOUT_PYGMENTS, WINDOW_SECONDS=0.05) as server:
        server.connect().answer()
        server.settle()
        time.sleep(6)  # Hypercorn closes both connections after 5 s
        before = server.voluntary_switches()
        time.sleep(2)
        assert server.voluntary_switches() == before
        assert server.peak_memory() < 1.19 * imports


def peak_memory_of(program: str) -> int:
    """Return the peak resident memory of a Python program, in bytes."""
    report = "\nprint(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    command = [sys.executable, "-c", program + report]
    return int(subprocess.run(command, check=True, capture_output=True).stdout) * 1024


def test_a_start_takes_little_more_than_the_imports_of_its_libraries() -> None:
    """The limit is relative to their CPU time, which differs between machines."""
    imports = cpu_seconds_of(LIBRARIES)
    with serving() as server:
        server.settle()
        assert server.cpu_seconds() < 1.5 * imports


def cpu_seconds_of(program: str) -> float:
    """Return the highest CPU time of three runs of a Python program."""

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    def once() -> float:
        before = used()
        subprocess.run([sys.executable, "-c", program], check=True)
        return used() - before

    return max(once() for _ in range(3))


def test_the_open_files_limit_is_raised() -> None:
    with serving(*with_open_files(64), WINDOW_SECONDS=0.01) as server:
        clients = [server.connect() for _ in range(200)]
        assert len(first_answers(clients, 200)) == 200


def test_a_server_without_trio_is_refused() -> None:
    refused = run(HYPERCORN, "gateway_queue:app", "-b", "127.0.0.1:0")
    assert refused.returncode != 0
    assert refused.stderr.splitlines() == [
        "this server does not run trio: use hypercorn --worker-class trio"
    ]


def test_sigterm_ends_the_first_process_of_a_container_while_it_imports() -> None:
    """Linux ignores signals to process 1 that it has no handler for."""
    ready, imported = os.pipe()
    # The program stops in the middle of its imports, and gets the signal there.
    program = (
        "import builtins, os, time; load = builtins.__import__\n"
        "def load_slowly(name, *more, **named):\n"
        "    if name == 'trio': os.write(int(os.environ['TOLD']), b'x'); time.sleep(60)\n"
        "    return load(name, *more, **named)\n"
        "builtins.__import__ = load_slowly\n"
        "import gateway_queue\n"
    )
    may = () if os.geteuid() == 0 else ("--user", "--map-root-user")
    unshare = ("unshare", *may, "--fork", "--pid", "--kill-child")
    process = subprocess.Popen(
        [*unshare, sys.executable, "-c", program],
        env=environ(TOLD=imported),
        pass_fds=[imported],
    )
    try:
        os.close(imported)
        assert os.read(ready, 1) == b"x"
        (first,) = psutil.Process(process.pid).children()
        first.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 128 + signal.SIGTERM
    finally:
        process.kill()
        os.close(ready)
