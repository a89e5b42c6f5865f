"""The process that serves: its command, its sockets, its event loop and its HTTP server."""
