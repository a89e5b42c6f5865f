"""The live page: what it shows, how that is written, and how it stays up to date."""
