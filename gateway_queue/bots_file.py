"""``BOTS_FILE``: a TOML file with a table for each bot, read and checked."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from gateway_queue.settings import BadSetting, Settings, hash_tag, read_fields

DEFAULT_BOT = "default"
"""The name of the bot that the environment configures."""

KEYS = (
    "discord_token",
    "discord_token_file",
    "discord_api_url",
    "max_concurrency",
    "session_start_limit",
    "window_seconds",
    "margin_seconds",
    "confirm_seconds",
    "hold_on_start",
    "place_seconds",
    "loop_free_starts",
    "auth_token",
    "auth_token_file",
)
"""The settings that concern one bot. All other settings concern the whole server."""

TEXTS = frozenset(f.name for f in fields(Settings) if f.type in {"str", "str | None"})
SWITCHES = frozenset(field.name for field in fields(Settings) if field.type == "bool")


def read_bots(settings: Settings) -> dict[str, Settings]:
    """Read the settings of each bot in ``BOTS_FILE``, by its name.

    A bot inherits a setting that its table lacks from the environment, except the two tokens.

    Args:
      settings: from the environment. Without ``bots_file`` there are no bots.

    Raises:
      BadSetting: the file cannot be read, or it has a mistake.
    """
    if settings.bots_file is None:
        return {}
    path = settings.bots_file
    tables = _parse(path)
    bots: dict[str, Settings] = {}
    for name, table in tables.items():
        _check_name(path, name, table)
        try:
            bots[name] = _read_table(name, table, settings)
        except BadSetting as error:
            raise BadSetting(_place(path, name, error.setting), error.problem) from None
    _check_tokens(path, bots, settings)
    return bots


def _place(path: str, name: str, key: str) -> str:
    return f"BOTS_FILE {path}: [{name}] {key}"


def _parse(path: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        reason = str(error)
    except OSError as error:
        reason = error.strerror or type(error).__name__
    except (ValueError, RecursionError):
        reason = "not TOML"
    takes = "the path of a TOML file with a table for each bot"
    raise BadSetting("BOTS_FILE", f"must be {takes}, not {path!r} ({reason})")


def _check_name(path: str, name: str, table: object) -> None:
    where = f"BOTS_FILE {path}:"
    if not isinstance(table, dict):
        raise BadSetting(
            where, f"must have a table [NAME] for each bot; {_short(name)} is outside of any table"
        )
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", name):
        takes = "up to 100 letters, digits, dots, hyphens and underscores"
        raise BadSetting(where, f"the name of a bot must be {takes}, not {_short(name)}")
    if name == DEFAULT_BOT:
        problem = "is the name of the bot that the environment configures; choose another name"
        raise BadSetting(where, f"{_short(name)} {problem}")


def _read_table(name: str, table: Mapping[str, object], settings: Settings) -> Settings:
    texts = {key: _text(key, value) for key, value in table.items()}
    prefix = f"{hash_tag(settings.redis_prefix)}:bot:{name}"
    base = replace(settings, discord_token=None, auth_token=None, redis_prefix=prefix)
    return replace(base, **dict(read_fields(texts, str.lower)))


def _text(key: str, value: object) -> str:
    """Return a value as text, as in the environment.

    Raises:
      BadSetting: a bot has no such setting, or its value is of another type.
    """
    if isinstance(value, dict):
        problem = 'must be a value, not a table; a name of a bot with a dot needs quotes: ["NAME"]'
        raise BadSetting(_short(key), problem)
    if key not in KEYS:
        # Without its value, which may be a token.
        problem = f"is not a setting of a bot; the settings of a bot are {', '.join(KEYS)}"
        raise BadSetting(_short(key), problem)
    setting = key.removesuffix("_file")
    if setting in TEXTS:
        fits, kind = isinstance(value, str), "a text in quotes"
    elif setting in SWITCHES:
        fits, kind = isinstance(value, bool), "true or false, without quotes"
    else:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        kind = "a number, without quotes"
    if not fits:
        got = f"a value of type {type(value).__name__}" if "token" in key else _short(value)
        raise BadSetting(key, f"must be {kind}, not {got}")
    return str(value).lower() if isinstance(value, bool) else str(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def _check_tokens(path: str, bots: Mapping[str, Settings], settings: Settings) -> None:
    """Refuse a second queue for one bot: together they would release too fast."""
    owners = {settings.discord_token: "the environment"}
    for name, bot in bots.items():
        if bot.discord_token is None:
            continue
        if bot.discord_token in owners:
            owner = owners[bot.discord_token]
            problem = f"must differ from the token in {owner}: each bot needs its own token"
            raise BadSetting(_place(path, name, "discord_token"), problem)
        owners[bot.discord_token] = f"[{name}]"
