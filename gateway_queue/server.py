"""Hypercorn's settings for a server of stalled requests.

For Hypercorn's own command line: ``hypercorn -c python:gateway_queue.server gateway_queue:app``.
Hypercorn takes every name below as one of its settings, so this module, unlike all others, reads
the environment when it is imported.
"""

import logging

from gateway_queue.serving.process import load_settings

settings = load_settings()

worker_class = "trio"
bind = [f"{settings.host}:{settings.port}"]

certfile, keyfile = settings.tls_cert_file, settings.tls_key_file

# A fleet connects all at once: a client that finds the backlog full waits for its next SYN, a
# second or more. The kernel takes no more than net.core.somaxconn.
backlog = 65_535

# All shards of a bot's process may stall on one connection, for as long as the process runs.
# Hypercorn would end a connection with more than 1000 requests at a time; clients that are told of
# a limit open another connection.
h2_max_concurrent_streams = 900
keep_alive_max_requests = 2**31 - 1

# Long headers are allowed. This limits the bytes of a connection without a whole request.
h11_max_incomplete_size = h2_max_header_list_size = 32 * 1024

# Waiting requests end at once when the server stops; answers that are being written do not.
graceful_timeout = 0

# Hypercorn's log lines have the form of our own. Without this, it writes to stderr itself.
errorlog = logging.getLogger("gateway_queue.hypercorn")

include_server_header = False
