"""Lua scripts as Redis runs them: the real interpreter, with ``redis.call``."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from coredis.exceptions import NoScriptError, RedisError, ResponseError
from lupa import lua51

from tests.exploration.redis_data import Reply, Status, word

PRELUDE = b"""
local request = ...
redis = {pcall = request, log = function() end, LOG_WARNING = 3, LOG_NOTICE = 2}
function redis.call(...)
  local reply = request(...)
  if type(reply) == 'table' and reply.err then error(reply, 0) end
  return reply
end
function redis.error_reply(text) return {err = text} end
function redis.status_reply(text) return {ok = text} end
return function(script)
  local worked, result = pcall(script)
  if worked then return result end
  return {err = type(result) == 'table' and result.err or tostring(result)}
end
"""


class Scripts:
    """The interpreter of one server, and the scripts that were loaded.

    Args:
      execute: runs one command of a script.
    """

    def __init__(self, execute: Callable[[list[bytes]], Reply]) -> None:
        self._execute = execute
        self._lua: Any = lua51.LuaRuntime(encoding=None)
        self._globals = self._lua.globals()
        self._run = self._lua.execute(PRELUDE, self._request)
        self._loaded: dict[bytes, Any] = {}

    def load(self, source: bytes) -> bytes:
        digest = hashlib.sha1(source).hexdigest().encode()
        if digest not in self._loaded:
            self._loaded[digest] = self._lua.compile(source)
        return digest

    def forget(self) -> None:
        """Forget the loaded scripts, as a restarted server does."""
        self._loaded.clear()

    def run(self, digest: bytes, keys: list[bytes], arguments: list[bytes]) -> Reply:
        """Run a loaded script.

        Raises:
          NoScriptError: it is not loaded.
          ResponseError: it has failed.
        """
        if digest not in self._loaded:
            raise NoScriptError("No matching script. Please use EVAL.")
        self._globals[b"KEYS"] = self._lua.table_from(keys)
        self._globals[b"ARGV"] = self._lua.table_from(arguments)
        return self._reply(self._run(self._loaded[digest]))

    def _request(self, *words: object) -> Any:
        """Run a command of a script, and return its reply as a value of Lua."""
        try:
            if not all(type(one) in (bytes, int, float) for one in words):
                raise ResponseError("Lua redis lib command arguments must be strings or integers")
            return self._to_lua(self._execute([word(one) for one in words]))
        except RedisError as error:
            return self._lua.table_from({b"err": str(error).encode()})

    def _to_lua(self, reply: Reply) -> Any:
        if reply is None:
            return False
        if isinstance(reply, Status):
            return self._lua.table_from({b"ok": bytes(reply)})
        if isinstance(reply, list):
            return self._lua.table_from([self._to_lua(one) for one in reply])
        return reply

    def _reply(self, value: Any) -> Reply:
        """Convert a script's result: numbers lose their fraction, an array ends at nil."""
        if value is None or value is False:
            return None
        if value is True:
            return 1
        if isinstance(value, bytes):
            return value
        if isinstance(value, int | float):
            return int(value)
        if (error := value[b"err"]) is not None:
            raise ResponseError(error.decode())
        if (status := value[b"ok"]) is not None:
            return Status(status)
        replies: list[Reply] = []
        while (element := value[len(replies) + 1]) is not None:
            replies.append(self._reply(element))
        return replies
