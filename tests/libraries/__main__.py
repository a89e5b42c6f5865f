"""Builds or installs what bots need: ``python -m tests.libraries [LANGUAGE...]``."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from tests.libraries import go, java, python, rust
from tests.libraries.building import missing

PROJECTS = {
    "python": python.FORKS,
    "go": go.PROJECT,
    "rust": rust.PROJECT,
    "java": java.PROJECT,
}
TOOLCHAINS = {"rust": rust.TOOLCHAINS, "java": java.TOOLCHAINS}
"""Commands that cannot be installed from PyPI, and how to get them."""


def main(languages: Sequence[str]) -> None:
    """Build for some languages, or name the toolchains that are missing."""
    commands: dict[str, str] = {}
    for language in languages:
        commands |= TOOLCHAINS.get(language, {})
    if lacking := missing(commands):
        sys.exit("\n".join(["toolchains are missing:", *lacking]))
    for language in languages:
        start = time.monotonic()
        PROJECTS[language].build()
        print(f"{language}: built in {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(PROJECTS))
