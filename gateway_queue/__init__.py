"""A gateway queue for Discord bots: one identify a window for each rate limit key."""

from gateway_queue.process import prepare
from gateway_queue.web.app import GatewayQueue

__all__ = ["__version__", "app"]

__version__ = "0.1.0"

app = GatewayQueue(prepare)
