"""Files to copy beside a bot: each of them needs nothing else of this package."""
