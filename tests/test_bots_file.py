"""BOTS_FILE: its settings, and the errors for mistakes in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gateway_queue.bots_file import read_bots
from gateway_queue.settings import BadSetting, Settings


def read(folder: Path, text: str, **environment: object) -> dict[str, Settings]:
    path = folder / "bots.toml"
    path.write_text(text, encoding="utf-8")
    return read_bots(replace(Settings(), bots_file=str(path), **environment))  # type: ignore[arg-type]


def test_without_a_file_there_are_no_further_bots() -> None:
    assert read_bots(Settings()) == {}


def test_a_table_overrides_the_environment(tmp_path: Path) -> None:
    text = """
    [music]
    window_seconds = 6
    margin_seconds = 0.5
    confirm_seconds = 7.5
    hold_on_start = false
    max_concurrency = 16
    session_start_limit = 500
    loop_free_starts = 3
    place_seconds = 0
    discord_token = "music.token"
    discord_api_url = "http://proxy:8080/api/v10/"
    auth_token = "secret"
    ["a.dotted_name-9"]
    """
    bots = read(tmp_path, text, window_seconds=5.5, margin_seconds=0.1, max_concurrency=2)
    assert list(bots) == ["music", "a.dotted_name-9"]
    music, other = bots.values()
    assert (music.window_seconds, music.margin_seconds, music.confirm_seconds) == (6, 0.5, 7.5)
    assert (music.max_concurrency, music.session_start_limit) == (16, 500)
    assert (music.loop_free_starts, music.place_seconds, music.hold_on_start) == (3, 0, False)
    assert (music.discord_token, music.auth_token) == ("music.token", "secret")
    assert music.discord_api_url == "http://proxy:8080/api/v10"
    assert (other.window_seconds, other.margin_seconds, other.max_concurrency) == (5.5, 0.1, 2)


def test_tokens_belong_to_one_bot(tmp_path: Path) -> None:
    (bot,) = read(tmp_path, "[a]", discord_token="mine", auth_token="all").values()
    assert (bot.discord_token, bot.auth_token) == (None, None)


def test_each_bot_has_keys_of_its_own_in_redis(tmp_path: Path) -> None:
    bots = read(tmp_path, "[a]\n[b]", redis_prefix="queue")
    assert {bot.redis_prefix for bot in bots.values()} == {"{queue}:bot:a", "{queue}:bot:b"}


def test_a_token_can_come_from_a_file(tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text("from.file\n")
    (bot,) = read(tmp_path, f'[a]\ndiscord_token_file = "{secret}"').values()
    assert bot.discord_token == "from.file"


LONG = "n" * 101

MISTAKES = {
    "window_seconds = 5": ["must have a table [NAME]", "'window_seconds' is outside of any table"],
    "[a]\nwindow_seconds = 0": ["[a] window_seconds must be a number over 0", "not '0'"],
    "[a]\nwindow_seconds = -1": ["[a] window_seconds must be", "not '-1'"],
    "[a]\nwindow_seconds = inf": ["[a] window_seconds must be", "not 'inf'"],
    "[a]\nwindow_seconds = '5'": ["[a] window_seconds must be a number, without quotes, not '5'"],
    "[a]\nwindow_seconds = true": ["[a] window_seconds must be a number, without quotes, not True"],
    "[a]\nwindow_seconds = [5]": ["[a] window_seconds must be a number, without quotes, not [5]"],
    "[a]\nmax_concurrency = 1.5": ["[a] max_concurrency must be a whole number", "not '1.5'"],
    "[a]\nhold_on_start = 1": ["[a] hold_on_start must be true or false, without quotes, not 1"],
    "[a]\ndiscord_token = ''": ["[a] discord_token is empty"],
    "[a]\ndiscord_token = 5": [
        "[a] discord_token must be a text in quotes, not a value of type int"
    ],
    "[a]\ndiscord_token = 'Bot x'": [
        "[a] discord_token must be ",
        "not the given value of 5 characters",
    ],
    "[a]\ndiscord_token_file = '/nowhere'": [
        "[a] discord_token_file must be the path of a text file",
        "not '/nowhere' (No such file or directory)",
    ],
    "[a]\ndiscord_token = 'x'\ndiscord_token_file = '/nowhere'": [
        "[a] discord_token_file and discord_token are both set"
    ],
    "[a]\nport = 5": ["[a] 'port' is not a setting of a bot; the settings of a bot are"],
    "[a]\nredis_prefix = 'x'": ["[a] 'redis_prefix' is not a setting"],
    "[a.b]\nwindow_seconds = 5": ["[a] 'b' must be a value", 'needs quotes: ["NAME"]'],
    "[default]": ["'default' is the name of the bot that the environment configures"],
    "['']": ["the name of a bot must be", "letters", "not ''"],
    "['a b']": ["up to 100 letters, digits", "not 'a b'"],
    "['ä']": ["not 'ä'"],
    "['a\\n']": ["the name of a bot must be"],
    f"[{LONG}]": ["up to 100 letters"],
    "[a]\ndiscord_token = 'x'\n[b]\ndiscord_token = 'x'": [
        "[b] discord_token must differ from the token in [a]: each bot needs its own token"
    ],
    "[a]\ndiscord_token = 'mine'": ["must differ from the token in the environment"],
    "[a]\n[a]": ["line 2"],
    "[a": ["bots.toml", "must be the path of a TOML file with a table for each bot"],
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_is_one_line_that_says_where_it_is(tmp_path: Path, text: str) -> None:
    with pytest.raises(BadSetting) as caught:
        read(tmp_path, text, discord_token="mine")
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith("BOTS_FILE")
    assert str(tmp_path / "bots.toml") in line
    for part in MISTAKES[text]:
        assert part in line


@pytest.mark.parametrize("line", ["discord_token = 'Bot x.y'", "token = 'x.y'"])
def test_a_secret_is_not_shown(tmp_path: Path, line: str) -> None:
    with pytest.raises(BadSetting) as caught:
        read(tmp_path, f"[a]\n{line}")
    assert "x.y" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe", b"[a]\nx = " + b"[" * 100_000])
def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "bots.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadSetting, match=r"BOTS_FILE must be the path of .* not '.*' \(.+\)"):
        read_bots(Settings(bots_file=str(path)))
