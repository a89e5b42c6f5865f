"""A fleet of simulated shards against the real server and the stand-in for Discord.

``scripts/simulate --help`` lists its options.
"""
