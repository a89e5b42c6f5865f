"""Measures a gateway queue from outside, and compares it with what Hypercorn alone needs."""
