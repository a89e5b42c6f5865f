"""The data of a simulated Redis server, and the commands on it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TypeAlias

from coredis.exceptions import ResponseError, WrongTypeError

Reply: TypeAlias = "int | bytes | list[Reply] | None"


class Status(bytes):
    """A simple string, such as ``OK``."""


class Hash(dict[bytes, bytes]):
    """A hash: its fields and their values."""


class SortedSet(dict[bytes, float]):
    """A sorted set: its members and their scores."""

    def in_order(self) -> list[tuple[bytes, float]]:
        return sorted(self.items(), key=lambda item: (item[1], item[0]))


Value: TypeAlias = Hash | SortedSet


def word(value: object) -> bytes:
    """Encode an argument or a score as Redis does."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, float):
        return b"%d" % int(value) if value.is_integer() and abs(value) < 1e17 else b"%.17g" % value
    return str(value).encode()


def integer(text: bytes) -> int:
    try:
        return int(text)
    except ValueError:
        raise ResponseError("value is not an integer or out of range") from None


class Bound:
    """One end of a range of scores, such as ``5``, ``(5`` or ``-inf``."""

    def __init__(self, text: bytes) -> None:
        self.is_open = text.startswith(b"(")
        try:
            self.score = float(text.removeprefix(b"("))
        except ValueError:
            raise ResponseError("min or max is not a float") from None


