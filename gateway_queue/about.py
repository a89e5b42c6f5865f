"""The version and the address of this package, for the user agent and the log."""

__version__ = "0.2.0"

URL = "https://github.com/gateway-queue/gateway-queue"
