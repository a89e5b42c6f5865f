"""Discord's HTTP API, and the limits that it gives the bot."""
