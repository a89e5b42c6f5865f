"""A client whose machine disappears from the network, so that its connection is never closed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import time

import pytest

from tests.harness import Server, eventually, serving
from tests.test_command import WAYS

NOTICED_WITHIN = 30
"""Seconds until the server must have noticed that the client has disappeared."""


def test_a_client_that_disappears_loses_its_place() -> None:
    """A second host with a virtual cable to this host asks first. Then the cable is pulled.

    Both hosts are network namespaces. Ordinary users need a user namespace to create them.
    """
    command = [sys.executable, "-c", textwrap.dedent(SCENARIO), str(NOTICED_WITHIN)]
    may = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    start = time.monotonic()
    outcome = subprocess.run(
        ["unshare", *may, "--net", *command], capture_output=True, text=True, check=False
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert time.monotonic() - start < 2 * NOTICED_WITHIN


@pytest.mark.parametrize("way", ["command", "hypercorn"])
def test_the_kernels_probes_of_clients_are_spread_over_time(way: str) -> None:
    """If it probed all at once, it would drop some probes, and close working connections."""
    with serving(*WAYS[way]) as server:
        for shard in range(100):
            server.ask(shard)
        eventually(lambda: len(keep_alive_timers(server)) == 100)
        asked_in = keep_alive_timers(server)
    assert max(asked_in) <= 18
    assert len({round(seconds) for seconds in asked_in}) > 8


def keep_alive_timers(server: Server) -> list[float]:
    """Return in how many seconds the kernel will probe each client of a server."""
    command = ["ss", "-tnoH", "state", "established", f"sport = :{server.port}"]
    sockets = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # ss writes 4.992 s as 4.992ms.
    return [float(seconds) for seconds in re.findall(r"keepalive,([0-9.]+)(?:sec|ms)", sockets)]


SCENARIO = """
    import subprocess, sys, time
    from tests.harness import Server, eventually, serving

    ASK = (
        "import socket, time;"
        "asker = socket.create_connection(('10.9.9.1', int(__import__('sys').argv[1])));"
        "asker.sendall(b'GET / HTTP/1.0' + bytes([13, 10, 13, 10]));"
        "print('asked', flush=True);"
        "time.sleep(3600)"
    )

    def run(*command):
        subprocess.run(command, check=True)

    def say(line):
        other.stdin.write(line + chr(10))
        other.stdin.flush()
        return other.stdout.readline().strip()

    window = float(sys.argv[1])
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    other = subprocess.Popen(["unshare", "--net", "sh"], **pipes)
    assert say("echo ready") == "ready"
    run("ip", "link", "set", "lo", "up")
    cable = ["here", "type", "veth", "peer", "name", "there", "netns", str(other.pid)]
    run("ip", "link", "add", *cable)
    run("ip", "address", "add", "10.9.9.1/24", "dev", "here")
    run("ip", "link", "set", "here", "up")
    with serving(HOST="0.0.0.0", WINDOW_SECONDS=window) as server:
        up = "ip address add 10.9.9.2/24 dev there; ip link set there up"
        assert say(f'{up}; exec {sys.executable} -c "{ASK}" {server.port}') == "asked"
        server.settle()
        client = server.connect()
        client.socket.settimeout(2 * window)
        server.settle()
        run("ip", "link", "set", "here", "down")
        pulled = time.monotonic()
        assert client.answer().status == 200
        assert time.monotonic() - pulled < window + 1
        other.kill()
        other.wait()
"""
