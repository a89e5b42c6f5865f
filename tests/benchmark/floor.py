"""The floor: what Hypercorn needs for a request that only stalls, or is answered at once.

A bare ASGI function under unchanged Hypercorn, with the server settings and the garbage collector
of the queue. An app can cost less only if it changes Hypercorn.
"""

from __future__ import annotations

import trio
from hypercorn.config import Config
from hypercorn.trio import serve
from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable, Scope

from gateway_queue import server
from gateway_queue.serving.listener import listen
from gateway_queue.serving.process import prepare_process
from tests.harness import GO


async def app(scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
    """Stall every request; with ``MAX_CONCURRENCY=0``, answer it at once."""
    if scope["type"] != "http":
        await receive()
        prepare_process()
        await send({"type": "lifespan.startup.complete"})
        return
    if server.settings.max_concurrency != 0:
        while (await receive())["type"] != "http.disconnect":
            pass
        return
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(GO))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": GO, "more_body": False})


def main() -> None:
    """Serve as ``gateway-queue`` does, until killed."""
    config = Config.from_object(server)
    listeners = listen(server.settings.host, server.settings.port, config.backlog)
    config.bind = [f"fd://{listener.detach()}" for listener in listeners]
    trio.run(serve, app, config)


if __name__ == "__main__":
    main()
