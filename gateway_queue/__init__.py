"""A gateway queue for Discord bots: one IDENTIFY per window for each rate limit key."""

from gateway_queue.serving.early_stop import end_at_sigterm

end_at_sigterm()  # before all other modules are imported, which takes half a second

from gateway_queue.about import __version__  # noqa: E402
from gateway_queue.serving.process import exit_unable_to_serve, prepare  # noqa: E402
from gateway_queue.web.app import GatewayQueue  # noqa: E402

__all__ = ["__version__", "app"]

app = GatewayQueue(prepare, exit_unable_to_serve)
