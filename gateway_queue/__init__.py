"""A gateway queue for Discord bots: one identify a window for each rate limit key."""

from gateway_queue.about import __version__
from gateway_queue.serving.process import exit_unable_to_serve, prepare
from gateway_queue.web.app import GatewayQueue

__all__ = ["__version__", "app"]

app = GatewayQueue(prepare, exit_unable_to_serve)
