"""The app: endpoints are Quart's routes, every other request is a ticket."""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine
from functools import partial
from http import HTTPStatus
from typing import Any, NoReturn

import structlog
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
from gateway_queue.store import Rules, WindowStore
from gateway_queue.store.memory import MemoryStore
from gateway_queue.web import hypercorn_fixes
from gateway_queue.web.auth import Guard
from gateway_queue.web.dashboard.events import Events
from gateway_queue.web.dashboard.page import Page
from gateway_queue.web.dashboard.snapshot import Snapshot, take
from gateway_queue.web.gauges import gauges
from gateway_queue.web.problems import CONTENT_TYPE, problem
from gateway_queue.web.status import status_document
from gateway_queue.web.tickets import TicketRequest

log = structlog.stdlib.get_logger(__name__)

PUBLIC = frozenset({"/healthz", "/readyz"})
"""Endpoints for those who watch over the process, who have no token."""

ENDPOINTS = PUBLIC | {"/status", "/metrics", "/dashboard", "/events"}

LISTENING_SECONDS = 3600
"""How long a page gets events until it has to ask anew. So one that is there only in name, as
HTTP/2 allows, is not there for ever."""


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
        self.add_url_rule("/dashboard", view_func=self._dashboard)
        self.add_url_rule("/events", view_func=self._listen)
        self.register_error_handler(HTTPException, explain)
        self.after_request(never_store)

    async def _open_queue(self) -> None:
        self._settings = settings = self._prepare()
        self._guard = Guard(settings.auth_token)
        try:
            hypercorn_fixes.install()
        except hypercorn_fixes.UnknownHypercorn as error:
            self._refuse(str(error))
        trio_fixes.install()
        self._metrics = Metrics()
        self.queue = Queue(
            self._open_store(),
            self._metrics,
            max_concurrency=_known_max_concurrency(settings),
            place_seconds=settings.place_seconds,
        )
        if settings.discord_token is not None and self.queue.max_concurrency is None:
            self.nursery.start_soon(self._follow_discord, settings.discord_token)
        self._metrics.watch(partial(gauges, self.queue))
        self._page = Page()
        self._events = Events(lambda: self._page.live(self._snapshot()))
        self.nursery.start_soon(self._events.run)
        await self.nursery.start(self.queue.run)

    def _open_store(self) -> WindowStore:
        """Return the store of these settings, which lives as long as the app serves."""
        settings = self._settings
        rules = rules_of(settings)
        if settings.redis_url is None:
            return MemoryStore(rules)
        # Not at the top, for most servers run alone, and it takes a while.
        from gateway_queue.store.redis import RedisStore  # noqa: PLC0415

        store = RedisStore(
            settings.redis_url,
            settings.redis_prefix,
            rules,
            count_error=self._metrics.store_errors.inc,
        )
        self.nursery.start_soon(store.run)
        return store

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
        if fault := self._not_ready():
            return problem_response(HTTPStatus.SERVICE_UNAVAILABLE, fault)
        return {"status": "ready"}

    def _not_ready(self) -> str | None:
        """Tell why no ticket can be released, if so."""
        if self.queue.max_concurrency == 0:
            return None
        if fault := self.queue.store.fault:
            return f"Redis cannot be reached: {fault}"
        if self.queue.max_concurrency is not None:
            return None
        fault = self.limits.fault if self.limits else None
        return "Discord's limits are not known yet" + (f": {fault}" if fault else "")

    async def _status(self) -> dict[str, Any]:
        """Describe the queue."""
        return status_document(self.queue, self._settings)

    async def _show_metrics(self) -> Response:
        """Hand the metrics to Prometheus."""
        text, content_type = self._metrics.exposition(request.headers.get("accept", ""))
        return Response(text, content_type=content_type)

    def _snapshot(self) -> Snapshot:
        return take(self.queue, self.limits, self._settings, self._not_ready())

    async def _dashboard(self) -> Response:
        """Show the queue to people."""
        response = Response(self._page.whole(self._snapshot()), mimetype="text/html")
        response.headers["Content-Security-Policy"] = self._page.security_policy
        return response

    async def _listen(self) -> Response:
        """Keep a page up to date."""
        events = b"" if request.method == "HEAD" else self._events.listen()
        response = Response(events, mimetype="text/event-stream")
        response.timeout = LISTENING_SECONDS
        return response

    def asgi_app(
        self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable
    ) -> Coroutine[Any, Any, None]:
        # Not async itself, which would keep one more coroutine for each request that stalls.
        if scope["type"] == "lifespan":
            return self._live(scope, receive, send)
        if scope["type"] != "http":
            return super().asgi_app(scope, receive, send)
        if self._is_for_endpoint(path := _path(scope["path"]), scope):
            return super().asgi_app({**scope, "path": path}, receive, send)
        return TicketRequest(scope, receive, send, self.queue.turn, self._guard).run()

    async def _live(
        self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable
    ) -> None:
        """Run what serves besides requests; if it fails, Hypercorn would go on without it."""
        try:
            await super().asgi_app(scope, receive, send)
        except Exception:
            log.exception("the queue has failed")
            self._refuse("the queue has failed, see the log")

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


def rules_of(settings: Settings) -> Rules:
    """Return what a store has to hold to by these settings.

    With a token the rate limit keys are Discord's, and MAX_CONCURRENCY limits the releases of all
    keys: fewer keys would release shards of one of Discord's keys at the same time.
    """
    return Rules(
        window=settings.window_seconds,
        hold=settings.hold_on_start,
        session_start_limit=settings.session_start_limit,
        loop_free_starts=settings.loop_free_starts,
        releases_per_window=settings.max_concurrency or None if settings.discord_token else None,
        margin=settings.margin_seconds,
        confirm_seconds=settings.confirm_seconds,
    )


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
