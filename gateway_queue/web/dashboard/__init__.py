"""The live page: its content, its HTML, and its updates."""
