"""What the app and our server say to each other beside ASGI."""

from __future__ import annotations

TICKET = "gateway_queue.ticket"
"""The name, among the extensions of ASGI, of the function that makes a request a ticket."""
