"""The HTTP interface of the queue."""
