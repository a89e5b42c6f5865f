"""The app: endpoints are Quart's routes, every other request is a ticket."""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine
from functools import partial
from http import HTTPStatus
from typing import Any, NoReturn, cast

import structlog
import trio
from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable, HTTPScope, Scope
from quart import Response, request
from quart.typing import ResponseTypes
from quart.wrappers.base import BaseRequestWebsocket
from quart_trio import QuartTrio
from werkzeug.exceptions import HTTPException, MethodNotAllowed
from werkzeug.routing import MapAdapter

from gateway_queue.about import __version__
from gateway_queue.bots import Bots
from gateway_queue.service import Service, in_log
from gateway_queue.settings import BadSetting, Settings
from gateway_queue.web.access import Access
from gateway_queue.web.auth import Unauthorized
from gateway_queue.web.dashboard.events import Feeds
from gateway_queue.web.dashboard.page import Page, icon
from gateway_queue.web.dashboard.snapshot import take
from gateway_queue.web.host import OtherHost, check_host
from gateway_queue.web.problems import CONTENT_TYPE, RequestError, problem
from gateway_queue.web.query import BadParameter, shard_in
from gateway_queue.web.shared import Shared, parts
from gateway_queue.web.status import status_document
from gateway_queue.web.summary import BotSummary, summaries
from gateway_queue.web.tickets import Room, TicketRequest, Turns

log = structlog.stdlib.get_logger(__name__)

PUBLIC = frozenset({"/healthz", "/readyz"})
"""Endpoints for health checks, which need no token."""

OF_ONE_BOT = frozenset({"/status", "/dashboard", "/events"})

ENDPOINTS = PUBLIC | OF_ONE_BOT | {"/metrics", "/favicon.ico"}

LISTENING_SECONDS = 3600
"""Seconds for which a page gets events until it has to ask again. This ends the events of a page
that does not read them, which HTTP/2 allows."""


