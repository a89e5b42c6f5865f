"""Settings: the environment, read once and checked."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
LOG_FORMATS = ("console", "json")

_SWITCH = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}


class BadSetting(ValueError):
    """A variable holds what it does not take; the message is one line that says so."""

    def __init__(self, variable: str, got: str, takes: str) -> None:
        super().__init__(f"{variable}: got {got!r}, takes {takes}")


def _host(text: str) -> str:
    # A well-formed name may still be unknown here; that shows when it is bound.
    if not re.fullmatch(r"[A-Za-z0-9_.:%-]+", text):
        raise ValueError(text)
    return text


def _port(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text) or int(text) > 65535:
        raise ValueError(text)
    return int(text)


def _seconds(text: str) -> float:
    # Plain notation only: float() would also take "1_0", "nan" and digits of other scripts.
    if not re.fullmatch(r"[0-9.]+(e[+-]?[0-9]+)?", text, re.ASCII | re.IGNORECASE):
        raise ValueError(text)
    seconds = float(text)
    if seconds == 0 or math.isinf(seconds):
        raise ValueError(text)
    return seconds


def _switch(text: str) -> bool:
    return _SWITCH[text.lower()]


def _one_of(words: tuple[str, ...]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        return words[words.index(text.lower())]

    return parse


def _variable(default: Any, parse: Callable[[str], Any], *, takes: str, about: str) -> Any:
    return dataclasses.field(
        default=default, metadata={"parse": parse, "takes": takes, "about": about}
    )


@dataclass(frozen=True)
class Settings:
    """What the user can set. The variable of a field is its name in capitals."""

    host: str = _variable(
        "127.0.0.1", _host, takes="an address or a host name", about="address to bind"
    )
    port: int = _variable(
        5000,
        _port,
        takes="a whole number from 0 to 65535",
        about="port to bind; 0 picks a free one",
    )
    window_seconds: float = _variable(
        5.0,
        _seconds,
        takes="a number over 0",
        about="least time between two releases of one rate limit key",
    )
    hold_on_start: bool = _variable(
        True,
        _switch,
        takes="true or false",
        about="open each rate limit key only one window after the start",
    )
    log_level: str = _variable(
        "info", _one_of(LOG_LEVELS), takes=f"one of {', '.join(LOG_LEVELS)}", about="least level"
    )
    log_format: str = _variable(
        "console",
        _one_of(LOG_FORMATS),
        takes=f"one of {', '.join(LOG_FORMATS)}",
        about="lines to read, or one JSON object a line",
    )

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Settings:
        """Read every variable that is set.

        Raises:
          BadSetting: a variable holds what it does not take.
        """
        return cls(**dict(_read(environ)))


def _read(environ: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(Settings):
        variable = field.name.upper()
        if variable not in environ:
            continue
        try:
            yield field.name, field.metadata["parse"](environ[variable])
        except (ValueError, KeyError):
            raise BadSetting(variable, environ[variable], field.metadata["takes"]) from None


def describe() -> str:
    """One line a variable, for ``--help``."""
    return "\n".join(
        f"  {field.name.upper():<16}{field.metadata['about']} (default: {_shown(field.default)})"
        for field in dataclasses.fields(Settings)
    )


def _shown(default: object) -> str:
    return str(default).lower() if isinstance(default, bool) else str(default)
