"""h2spec, a test suite for HTTP/2 servers: it sends what the standard allows and forbids."""

from __future__ import annotations

import json
import subprocess
import sysconfig
from functools import partial
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from tests.harness import Server, environ, serving

GO = Path(sysconfig.get_path("purelib"), "go", "bin", "go")

MODULE = Path(__file__).with_name("h2spec")
"""Names the versions of h2spec and of what it needs."""

ANSWERED_AS_HTTP_1 = "Sends invalid connection preface"
"""A connection without the preface of HTTP/2 is HTTP/1: it gets a 400, not a frame of HTTP/2."""


@pytest.mark.libraries
@pytest.mark.timeout(600)  # it compiles h2spec
def test_h2spec(tmp_path: Path) -> None:
    program = tmp_path / "h2spec"
    subprocess.run(
        [GO, "build", "-o", program, "github.com/summerwind/h2spec/cmd/h2spec"],
        cwd=MODULE,
        env=environ(GOTOOLCHAIN="local", CGO_ENABLED=0),
        check=True,
    )
    run = partial(cases, program, tmp_path / "report.xml")
    with serving() as server:
        answered = run(server, "/healthz")
        assert json.loads(server.get("/healthz").body) == {"status": "ok"}
        failed = failures(answered)
        if failed != [ANSWERED_AS_HTTP_1]:
            # On a busy machine, the answer may come before the frame that breaks the request.
            sections = {case.get("package") for case in answered if len(case)}
            stalled = run(server, "/?shard=0", *map(str, sections))
            again = failures(stalled)
            failed = [name for name in failed if name in again]
    assert len(answered) > 100
    assert failed == [ANSWERED_AS_HTTP_1]


def failures(cases: list[ET.Element]) -> list[str | None]:
    return [case.get("classname") for case in cases if len(case)]


def cases(
    program: Path, report: Path, server: Server, path: str, *sections: str
) -> list[ET.Element]:
    """Run some sections of h2spec, or all of them, with requests for a path."""
    options = ["--port", str(server.port), "--path", path, "--timeout", "15"]
    command = [str(program), *sections, *options, "--junit-report", str(report)]
    subprocess.run(command, check=False, capture_output=True)
    return list(ET.parse(report).iter("testcase"))
