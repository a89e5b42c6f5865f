"""h2spec, a test suite for HTTP/2 servers: it sends what the standard allows and forbids."""

from __future__ import annotations

import json
import subprocess
import sysconfig
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from tests.harness import environ, serving

GO = Path(sysconfig.get_path("purelib"), "go", "bin", "go")

MODULE = Path(__file__).with_name("h2spec")
"""Names the versions of h2spec and of what it needs."""

ANSWERED_AS_HTTP_1 = "Sends invalid connection preface"
"""A connection without the preface of HTTP/2 is HTTP/1: it gets a 400, not a frame of HTTP/2."""


@pytest.mark.libraries
@pytest.mark.timeout(600)  # it compiles h2spec
def test_h2spec(tmp_path: Path) -> None:
    program, report = tmp_path / "h2spec", tmp_path / "report.xml"
    subprocess.run(
        [GO, "build", "-o", program, "github.com/summerwind/h2spec/cmd/h2spec"],
        cwd=MODULE,
        env=environ(GOTOOLCHAIN="local", CGO_ENABLED=0),
        check=True,
    )
    with serving() as server:
        command = [
            str(program),
            "--port",
            str(server.port),
            "--path",
            "/healthz",
            "--timeout",
            "15",
        ]
        subprocess.run([*command, "--junit-report", str(report)], check=False, capture_output=True)
        assert json.loads(server.get("/healthz").body) == {"status": "ok"}
    cases = list(ET.parse(report).iter("testcase"))
    failed = [case.get("classname") for case in cases if len(case)]
    assert len(cases) > 100
    assert failed == [ANSWERED_AS_HTTP_1]
