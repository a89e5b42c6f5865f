"""A deterministic simulation: the queue, its stores and all that they meet, from a seed."""
