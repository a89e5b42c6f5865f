"""A store in Redis, which any number of replicas share.

``decisions.lua`` decides, one atomic command at a time, by the server's clock; ``script.py`` is its
interface. ``glance.lua`` tells which bots' data has changed. ``store.py`` is the store of one bot.
``link.py`` keeps the stores of all bots connected, ``servers.py`` finds the server, and
``connection.py`` uses a connection until anything about it is in doubt. ``clock.py`` compares the
clocks, ``line.py`` shares the places in the queue, and ``starts.py`` keeps the day's session
starts, to restore those that the server has lost.
"""

from gateway_queue.store.redis.link import Link
from gateway_queue.store.redis.store import RedisStore

__all__ = ["Link", "RedisStore"]
