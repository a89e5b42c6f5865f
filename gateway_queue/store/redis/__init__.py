"""A store in Redis, which any number of replicas share.

``decisions.lua`` decides, one atomic command at a time, by the server's clock; ``script.py`` is its
interface. ``glance.lua`` tells which bots' data has changed. ``store.py`` asks for one bot,
``link.py`` keeps the stores of all bots connected, ``connection.py`` holds one until anything
about it is in doubt, ``clock.py`` compares the clocks, and ``starts.py`` keeps the day's session
starts, to restore what the server has lost.
"""

from gateway_queue.store.redis.link import Link
from gateway_queue.store.redis.store import RedisStore

__all__ = ["Link", "RedisStore"]
