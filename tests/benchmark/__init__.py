"""Measures a gateway queue from outside, beside what its server could do at best."""