class Database:
    """Keys, their values, and when they expire; every command is a method.

    Args:
      random_source: chooses a field or a key for commands that return a random one.
    """

    def __init__(self, random_source: random.Random) -> None:
        self.values: dict[bytes, Value] = {}
        self.expires_at: dict[bytes, int] = {}
        """In milliseconds of the server's clock."""
        self.now = 0
        """In microseconds."""
        self._random = random_source

    def copy(self) -> Database:
        """Return a copy, for a replica or a snapshot."""
        copy = Database(self._random)
        copy.values = {
            key: type(value)(value)  # type: ignore[arg-type]
            for key, value in self.values.items()
        }
        copy.expires_at = dict(self.expires_at)
        return copy

    def keys_without_expiry(self) -> list[bytes]:
        return [key for key in self.values if key not in self.expires_at]

    def execute(self, now: int, words: list[bytes]) -> Reply:
        """Run one command.

        Args:
          now: the server's clock, in microseconds.
          words: the name of the command, and its arguments.

        Raises:
          ResponseError: the command is unknown or wrong.
        """
        self.now = now
        for key in [key for key, at in self.expires_at.items() if at * 1000 <= now]:
            self.delete(key)
        command = self._commands.get(words[0].upper())
        if command is None:
            raise ResponseError(f"unknown command '{words[0].decode()}'")
        try:
            return command(self, *words[1:])
        except TypeError as error:
            raise ResponseError(f"wrong number of arguments for {words[0]!r} ({error})") from None

    def delete(self, key: bytes) -> int:
        self.expires_at.pop(key, None)
        return int(self.values.pop(key, None) is not None)

    def _hash(self, key: bytes, *, make: bool = False) -> Hash:
        value = self.values.get(key)
        if value is None:
            value = Hash()
            if make:
                self.values[key] = value
        if not isinstance(value, Hash):
            raise WrongTypeError("Operation against a key holding the wrong kind of value")
        return value

    def _sorted_set(self, key: bytes, *, make: bool = False) -> SortedSet:
        value = self.values.get(key)
        if value is None:
            value = SortedSet()
            if make:
                self.values[key] = value
        if not isinstance(value, SortedSet):
            raise WrongTypeError("Operation against a key holding the wrong kind of value")
        return value

    def _remove(self, key: bytes, members: tuple[bytes, ...] | list[bytes]) -> int:
        """Remove fields or members; an empty key vanishes."""
        value = self.values.get(key)
        if value is None:
            return 0
        removed = sum(value.pop(member, None) is not None for member in members)
        if not value:
            self.delete(key)
        return removed

    # Keys

    def _del(self, *keys: bytes) -> Reply:
        return sum(map(self.delete, keys))

    def _pexpire(self, key: bytes, milliseconds: bytes) -> Reply:
        if key not in self.values:
            return 0
        self.expires_at[key] = self.now // 1000 + integer(milliseconds)
        return 1

    def _time(self) -> Reply:
        return [word(self.now // 1_000_000), word(self.now % 1_000_000)]

    # Hashes

    def _hset(self, key: bytes, *pairs: bytes) -> Reply:
        if not pairs or len(pairs) % 2:
            raise TypeError("pairs")
        fields = self._hash(key, make=True)
        size = len(fields)
        fields.update(zip(pairs[::2], pairs[1::2], strict=True))
        return len(fields) - size

    def _hget(self, key: bytes, field: bytes) -> Reply:
        return self._hash(key).get(field)

    def _hmget(self, key: bytes, *fields: bytes) -> Reply:
        return [self._hash(key).get(field) for field in fields]

    def _hgetall(self, key: bytes) -> Reply:
        return [part for item in self._hash(key).items() for part in item]

    def _hlen(self, key: bytes) -> Reply:
        return len(self._hash(key))

    def _hdel(self, key: bytes, *fields: bytes) -> Reply:
        self._hash(key)
        return self._remove(key, fields)

    def _hrandfield(self, key: bytes, number: bytes, with_values: bytes) -> Reply:
        assert with_values == b"WITHVALUES"
        fields = list(self._hash(key).items())
        chosen = self._random.sample(fields, min(integer(number), len(fields)))
        return [part for item in chosen for part in item]

    # Sorted sets

    def _zadd(self, key: bytes, *words: bytes) -> Reply:
        members = self._sorted_set(key, make=True)
        size = len(members)
        for score, member in zip(words[::2], words[1::2], strict=True):
            members[member] = Bound(score).score
        return len(members) - size

    def _zrem(self, key: bytes, *members: bytes) -> Reply:
        self._sorted_set(key)
        return self._remove(key, members)

    def _zscore(self, key: bytes, member: bytes) -> Reply:
        score = self._sorted_set(key).get(member)
        return None if score is None else word(score)

    def _zcard(self, key: bytes) -> Reply:
        return len(self._sorted_set(key))

    def _by_score(self, key: bytes, least: bytes, most: bytes) -> list[tuple[bytes, float]]:
        low, high = Bound(least), Bound(most)
        return [
            (member, score)
            for member, score in self._sorted_set(key).in_order()
            if (low.score < score or (low.score == score and not low.is_open))
            and (score < high.score or (score == high.score and not high.is_open))
        ]

    def _by_rank(self, key: bytes, start: bytes, stop: bytes) -> list[tuple[bytes, float]]:
        members = self._sorted_set(key).in_order()
        first, last = integer(start), integer(stop)
        first = max(0, first + len(members)) if first < 0 else first
        last = last + len(members) if last < 0 else last
        return members[first : max(first, last + 1)]

    def _zrange(self, key: bytes, start: bytes, stop: bytes, *options: bytes) -> Reply:
        return self._members(self._by_rank(key, start, stop), options)

    def _zrangebyscore(self, key: bytes, least: bytes, most: bytes, *options: bytes) -> Reply:
        return self._members(self._by_score(key, least, most), options)

    def _members(self, members: list[tuple[bytes, float]], options: tuple[bytes, ...]) -> Reply:
        if not options:
            return [member for member, _ in members]
        assert options == (b"WITHSCORES",)
        return [part for member, score in members for part in (member, word(score))]

    def _zremrangebyscore(self, key: bytes, least: bytes, most: bytes) -> Reply:
        return self._remove(key, [member for member, _ in self._by_score(key, least, most)])

    def _zremrangebyrank(self, key: bytes, start: bytes, stop: bytes) -> Reply:
        return self._remove(key, [member for member, _ in self._by_rank(key, start, stop)])

    _commands: dict[bytes, Callable[..., Reply]] = {  # noqa: RUF012
        method.__name__[1:].upper().encode(): method
        for method in (
            *(_del, _pexpire, _time, _hset, _hget, _hmget, _hgetall, _hlen, _hdel, _hrandfield),
            *(
                _zadd,
                _zrem,
                _zscore,
                _zcard,
                _zrange,
                _zrangebyscore,
                _zremrangebyscore,
                _zremrangebyrank,
            ),
        )
    }
