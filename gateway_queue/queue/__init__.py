"""The queue: tickets wait in lanes, and each lane's dispatcher releases one per window.

It runs on trio and does not depend on HTTP.

The states of a place (``Place.state``):

========  ===============================================  =========================================
state     meaning                                          how it ends
========  ===============================================  =========================================
waiting   its client is connected and can be released      client leaves: away, or gone
                                                           claim refused for the shard: held
                                                           claim granted: chosen
                                                           its client was chosen at a later place
                                                           of its shard, then moved here and is
                                                           answered: released
held      the shard starts too often and has to wait       hold ends: waiting
                                                           client leaves: away, or gone
away      its client has left; kept for the same shard     the shard asks again: waiting, or held
                                                           ``place_seconds`` are over: gone
chosen    its client is being answered                     answered: released
                                                           client leaves, or the slot came too late:
                                                           waiting for a moment, then held, away,
                                                           gone or still waiting
released  the end: the client has its answer
gone      the end: the place is given up
========  ===============================================  =========================================

A ticket without a shard, or with ``place_seconds`` 0, is gone when its client leaves.
"""

from gateway_queue.queue.queue import Queue

__all__ = ["Queue"]
