"""The app: endpoints are Quart's routes, every other request is a ticket."""

from __future__ import annotations

import re
from collections.abc import Callable
from http import HTTPStatus

from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable, Scope
from quart import Response
from quart.wrappers.base import BaseRequestWebsocket
from quart_trio import QuartTrio
from werkzeug.exceptions import HTTPException, MethodNotAllowed
from werkzeug.routing import MapAdapter

from gateway_queue.queue import Queue
from gateway_queue.settings import Settings
from gateway_queue.store.memory import MemoryStore
from gateway_queue.web import hypercorn_fixes
from gateway_queue.web.problems import CONTENT_TYPE, problem
from gateway_queue.web.tickets import TicketRequest

ENDPOINTS = frozenset({"/healthz"})


class GatewayQueue(QuartTrio):
    """The app; its queue opens when it starts to serve.

    Args:
      prepare: makes the process ready at that moment, and returns its settings.
    """

    queue: Queue

    def __init__(self, prepare: Callable[[], Settings]) -> None:
        super().__init__("gateway_queue", static_folder=None)
        self.config["MAX_CONTENT_LENGTH"] = 0  # bodies are dropped, not kept
        self.config["PROVIDE_AUTOMATIC_OPTIONS"] = False
        self._prepare = prepare
        self.before_serving(self._open_queue)
        self.add_url_rule("/healthz", view_func=healthz)
        self.register_error_handler(HTTPException, explain)

    async def _open_queue(self) -> None:
        settings = self._prepare()
        hypercorn_fixes.install()
        store = MemoryStore(settings.window_seconds, hold=settings.hold_on_start)
        self.queue = Queue(store)
        await self.nursery.start(self.queue.run)

    async def asgi_app(
        self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable
    ) -> None:
        if scope["type"] != "http":
            await super().asgi_app(scope, receive, send)
        elif (path := _path(scope["path"])) in ENDPOINTS:
            await super().asgi_app({**scope, "path": path}, receive, send)
        else:
            await TicketRequest(scope, receive, send, self.queue.turn).run()

    def create_url_adapter(self, request: BaseRequestWebsocket | None) -> MapAdapter | None:
        """Find routes whatever host a client names: some names are none to Werkzeug."""
        if request is None:
            return super().create_url_adapter(request)
        return self.url_map.bind("", path_info=request.path, default_method=request.method)


async def healthz() -> dict[str, str]:
    """Say that the process serves."""
    return {"status": "ok"}


async def explain(error: HTTPException) -> Response:
    """Answer a wrong request to an endpoint."""
    status = HTTPStatus(error.code or HTTPStatus.INTERNAL_SERVER_ERROR)
    response = Response(
        problem(status, error.description or status.phrase), status, content_type=CONTENT_TYPE
    )
    if isinstance(error, MethodNotAllowed) and error.valid_methods is not None:
        response.headers["Allow"] = ", ".join(sorted(error.valid_methods))
    return response


def _path(target: str) -> str:
    """Return the path of a request target, also of one in absolute form (RFC 9112, 3.2.2).

    It takes anything, where a parser of URLs would refuse some.
    """
    return re.sub(r"\A[a-zA-Z][a-zA-Z0-9+.-]*://[^/]*", "", target)
