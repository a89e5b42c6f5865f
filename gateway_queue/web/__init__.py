"""The web: what a client sees of the queue."""
