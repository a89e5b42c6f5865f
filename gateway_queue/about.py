"""What this package says of itself to others."""

__version__ = "0.1.0"

URL = "https://github.com/gateway-queue/gateway-queue"
