"""Settings: read from the environment at the start, and checked."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl, urlsplit

from gateway_queue.store.sentinel_url import SCHEME, parse_sentinel_url

LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
LOG_FORMATS = ("console", "json")

LONGEST_SECONDS = 24 * 60 * 60.0
"""The longest time that a setting may have."""

IS_EMPTY = "is empty; set it or unset it"

_SWITCH = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}


class BadSetting(ValueError):
    """A setting has a wrong value. The message is one line: the setting and what is wrong."""

    def __init__(self, setting: str, problem: str) -> None:
        super().__init__(f"{setting} {problem}")
        self.setting, self.problem = setting, problem


class _Problem(ValueError):
    """A value is wrong; the message says why, without the value."""


def _host(text: str) -> str:
    # A well-formed name may still not exist on this machine; then binding it fails.
    if not re.fullmatch(r"[A-Za-z0-9_.:%-]+", text):
        raise ValueError(text)
    return text


def _port(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text) or int(text) > 65535:
        raise ValueError(text)
    return int(text)


def _whole_number(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text, re.ASCII):
        raise ValueError(text)
    return int(text)


def _positive_number(text: str) -> int:
    number = _whole_number(text)
    if number == 0:
        raise ValueError(text)
    return number


def _seconds_or_zero(text: str) -> float:
    # Plain notation only: float() would also take "1_0", "nan" and digits of other scripts.
    if not re.fullmatch(r"[0-9.]+(e[+-]?[0-9]+)?", text, re.ASCII | re.IGNORECASE):
        raise ValueError(text)
    seconds = float(text)
    if seconds > LONGEST_SECONDS:
        raise ValueError(text)
    return seconds


def _seconds(text: str) -> float:
    seconds = _seconds_or_zero(text)
    if seconds == 0:
        raise ValueError(text)
    return seconds


def _switch(text: str) -> bool:
    return _SWITCH[text.lower()]


def _token(text: str) -> str:
    # Only what an HTTP header can carry. A common mistake is "Bot " in front of the token.
    if not re.fullmatch(r"[!-~]+", text):
        raise ValueError(text)
    return text


def _http_url(text: str) -> str:
    # The URL is shown in logs, so it must not contain a password.
    if not re.fullmatch(r"https?://[!-~]+", text, re.IGNORECASE) or set(text) & set("@?#"):
        raise ValueError(text)
    url = urlsplit(text)
    if not url.hostname or url.port == 0:  # reading the port checks it
        raise ValueError(text)
    return text.rstrip("/")


_DATABASE = {"db": "[0-9]{1,9}"}
_CERTIFICATES = {
    **dict.fromkeys(("ssl_ca_certs", "ssl_certfile", "ssl_keyfile"), ".+"),
    "ssl_check_hostname": "(?i:true|false|yes|no|on|off|1|0)",
    "ssl_cert_reqs": "none|optional|required",
}
REDIS_OPTIONS = {"redis": _DATABASE, "rediss": _DATABASE | _CERTIFICATES, "unix": _DATABASE}
"""The options of a URL by scheme, and the form of their values."""


def _check_redis_options(scheme: str, query: str) -> None:
    known, given = REDIS_OPTIONS[scheme], set[str]()
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in known:
            # Anything but a plain name may be a part of a password.
            shown = f" {name}" if re.fullmatch("[a-z_]{1,30}", name) else ""
            problem = f"has an unknown option{shown} after the question mark"
            raise _Problem(f"{problem}; {scheme}:// supports only {', '.join(known)}")
        if name in given:
            raise _Problem(f"has the option {name} twice")
        if not re.fullmatch(known[name], value, re.ASCII):
            raise _Problem(f"has a wrong value of the option {name}")
        given.add(name)


def _redis_url(text: str) -> str:
    if text.startswith(SCHEME):
        parse_sentinel_url(text)
        return text
    if not re.fullmatch(r"(rediss?|unix)://[!-~]+", text):
        raise ValueError(text)
    url = urlsplit(text)
    is_local = url.scheme == "unix"
    database = url.path.strip("/")
    if (is_local and not database) or not (is_local or url.hostname) or url.port == 0:
        raise ValueError(text)
    if not is_local and database and not re.fullmatch(r"[0-9]{1,9}", database, re.ASCII):
        raise ValueError(text)
    if url.fragment:
        raise ValueError(text)
    _check_redis_options(url.scheme, url.query)
    return text


def _path(text: str) -> str:
    if not text or "\0" in text:
        raise ValueError(text)
    return text


def _prefix(text: str) -> str:
    if not re.fullmatch(r"[!-|~][!-~]*", text):  # a hash tag must not be empty
        raise ValueError(text)
    return text


def hash_tag(prefix: str) -> str:
    """Put a prefix in braces, unless it has braces: a cluster then keeps all keys on one node."""
    return prefix if re.match(r"[^{]*{[^}]+}", prefix) else f"{{{prefix}}}"


def _one_of(words: tuple[str, ...]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        return words[words.index(text.lower())]

    return parse


def _variable(
    default: Any, parse: Callable[[str], Any], *, takes: str, about: str, secret: bool = False
) -> Any:
    return dataclasses.field(
        default=default,
        repr=not secret,
        metadata={"parse": parse, "takes": takes, "about": about, "secret": secret},
    )


def _count(default: int | None, *, about: str) -> Any:
    return _variable(
        default, _whole_number, takes="a whole number from 0 to 999999999", about=about
    )


@dataclass(frozen=True)
class Settings:
    """All settings. The environment variable of a field is its name in capitals."""

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
        takes="a number over 0 and up to 86400",
        about="Discord's window: minimum time between two IDENTIFYs of one rate limit key",
    )
    margin_seconds: float = _variable(
        0.25,
        _seconds_or_zero,
        takes="a number from 0 to 86400",
        about="seconds added to the window after a release that is not confirmed",
    )
    confirm_seconds: float = _variable(
        15.0,
        _seconds,
        takes="a number over 0 and up to 86400",
        about="longest time from the answer of a confirmed ticket to its confirmation",
    )
    hold_on_start: bool = _variable(
        True,
        _switch,
        takes="true or false",
        about="release nothing for one window and the margin after the start",
    )
    place_seconds: float = _variable(
        30.0,
        _seconds_or_zero,
        takes="a number from 0 to 86400",
        about="seconds for which the place of a shard that disconnects is kept; 0 keeps no place",
    )
    max_concurrency: int | None = _count(
        None,
        about="number of rate limit keys; with a token, the most releases per window over all "
        "keys; 0 releases every ticket at once",
    )
    discord_token: str | None = _variable(
        None,
        _token,
        takes="the token of a bot, without spaces and without the word Bot",
        about="bot token, to ask Discord for the bot's limits",
        secret=True,
    )
    discord_api_url: str = _variable(
        "https://discord.com/api/v10",
        _http_url,
        takes="a URL that starts with http:// or https://, without user, query and fragment",
        about="base URL of Discord's API",
    )
    discord_refresh_seconds: float = _variable(
        300.0,
        _seconds,
        takes="a number over 0 and up to 86400",
        about="seconds between two refreshes of Discord's limits",
    )
    session_start_limit: int | None = _count(
        None, about="limit of session starts in 24 hours; 0 enforces no limit, not even Discord's"
    )
    loop_free_starts: int = _count(
        5, about="starts of a shard in one hour before the next ones have to wait; 0: no limit"
    )
    redis_url: str | None = _variable(
        None,
        _redis_url,
        takes="a URL such as redis://user:password@host:6379/0, rediss://…, unix:///path or "
        "redis+sentinel://user:password@host:26379,host2:26379/SERVICE/0",
        about="Redis or Valkey server in which several replicas share their state",
        secret=True,
    )
    redis_prefix: str = _variable(
        "gateway-queue",
        _prefix,
        takes="a text without spaces that does not begin with }",
        about="first part of every key in Redis; the server puts it in braces",
    )
    auth_token: str | None = _variable(
        None,
        _token,
        takes="a token without spaces",
        about="token that every request needs, except /healthz and /readyz",
        secret=True,
    )
    tls_cert_file: str | None = _variable(
        None,
        _path,
        takes="the path of a PEM file",
        about="PEM file with the certificate chain; with it, the server speaks TLS only",
    )
    tls_key_file: str | None = _variable(
        None,
        _path,
        takes="the path of a PEM file",
        about="PEM file with the key of the certificate",
    )
    bots_file: str | None = _variable(
        None,
        _path,
        takes="the path of a TOML file",
        about="TOML file with a table of settings for each further bot; SIGHUP reads it again",
    )
    max_waiting: int = _variable(
        100_000,
        _positive_number,
        takes="a whole number from 1 to 999999999",
        about="the most tickets that wait at a time; the connection of a further ticket is closed "
        "without an answer",
    )
    log_level: str = _variable(
        "info", _one_of(LOG_LEVELS), takes=f"one of {', '.join(LOG_LEVELS)}", about="minimum level"
    )
    log_format: str = _variable(
        "console",
        _one_of(LOG_FORMATS),
        takes=f"one of {', '.join(LOG_FORMATS)}",
        about="console, or json for one JSON object per line",
    )

    @property
    def store_name(self) -> Literal["memory", "redis"]:
        """Return where the windows are kept."""
        return "memory" if self.redis_url is None else "redis"

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Settings:
        """Read every variable that is set.

        Raises:
          BadSetting: a variable has a wrong value.
        """
        return cls(**dict(read_fields(environ)))


def read_fields(
    texts: Mapping[str, str], spell: Callable[[str], str] = str.upper
) -> Iterator[tuple[str, Any]]:
    """Read the settings that are given, and yield each with its name.

    Args:
      texts: the given values by name, in the spelling of ``spell``.
      spell: converts the name of a field into that spelling, for example into capitals.

    Raises:
      BadSetting: a text is wrong for its setting.
    """
    for field in dataclasses.fields(Settings):
        variable, secret = spell(field.name), field.metadata["secret"]
        file = spell(f"{field.name}_file")
        if secret and file in texts:
            variable, text = file, _from_file(texts, file, variable)
        elif variable in texts:
            text = texts[variable]
        else:
            continue
        try:
            yield field.name, field.metadata["parse"](text)
        except _Problem as error:
            raise BadSetting(variable, str(error)) from None
        except (ValueError, KeyError):
            got = f"the given value of {len(text)} characters" if secret else repr(text)
            problem = f"must be {field.metadata['takes']}, not {got}"
            raise BadSetting(
                variable, problem if text else "is empty; set it or unset it"
            ) from None


def _from_file(texts: Mapping[str, str], file: str, variable: str) -> str:
    """Read a secret from the file that ``NAME_FILE`` names, as with Docker's secrets."""
    if variable in texts:
        raise BadSetting(file, f"and {variable} are both set; unset one of them")
    path = texts[file]
    if not path:
        raise BadSetting(file, IS_EMPTY)
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
        reason = "empty"
    except (OSError, ValueError) as error:
        text = ""
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else "not text"
    if not text:
        raise BadSetting(file, f"must be the path of a text file, not {path!r} ({reason})")
    return text


def describe() -> str:
    """Describe each variable in one line, for ``--help``."""
    lines = [
        f"  {field.name.upper():<25}{field.metadata['about']} (default: {_shown(field.default)})"
        for field in dataclasses.fields(Settings)
    ]
    secrets = (f.name.upper() for f in dataclasses.fields(Settings) if f.metadata["secret"])
    return "\n".join(
        [*lines, "", *(f"  {name}_FILE: a file that contains {name}" for name in secrets)]
    )


def _shown(default: object) -> str:
    return str(default).lower() if isinstance(default, bool) or default is None else str(default)
