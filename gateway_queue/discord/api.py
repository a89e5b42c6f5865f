"""Discord's HTTP API: the session start limits of a bot."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any, Literal

import httpx
import trio

from gateway_queue.about import URL, __version__

USER_AGENT = f"DiscordBot ({URL}, {__version__})"
"""The form that Discord demands: https://discord.com/developers/docs/reference#user-agent"""

REQUEST_INTERVAL = 0.05
"""Seconds between two requests, over all bots: Discord allows 50 requests per second."""

REQUEST_SECONDS = 30.0
"""The longest that one request may take, even if its answer comes slowly."""


Outcome = Literal["answered", "rejected_token", "rate_limited", "failed"]
"""The outcome of a request."""


class BadToken(Exception):
    """Discord rejected the token."""


class Unavailable(Exception):
    """Discord did not answer the question; the message says why.

    Args:
      retry_after: seconds that Discord asks to wait before the next request.
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
          LookupError, TypeError, ValueError: the document is no such answer.
        """
        limit = document["session_start_limit"]
        total, remaining, reset_after, max_concurrency = (
            _whole_number(limit[name])
            for name in ("total", "remaining", "reset_after", "max_concurrency")
        )
        if max_concurrency == 0:
            raise ValueError("max_concurrency is 0")
        return cls(total, remaining, reset_after / 1000, max_concurrency)


class Api:
    """Discord's API for all bots of a server: one client, and no bursts of requests."""

    def __init__(self) -> None:
        self._client: httpx.AsyncClient | None = None
        self._free_at = -math.inf

    async def get(self, url: str, headers: dict[str, str]) -> httpx.Response:
        """Send a request as soon as the rate of requests allows it.

        Raises:
          trio.TooSlowError: the answer took longer than ``REQUEST_SECONDS``.
        """
        at = max(trio.current_time(), self._free_at)
        self._free_at = at + REQUEST_INTERVAL
        await trio.sleep_until(at)
        if self._client is None:  # not earlier: a client takes 7 MB
            # A bot whose requests hang must not take the connections of the others.
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
            self._client = httpx.AsyncClient(timeout=10.0, limits=limits)
        with trio.fail_after(REQUEST_SECONDS):
            return await self._client.get(url, headers=headers)

    async def close(self) -> None:
        """Close all connections."""
        if self._client is not None:
            await self._client.aclose()


class Discord:
    """The requests of one bot to the API.

    Args:
      api: sends the requests.
      token: of the bot.
      base_url: of the API, with its version.
      count_request: called after each request with its outcome.
    """

    def __init__(
        self, api: Api, token: str, base_url: str, count_request: Callable[[Outcome], None]
    ) -> None:
        self._api = api
        self._headers = {"authorization": f"Bot {token}", "user-agent": USER_AGENT}
        self._url = f"{base_url}/gateway/bot"
        self._count_request = count_request

    async def session_start_limit(self) -> SessionStartLimit:
        """Ask Discord for the session start limit (Get Gateway Bot).

        Raises:
          BadToken: Discord rejects the token.
          Unavailable: there is no answer, or it cannot be used.
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
            response = await self._api.get(self._url, self._headers)
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
            raise Unavailable("not a valid answer to Get Gateway Bot") from None


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
