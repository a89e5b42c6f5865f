"""Discord's HTTP API: what it says of a bot's session starts."""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any, Literal

import httpx
import trio

from gateway_queue.about import URL, __version__

USER_AGENT = f"DiscordBot ({URL}, {__version__})"
"""The form that Discord demands: https://discord.com/developers/docs/reference#user-agent"""

REQUEST_SECONDS = 30.0
"""The longest that one request may take, however slowly an answer trickles."""


Outcome = Literal["answered", "rejected_token", "rate_limited", "failed"]
"""What became of a request."""


class BadToken(Exception):
    """Discord does not know the token."""


class Unavailable(Exception):
    """Discord has not said what it was asked; the message says why.

    Args:
      retry_after: seconds in which it does not want to be asked again.
    """

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class RateLimited(Unavailable):
    """Discord was asked too often."""


@dataclass(frozen=True)
class SessionStartLimit:
    """How often, and how many at a time, a bot may start sessions.

    https://discord.com/developers/docs/events/gateway#session-start-limit-object
    """

    total: int
    remaining: int
    reset_after: float
    """Seconds, where Discord has milliseconds."""
    max_concurrency: int

    @classmethod
    def from_gateway_bot(cls, document: Any) -> SessionStartLimit:
        """Read the answer to Get Gateway Bot.

        Raises:
          LookupError, TypeError, ValueError: it is none.
        """
        limit = document["session_start_limit"]
        total, remaining, reset_after, max_concurrency = (
            _whole_number(limit[name])
            for name in ("total", "remaining", "reset_after", "max_concurrency")
        )
        if max_concurrency == 0:
            raise ValueError("max_concurrency is 0")
        return cls(total, remaining, reset_after / 1000, max_concurrency)


class Discord:
    """A bot's view of the API; :func:`connect` makes one."""

    def __init__(
        self, client: httpx.AsyncClient, base_url: str, count_request: Callable[[Outcome], None]
    ) -> None:
        self._client = client
        self._base_url = base_url
        self._count_request = count_request

    async def session_start_limit(self) -> SessionStartLimit:
        """Ask for what Get Gateway Bot knows.

        Raises:
          BadToken: the token is none of a bot.
          Unavailable: there is no answer, or none that can be used.
        """
        outcome: Outcome = "failed"
        try:
            limit = await self._get_session_start_limit()
            outcome = "answered"
        except BadToken:
            outcome = "rejected_token"
            raise
        except RateLimited:
            outcome = "rate_limited"
            raise
        finally:
            self._count_request(outcome)
        return limit

    async def _get_session_start_limit(self) -> SessionStartLimit:
        try:
            with trio.fail_after(REQUEST_SECONDS):
                response = await self._client.get(f"{self._base_url}/gateway/bot")
        except trio.TooSlowError:
            raise Unavailable(f"no answer within {REQUEST_SECONDS:.0f} s") from None
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            raise Unavailable(f"{type(error).__name__}: {error}".rstrip(": ")) from None
        if response.status_code == HTTPStatus.UNAUTHORIZED:
            raise BadToken
        if response.status_code != HTTPStatus.OK:
            reason = f"{response.status_code} {response.reason_phrase}".strip()
            limited = response.status_code == HTTPStatus.TOO_MANY_REQUESTS
            raise (RateLimited if limited else Unavailable)(reason, _retry_after(response))
        try:
            return SessionStartLimit.from_gateway_bot(json.loads(response.content))
        except (LookupError, TypeError, ValueError, RecursionError):
            raise Unavailable("the answer is not one to Get Gateway Bot") from None


@asynccontextmanager
async def connect(
    token: str, base_url: str, count_request: Callable[[Outcome], None]
) -> AsyncIterator[Discord]:
    """Open a client of the API.

    Args:
      token: of the bot.
      base_url: of the API, with its version.
      count_request: called after each request with its outcome.
    """
    headers = {"authorization": f"Bot {token}", "user-agent": USER_AGENT}
    async with httpx.AsyncClient(headers=headers, timeout=10.0) as client:
        yield Discord(client, base_url, count_request)


def _whole_number(value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**53:
        raise ValueError(value)
    return value


def _retry_after(response: httpx.Response) -> float:
    """Read the seconds of a Retry-After header; a proxy may send a date there."""
    text = response.headers.get("retry-after", "")
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]*)?", text):
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0