class GatewayQueue(QuartTrio):
    """The app; its queue opens when it starts to serve.

    Args:
      prepare: called at that moment; makes the process ready, and returns its settings.
      fail: ends the process, with one line that gives the reason.
    """

    bots: Bots
    room: Room
    addresses: tuple[str, ...] = ()
    """The addresses that the command listens on; for the log."""

    def __init__(self, prepare: Callable[[], Settings], fail: Callable[[str], NoReturn]) -> None:
        super().__init__("gateway_queue", static_folder=None)
        self.config["MAX_CONTENT_LENGTH"] = 0  # discards bodies
        self.config["PROVIDE_AUTOMATIC_OPTIONS"] = False
        self.json.sort_keys = False  # type: ignore[attr-defined]
        self._prepare = prepare
        self._fail = fail
        self.before_serving(self._start)
        self.add_url_rule("/healthz", view_func=healthz)
        self.add_url_rule("/readyz", view_func=self._readyz)
        self.add_url_rule("/status", view_func=self._status)
        self.add_url_rule("/metrics", view_func=self._show_metrics)
        self.add_url_rule("/dashboard", view_func=self._dashboard)
        self.add_url_rule("/events", view_func=self._listen)
        self.add_url_rule("/favicon.ico", view_func=favicon)
        self.register_error_handler(HTTPException, explain)
        self.register_error_handler(BadParameter, explain_parameter)
        self.after_request(never_store)

    async def _start(self) -> None:
        settings = self._prepare()
        # Hypercorn's own command logs its addresses in the next line.
        addresses = {"addresses": self.addresses} if self.addresses else {}
        log.info("gateway-queue starts", version=__version__, **addresses, **in_log(settings))
        self.bots = Bots(settings, self._refuse_token)
        self._access = Access(self.bots, settings.auth_token)
        self.room = Room(settings.max_waiting)
        self._is_open_to_all = settings.auth_token is None
        self._page = Page()
        self._documents = Shared()
        self._feeds = Feeds(self._write_event, self.nursery)
        await self.nursery.start(self._run_bots)

    async def _run_bots(self, *, task_status: trio.TaskStatus[None]) -> None:
        try:
            await self.bots.run(task_status=task_status)
        except BadSetting as error:
            self._fail(str(error))

    def _refuse_token(self) -> None:
        self._fail(
            "Discord rejected DISCORD_TOKEN (401 Unauthorized); set it to the token of a bot"
        )

    def _asked_for(self) -> Service:
        return self._access.service(cast("HTTPScope", request.scope))

    async def _list_beside(self, service: Service) -> list[BotSummary]:
        """Describe all bots, if this is the default one of several; otherwise list none."""
        if not self.bots.are_several or service is not self.bots.default:
            return []
        return await summaries(self.bots.services())

    async def _readyz(self) -> Response | dict[str, str]:
        """Answer whether tickets can be released."""
        if fault := self.bots.default.not_ready():
            return problem_response(HTTPStatus.SERVICE_UNAVAILABLE, fault)
        return {"status": "ready"}

    async def _status(self) -> Response:
        """Describe the queue, or where one shard is."""
        service, shard = self._asked_for(), shard_in(request.query_string)

        async def write() -> bytes:
            return await status_document(service, shard, await self._list_beside(service))

        document = await self._documents.get(("/status", service, shard), write)
        return long_response(document, "application/json")

    async def _show_metrics(self) -> Response:
        """Answer with the metrics, for Prometheus."""
        text, content_type = self.bots.metrics.exposition(request.headers.get("accept", ""))
        return Response(text, content_type=content_type)

    async def _write_event(self, service: Service) -> str | None:
        if service not in self.bots.services().values():
            return None  # its bot was removed
        bots = await self._list_beside(service)
        return await self._page.live(await take(service), service.labels, bots)

    async def _dashboard(self) -> Response:
        """Answer with a page that shows the queue."""
        service = self._asked_for()

        async def write() -> bytes:
            bots = await self._list_beside(service)
            return self._page.whole(await take(service), service.labels, bots).encode()

        page = await self._documents.get(("/dashboard", service), write)
        response = long_response(page, "text/html; charset=utf-8")
        response.headers["Content-Security-Policy"] = self._page.security_policy
        return response

    async def _listen(self) -> Response:
        """Answer with the events that keep a page up to date."""
        service = self._asked_for()
        gzip = request.accept_encodings["gzip"] > 0
        events = b"" if request.method == "HEAD" else self._feeds.listen(service, gzip=gzip)
        response = Response(events, mimetype="text/event-stream")
        response.headers["Vary"] = "Accept-Encoding"
        if gzip:
            response.headers["Content-Encoding"] = "gzip"
        response.timeout = LISTENING_SECONDS
        return response

    def asgi_app(
        self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable
    ) -> Coroutine[Any, Any, None]:
        # Not async: that would keep one more coroutine per request that stalls.
        if scope["type"] == "lifespan":
            return self._live(scope, receive, send)
        if scope["type"] != "http":
            return super().asgi_app(scope, receive, send)
        if (path := _path(scope["path"])) not in ENDPOINTS:
            return TicketRequest(scope, receive, send, self._admit, self.room).run()
        if path not in PUBLIC and (refusal := self._refusal(path, scope)):
            refuse = partial(_refuse, refusal)
            return TicketRequest(scope, receive, send, refuse, self.room).run()
        return super().asgi_app({**scope, "path": path}, receive, send)

    def _admit(self, scope: HTTPScope) -> Turns:
        return self._access.service(scope).queue.turn

    def _refusal(self, path: str, scope: HTTPScope) -> RequestError | None:
        """Return why an endpoint refuses a request; None if it answers the request."""
        try:
            if path in OF_ONE_BOT:
                if self._is_open_to_all:
                    check_host(scope)
                self._access.service(scope)
            else:
                self._access.check_server(scope)
        except (Unauthorized, OtherHost) as refusal:
            return refusal
        except BadParameter:  # the endpoint answers with the error
            pass
        return None

    async def _live(
        self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable
    ) -> None:
        """Run the app's lifespan. If it fails, end the process: Hypercorn would continue."""
        if not trio.lowlevel.in_trio_run():
            self._fail("this server does not run trio: use hypercorn --worker-class trio")
        try:
            await super().asgi_app(scope, receive, send)
        except Exception:
            log.exception("the queue has failed")
            self._fail("the queue has failed, see the log")

    def create_url_adapter(self, request: BaseRequestWebsocket | None) -> MapAdapter | None:
        """Find routes for any host: Werkzeug refuses some names."""
        if request is None:
            return super().create_url_adapter(request)
        return self.url_map.bind("", path_info=request.path, default_method=request.method)


async def healthz() -> dict[str, str]:
    """Answer that the process serves."""
    return {"status": "ok"}


async def favicon() -> Response:
    """Answer browsers, which request this icon with every page."""
    response = Response(icon(), mimetype="image/svg+xml")
    response.headers["Cache-Control"] = "max-age=86400"
    return response


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


async def explain_parameter(error: BadParameter) -> Response:
    """Answer a request to an endpoint with a bad parameter."""
    return problem_response(error.status, str(error))


def _refuse(refusal: RequestError, _: HTTPScope) -> NoReturn:
    raise refusal


def problem_response(status: HTTPStatus, detail: str) -> Response:
    """Answer with a problem document."""
    return Response(problem(status, detail), status, content_type=CONTENT_TYPE)


def long_response(document: bytes, content_type: str) -> Response:
    """Answer with a document that may be large."""
    response = Response(parts(document), content_type=content_type)
    response.content_length = len(document)
    return response


def _path(target: str) -> str:
    """Return the path of a request target, also of one in absolute form (RFC 9112, 3.2.2).

    It accepts any target. A URL parser would refuse some of them.
    """
    return re.sub(r"\A[a-zA-Z][a-zA-Z0-9+.-]*://[^/]*", "", target)
