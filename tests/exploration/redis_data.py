"""The data of a simulated Redis server, and the commands on it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from fnmatch import fnmatchcase
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


Value: TypeAlias = Hash | SortedSet | bytes


def word(value: object) -> bytes:
    """Write an argument or a score as Redis does."""
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
      random_source: which field or key a command that chooses one gets.
    """

    def __init__(self, random_source: random.Random) -> None:
        self.values: dict[bytes, Value] = {}
        self.expires_at: dict[bytes, int] = {}
        """In milliseconds of the server's clock."""
        self.now = 0
        """In microseconds."""
        self._random = random_source

    def copy(self) -> Database:
        """Return what a replica or a snapshot has."""
        copy = Database(self._random)
        copy.values = {
            key: value if isinstance(value, bytes) else type(value)(value)  # type: ignore[arg-type]
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

    def _string(self, key: bytes) -> bytes | None:
        value = self.values.get(key)
        if value is not None and not isinstance(value, bytes):
            raise WrongTypeError("Operation against a key holding the wrong kind of value")
        return value

    def _remove(self, key: bytes, members: tuple[bytes, ...] | list[bytes]) -> int:
        """Remove fields or members; an empty key vanishes."""
        value = self.values.get(key)
        if value is None:
            return 0
        if isinstance(value, bytes):
            raise WrongTypeError("Operation against a key holding the wrong kind of value")
        removed = sum(value.pop(member, None) is not None for member in members)
        if not value:
            self.delete(key)
        return removed

    # Keys

    def _del(self, *keys: bytes) -> Reply:
        return sum(map(self.delete, keys))

    def _exists(self, *keys: bytes) -> Reply:
        return sum(key in self.values for key in keys)

    def _expire_at(self, key: bytes, milliseconds: int) -> Reply:
        if key not in self.values:
            return 0
        self.expires_at[key] = milliseconds
        if milliseconds * 1000 <= self.now:
            self.delete(key)
        return 1

    def _pexpire(self, key: bytes, milliseconds: bytes) -> Reply:
        return self._expire_at(key, self.now // 1000 + integer(milliseconds))

    def _expire(self, key: bytes, seconds: bytes) -> Reply:
        return self._expire_at(key, self.now // 1000 + integer(seconds) * 1000)

    def _pexpireat(self, key: bytes, milliseconds: bytes) -> Reply:
        return self._expire_at(key, integer(milliseconds))

    def _persist(self, key: bytes) -> Reply:
        return int(self.expires_at.pop(key, None) is not None)

    def _pttl(self, key: bytes) -> Reply:
        if key not in self.values:
            return -2
        return self.expires_at[key] - self.now // 1000 if key in self.expires_at else -1

    def _ttl(self, key: bytes) -> Reply:
        left = self._pttl(key)
        assert isinstance(left, int)
        return left if left < 0 else (left + 500) // 1000

    def _type(self, key: bytes) -> Reply:
        names = {Hash: b"hash", SortedSet: b"zset", bytes: b"string", type(None): b"none"}
        return Status(names[type(self.values.get(key))])

    def _keys(self, pattern: bytes) -> Reply:
        return [key for key in self.values if fnmatchcase(key.decode(), pattern.decode())]

    def _flushall(self, *_: bytes) -> Reply:
        self.values.clear()
        self.expires_at.clear()
        return Status(b"OK")

    def _time(self) -> Reply:
        return [word(self.now // 1_000_000), word(self.now % 1_000_000)]

    # Strings

    def _get(self, key: bytes) -> Reply:
        return self._string(key)

    def _set(self, key: bytes, value: bytes, *options: bytes) -> Reply:
        given = [option.upper() for option in options]
        if (b"NX" in given and key in self.values) or (b"XX" in given and key not in self.values):
            return None
        self.values[key] = value
        if b"KEEPTTL" not in given:
            self.expires_at.pop(key, None)
        for unit, factor in ((b"PX", 1), (b"EX", 1000)):
            if unit in given:
                after = integer(options[given.index(unit) + 1]) * factor
                self._expire_at(key, self.now // 1000 + after)
        return Status(b"OK")

    def _incrby(self, key: bytes, by: bytes = b"1") -> Reply:
        total = integer(self._string(key) or b"0") + integer(by)
        self.values[key] = word(total)
        return total

    # Hashes

    def _hset(self, key: bytes, *pairs: bytes) -> Reply:
        if not pairs or len(pairs) % 2:
            raise TypeError("pairs")
        fields = self._hash(key, make=True)
        size = len(fields)
        fields.update(zip(pairs[::2], pairs[1::2], strict=True))
        return len(fields) - size

    def _hsetnx(self, key: bytes, field: bytes, value: bytes) -> Reply:
        return 0 if field in self._hash(key) else self._hset(key, field, value)

    def _hget(self, key: bytes, field: bytes) -> Reply:
        return self._hash(key).get(field)

    def _hmget(self, key: bytes, *fields: bytes) -> Reply:
        return [self._hash(key).get(field) for field in fields]

    def _hgetall(self, key: bytes) -> Reply:
        return [part for item in self._hash(key).items() for part in item]

    def _hkeys(self, key: bytes) -> Reply:
        return list(self._hash(key))

    def _hvals(self, key: bytes) -> Reply:
        return list(self._hash(key).values())

    def _hlen(self, key: bytes) -> Reply:
        return len(self._hash(key))

    def _hexists(self, key: bytes, field: bytes) -> Reply:
        return int(field in self._hash(key))

    def _hdel(self, key: bytes, *fields: bytes) -> Reply:
        self._hash(key)
        return self._remove(key, fields)

    def _hincrby(self, key: bytes, field: bytes, by: bytes) -> Reply:
        total = integer(self._hash(key).get(field, b"0")) + integer(by)
        self._hset(key, field, word(total))
        return total

    def _hrandfield(self, key: bytes, number: bytes | None = None, *options: bytes) -> Reply:
        fields = list(self._hash(key).items())
        if number is None:
            return self._random.choice(fields)[0] if fields else None
        count = integer(number)
        if count >= 0:
            chosen = self._random.sample(fields, min(count, len(fields)))
        else:
            chosen = self._random.choices(fields, k=-count) if fields else []
        return [part for item in chosen for part in (item if options else item[:1])]

    # Sorted sets

    def _zadd(self, key: bytes, *words: bytes) -> Reply:
        options = set[bytes]()
        while words and words[0].upper() in {b"NX", b"XX", b"GT", b"LT", b"CH"}:
            options.add(words[0].upper())
            words = words[1:]
        members = self._sorted_set(key, make=True)
        added = changed = 0
        for text, member in zip(words[::2], words[1::2], strict=True):
            score, old = Bound(text).score, members.get(member)
            if old is None:
                if b"XX" not in options:
                    members[member] = score
                    added += 1
            elif b"NX" not in options and not (
                (b"GT" in options and score <= old) or (b"LT" in options and score >= old)
            ):
                members[member] = score
                changed += score != old
        if not members:
            self.delete(key)
        return added + (changed if b"CH" in options else 0)

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

    def _zcount(self, key: bytes, least: bytes, most: bytes) -> Reply:
        return len(self._by_score(key, least, most))

    def _zrange(self, key: bytes, start: bytes, stop: bytes, *options: bytes) -> Reply:
        given = [option.upper() for option in options]
        if b"BYSCORE" in given:
            low, high = (stop, start) if b"REV" in given else (start, stop)
            members = self._by_score(key, low, high)
        else:
            members = self._by_rank(key, start, stop)
        if b"REV" in given:
            if b"BYSCORE" not in given:
                raise ResponseError("REV by rank is not simulated")
            members.reverse()
        if b"LIMIT" in given:
            at = given.index(b"LIMIT")
            offset, count = integer(options[at + 1]), integer(options[at + 2])
            members = members[offset:] if count < 0 else members[offset : offset + count]
        if b"WITHSCORES" in given:
            return [part for member, score in members for part in (member, word(score))]
        return [member for member, _ in members]

    def _zrangebyscore(self, key: bytes, least: bytes, most: bytes, *options: bytes) -> Reply:
        return self._zrange(key, least, most, b"BYSCORE", *options)

    def _zrevrangebyscore(self, key: bytes, most: bytes, least: bytes, *options: bytes) -> Reply:
        return self._zrange(key, most, least, b"BYSCORE", b"REV", *options)

    def _zremrangebyscore(self, key: bytes, least: bytes, most: bytes) -> Reply:
        return self._remove(key, [member for member, _ in self._by_score(key, least, most)])

    def _zremrangebyrank(self, key: bytes, start: bytes, stop: bytes) -> Reply:
        return self._remove(key, [member for member, _ in self._by_rank(key, start, stop)])

    def _zrank(self, key: bytes, member: bytes) -> Reply:
        order = [name for name, _ in self._sorted_set(key).in_order()]
        return order.index(member) if member in order else None

    def _zincrby(self, key: bytes, by: bytes, member: bytes) -> Reply:
        score = self._sorted_set(key, make=True).get(member, 0.0) + Bound(by).score
        if math.isnan(score):
            raise ResponseError("resulting score is not a number (NaN)")
        self._sorted_set(key)[member] = score
        return word(score)

    def _zpopmin(self, key: bytes, number: bytes = b"1") -> Reply:
        first = self._sorted_set(key).in_order()[: integer(number)]
        self._remove(key, [member for member, _ in first])
        return [part for member, score in first for part in (member, word(score))]

    _commands: dict[bytes, Callable[..., Reply]] = {  # noqa: RUF012
        **{
            method.__name__[1:].upper().encode(): method
            for method in (
                *(_del, _exists, _pexpire, _expire, _pexpireat, _persist, _pttl, _ttl, _type),
                *(_keys, _flushall, _time, _get, _set, _incrby, _hset, _hsetnx, _hget, _hmget),
                *(_hgetall, _hkeys, _hvals, _hlen, _hexists, _hdel, _hincrby, _hrandfield),
                *(_zadd, _zrem, _zscore, _zcard, _zcount, _zrange, _zrangebyscore),
                *(_zrevrangebyscore, _zremrangebyscore, _zremrangebyrank, _zrank, _zincrby),
                _zpopmin,
            )
        },
        b"UNLINK": _del,
        b"HMSET": _hset,
        b"INCR": _incrby,
    }
