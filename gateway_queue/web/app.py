"""The app: endpoints are Quart's routes, every other request is a ticket."""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine
from functools import partial
from http import HTTPStatus
from typing import Any, NoReturn

from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable, HTTPScope, Scope
from quart import Response, request
from quart.typing import ResponseTypes
from quart.wrappers.base import BaseRequestWebsocket
from quart_trio import QuartTrio
from werkzeug.exceptions import HTTPException, MethodNotAllowed
from werkzeug.routing import MapAdapter

from gateway_queue import trio_fixes
from gateway_queue.discord import BadToken, connect
from gateway_queue.limits import Limits
from gateway_queue.metrics import Metrics
from gateway_queue.queue import Queue
from gateway_queue.settings import Settings
from gateway_queue.store.memory import MemoryStore
from gateway_queue.web import hypercorn_fixes
from gateway_queue.web.auth import Guard
from gateway_queue.web.gauges import gauges
from gateway_queue.web.problems import CONTENT_TYPE, problem
from gateway_queue.web.status import status_document
from gateway_queue.web.tickets import TicketRequest

PUBLIC = frozenset({"/healthz", "/readyz"})
"""Endpoints for those who watch over the process, who have no token."""

ENDPOINTS = PUBLIC | {"/status", "/metrics"}


class GatewayQueue(QuartTrio):
    """The app; its queue opens when it starts to serve.

    Args:
      prepare: makes the process ready at that moment, and returns its settings.
      refuse: ends the process, with one line that says why it cannot serve.
    """

    queue: Queue
    limits: Limits | None = None

    def __init__(self, prepare: Callable[[], Settings], refuse: Callable[[str], NoReturn]) -> None:
        super().__init__("gateway_queue", static_folder=None)
        self.config["MAX_CONTENT_LENGTH"] = 0  # bodies are dropped, not kept
        self.config["PROVIDE_AUTOMATIC_OPTIONS"] = False
        self.json.sort_keys = False  # type: ignore[attr-defined]
        self._prepare = prepare
        self._refuse = refuse
        self.before_serving(self._open_queue)
        self.add_url_rule("/healthz", view_func=healthz)
        self.add_url_rule("/readyz", view_func=self._readyz)
        self.add_url_rule("/status", view_func=self._status)
        self.add_url_rule("/metrics", view_func=self._show_metrics)
        self.register_error_handler(HTTPException, explain)
        self.after_request(never_store)

    async def _open_queue(self) -> None:
        self._settings = settings = self._prepare()
        self._guard = Guard(settings.auth_token)
        hypercorn_fixes.install()
        trio_fixes.install()
        store = MemoryStore(
            settings.window_seconds,
            hold=settings.hold_on_start,
            session_start_limit=settings.session_start_limit,
            loop_free_starts=settings.loop_free_starts,
        )
        self._metrics = Metrics()
        self.queue = Queue(
            store,
            self._metrics,
            max_concurrency=_known_max_concurrency(settings),
            place_seconds=settings.place_seconds,
        )
        if settings.discord_token is not None and self.queue.max_concurrency is None:
            self.nursery.start_soon(self._follow_discord, settings.discord_token)
        self._metrics.watch(partial(gauges, self.queue))
        await self.nursery.start(self.queue.run)

    async def _follow_discord(self, token: str) -> None:
        """Keep within the limits that Discord gives the bot."""
        async with connect(token, self._settings.discord_api_url) as discord:
            self.limits = Limits(discord, self.queue, self._settings)
            try:
                await self.limits.run()
            except BadToken:
                self._refuse(
                    "DISCORD_TOKEN: got one that Discord refuses (401 Unauthorized), "
                    "takes the token of a bot"
                )

    async def _readyz(self) -> Response | dict[str, str]:
        """Say whether tickets can be released."""
        if self.queue.max_concurrency is not None:
            return {"status": "ready"}
        fault = self.limits and self.limits.fault
        detail = "Discord's limits are not known yet" + (f": {fault}" if fault else "")
        return problem_response(HTTPStatus.SERVICE_UNAVAILABLE, detail)

    async def _status(self) -> dict[str, Any]:
        """Describe the queue."""
        return status_document(self.queue, self._settings)

    async def _show_metrics(self) -> Response:
        """Hand the metrics to Prometheus."""
        text, content_type = self._metrics.exposition(request.headers.get("accept", ""))
        return Response(text, content_type=content_type)

    def asgi_app(
        self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable
    ) -> Coroutine[Any, Any, None]:
        # Not async itself, which would keep one more coroutine for each request that stalls.
        if scope["type"] != "http":
            return super().asgi_app(scope, receive, send)
        if self._is_for_endpoint(path := _path(scope["path"]), scope):
            return super().asgi_app({**scope, "path": path}, receive, send)
        return TicketRequest(scope, receive, send, self.queue.turn, self._guard).run()

    def _is_for_endpoint(self, path: str, scope: HTTPScope) -> bool:
        """Tell whether one of Quart's routes answers, as it does whoever has the right to ask."""
        if path not in ENDPOINTS:
            return False
        return path in PUBLIC or self._guard.admits(scope["headers"])

    def create_url_adapter(self, request: BaseRequestWebsocket | None) -> MapAdapter | None:
        """Find routes whatever host a client names: some names are none to Werkzeug."""
        if request is None:
            return super().create_url_adapter(request)
        return self.url_map.bind("", path_info=request.path, default_method=request.method)


def _known_max_concurrency(settings: Settings) -> int | None:
    """Return the number of rate limit keys, None if Discord has to say it."""
    if settings.max_concurrency == 0:
        return 0  # behind a gateway proxy Discord's limits are that one's business
    if settings.discord_token is not None:
        return None
    return 1 if settings.max_concurrency is None else settings.max_concurrency


async def healthz() -> dict[str, str]:
    """Say that the process serves."""
    return {"status": "ok"}


async def never_store(response: ResponseTypes) -> ResponseTypes:
    """Keep caches from answering in place of the server."""
    response.headers.setdefault("Cache-Control", "no-store")
    return response


async def explain(error: HTTPException) -> Response:
    """Answer a wrong request to an endpoint."""
    status = HTTPStatus(error.code or HTTPStatus.INTERNAL_SERVER_ERROR)
    response = problem_response(status, error.description or status.phrase)
    if isinstance(error, MethodNotAllowed) and error.valid_methods is not None:
        response.headers["Allow"] = ", ".join(sorted(error.valid_methods))
    return response


def problem_response(status: HTTPStatus, detail: str) -> Response:
    """Answer with a problem document."""
    return Response(problem(status, detail), status, content_type=CONTENT_TYPE)


def _path(target: str) -> str:
    """Return the path of a request target, also of one in absolute form (RFC 9112, 3.2.2).

    It takes anything, where a parser of URLs would refuse some.
    """
    return re.sub(r"\A[a-zA-Z][a-zA-Z0-9+.-]*://[^/]*", "", target)
