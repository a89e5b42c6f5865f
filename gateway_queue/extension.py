"""The extension of ASGI by which the app tells this package's server which requests are tickets."""

from __future__ import annotations

TICKET = "gateway_queue.ticket"
"""The name, among the extensions of ASGI, of the function that makes a request a ticket."""
