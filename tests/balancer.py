"""The balancer of the README, and a name server for it."""

from __future__ import annotations

import re
import socket
import struct
import subprocess
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import yaml

from tests.harness import README, Client, eventually, free_port

_NAME_SERVER = "127.0.0.11:53"
_ADDRESS, _NO_SUCH_NAME = 1, 3


def readme_compose_file() -> Any:
    """Return the compose file of the README with two replicas."""
    (text,) = re.findall(r"(?s)```yaml\n# compose.yaml\n(.*?)```", README.read_text())
    return yaml.safe_load(text)


@contextmanager
def balancing(
    addresses: Iterable[str],
    folder: Path,
    *,
    name_server: NameServer | None = None,
) -> Iterator[int]:
    """Run the README's balancer until the end of the context, and return its port.

    Args:
      addresses: host and port of each replica.
      folder: for its configuration.
      name_server: resolves the names among these hosts.
    """
    port = free_port()
    config = readme_compose_file()["configs"]["balancer"]["content"]
    text, number = re.subn(r" *server replica-\d replica-\d:5000\n", "", config)
    assert number == 2
    for changed, by in (
        (":5000\n", f":{port}\n"),
        (_NAME_SERVER, name_server.address if name_server else _NAME_SERVER),
    ):
        assert text.count(changed) == 1
        text = text.replace(changed, by)
    text += "".join(f"  server replica-{n} {where}\n" for n, where in enumerate(addresses, 1))
    (folder / "haproxy.cfg").write_text(text)
    process = subprocess.Popen(["haproxy", "-f", str(folder / "haproxy.cfg")])
    try:
        eventually(lambda: _answers_health(port))
        yield port
    finally:
        process.kill()
        process.wait()


def _answers_health(port: int) -> bool:
    with suppress(OSError, AssertionError):
        client = Client(port, b"GET /healthz HTTP/1.1\r\nHost: queue\r\n\r\n")
        with closing(client.socket):
            return client.answer().status == 200
    return False


class NameServer:
    """A name server like that of Docker: it answers with the IPv4 address of a container."""

    def __init__(self) -> None:
        self.hosts: dict[str, str] = {}
        """IPv4 addresses by name."""
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.address = "{}:{}".format(*self._socket.getsockname())

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.sendto(b"", self._socket.getsockname())  # ends the thread
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        while True:
            query, client = self._socket.recvfrom(4096)
            if not query:
                return
            self._socket.sendto(self._answer(query), client)

    def _answer(self, query: bytes) -> bytes:
        end = query.index(b"\0", 12) + 5
        labels, rest = list[bytes](), query[12 : end - 5]
        while rest:
            labels.append(rest[1 : 1 + rest[0]])
            rest = rest[1 + rest[0] :]
        (kind,) = struct.unpack("!H", query[end - 4 : end - 2])
        host = self.hosts.get(b".".join(labels).decode().lower())
        answers = b""
        if host is not None and kind == _ADDRESS:
            answers = struct.pack("!HHHIH", 0xC00C, kind, 1, 1, 4) + socket.inet_aton(host)
        flags = 0x8180 | (0 if host else _NO_SUCH_NAME)
        head = query[:2] + struct.pack("!HHHHH", flags, 1, bool(answers), 0, 0)
        return head + query[12:end] + answers
