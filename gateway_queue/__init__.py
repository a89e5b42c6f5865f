"""A gateway queue for Discord bots: one identify a window for each rate limit key."""

from gateway_queue.about import __version__
from gateway_queue.serving.process import prepare, refuse_to_serve
from gateway_queue.web.app import GatewayQueue

__all__ = ["__version__", "app"]

app = GatewayQueue(prepare, refuse_to_serve)
