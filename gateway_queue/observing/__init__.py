"""What the operator sees of the queue: logs, metrics, and the last releases."""
