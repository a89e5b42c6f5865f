"""Measures a gateway queue from outside, and compares it with the least that its server needs."""
