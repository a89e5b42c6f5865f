"""A deterministic simulation: the queue, its stores, clients, Redis and Discord, from a seed."""
