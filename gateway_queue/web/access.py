"""Finds the bot that a request names, and checks the token of the request."""

from __future__ import annotations

from hypercorn.typing import HTTPScope
from structlog.contextvars import bind_contextvars

from gateway_queue.bots import Bots
from gateway_queue.bots_file import DEFAULT_BOT
from gateway_queue.service import Service
from gateway_queue.web.auth import Guard
from gateway_queue.web.query import BadParameter, bots_in


class Access:
    """Finds the service of the bot that a request names.

    Args:
      bots: all bots.
      auth_token: is valid for every bot. If it is None, a bot without its own token needs none.
    """

    def __init__(self, bots: Bots, auth_token: str | None) -> None:
        self._bots = bots
        self._auth_token = auth_token
        self._guard = Guard(auth_token)

    def check_server(self, scope: HTTPScope) -> None:
        """Check a request to an endpoint that concerns all bots.

        Raises:
          Unauthorized: it does not have the server's token.
        """
        self._guard.check(scope["headers"])

    def service(self, scope: HTTPScope) -> Service:
        """Return the service of the bot that a request names; without a name the default bot's.

        Raises:
          Unauthorized: the request has neither the server's token nor the bot's.
          BadParameter: there is no such bot, or several are named.
        """
        names = bots_in(scope["query_string"]) or {DEFAULT_BOT}
        service = self._bots.get(next(iter(names))) if len(names) == 1 else None
        self._guard_of(service).check(scope["headers"])
        if service is None:
            raise BadParameter("bot must be the name of one bot of this server")
        if service.labels:
            bind_contextvars(**service.labels)
        return service

    def _guard_of(self, service: Service | None) -> Guard:
        if service is None or service is self._bots.default:
            return self._guard
        if (token := service.settings.auth_token) is None:
            return self._guard
        return Guard(self._auth_token, token)
