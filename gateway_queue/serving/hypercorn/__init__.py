"""Changes Hypercorn where requests that stall need it.

Hypercorn has no setting for any of this, so subclasses of some of its classes take their place
when the app starts, however it is run. ``.github/UPSTREAM.md`` lists the changes that Hypercorn
could adopt.

The table lists the private and undocumented parts of Hypercorn that are used, which rule of the
queue needs them, what happens without them, and which test notices a change of Hypercorn:

==============================  ===============================  =================================
used                            needed for                       without it; noticed by
==============================  ===============================  =================================
``TCPServer._read_data``,       disconnected clients leave at    a stalled client is closed by a
``protocol_send``,              once; an answer that cannot be   read timeout, a slow reader keeps
``send_lock``, ``idle_task``    written frees its slot           the next ticket waiting;
                                                                 ``test_hardening``
``TaskGroup._nursery``,         a disconnect cancels the         two more tasks and a channel for
``_nursery_manager``,           request; 25 % less memory for a  each request; ``test_requests``,
``spawn_app``                   waiting client                   ``test_hypercorn``
``HTTPStream.app_send``,        a ticket is never answered by    500 for a ticket, which clients
``state``, ``closed``           a 5xx; a client that left takes  treat as permission to identify;
                                no slot                          ``test_hypercorn``
``H11Protocol.can_read``,       a disconnect behind pipelined    a vanished client takes a slot;
``_handle_events``,             bytes is noticed; head and body  ``test_requests``, ``test_wire``
``_maybe_recycle``,             are one packet
``_create_stream``,
``_send_h11_event``,
``_send_error_response``
``H2Protocol._send_data``,      a window starts after the        releases up to 150 ms early;
``_flush``, ``_handle_events``, answer is written                ``test_http2``
``_create_stream``,
``_window_updated``,
``stream_buffers``,
``has_data``,
``StreamBuffer._complete``,
``_is_empty``, ``buffer``
``TCPServer._close``            10,000 connections close in      1 s more of CPU time;
                                2.7 s                            ``test_command``
``TaskGroup.__aexit__``,        an exception ends where it       a fault ends the server;
``TrioSingleTask``              belongs; the idle time is a      ``test_hypercorn``
                                deadline
``H2Protocol.stream_send``      head, body and end are one       a client gets a part of an
                                write                            answer; ``test_http2``
``H2Protocol.priority``         removing one of 900 streams      a client that ends its requests
                                does not take 3 ms               delays releases; ``test_attack``
``H2Protocol.connection``,      frames are counted before h2     floods delay releases by seconds;
``handle``, ``initiate``        parses them                      ``test_attack``
``H2Protocol``, ``H11Protocol`` more than 1000 requests; only    tickets are lost, or a secret gets
``keep_alive_requests``,        the first request can change     into the log; ``test_attack``
``_check_protocol``             the protocol
``TCPServer.protocol``,         a closed connection frees its    reconnecting clients fill the
``ProtocolWrapper.protocol``    memory at once                   memory; ``test_attack``
``HTTPStream.handle``,          the app tells tickets from       half-closed clients get no answer
``scope``, ``TaskGroup``        endpoints                        from endpoints; ``test_attack``
==============================  ===============================  =================================

Beside Hypercorn: :mod:`gateway_queue.serving.event_loop` replaces the private ``_epoll`` of trio's
event loop (optional, ``test_event_loop``), and :mod:`gateway_queue.serving.process` reads
``_target`` of ``multiprocessing.Process`` (``test_command``).
"""

from __future__ import annotations

import hypercorn.protocol
import hypercorn.protocol.h2
import hypercorn.protocol.h11
import hypercorn.trio.run
import hypercorn.trio.tcp_server

from gateway_queue.serving.hypercorn.connection import Connection
from gateway_queue.serving.hypercorn.http1 import HTTP1
from gateway_queue.serving.hypercorn.http2 import HTTP2, Buffer
from gateway_queue.serving.hypercorn.requests import Requests
from gateway_queue.serving.hypercorn.stream import Stream


class UnknownHypercorn(Exception):
    """A class of Hypercorn that one of ours has to replace is missing, or is another class."""


def install() -> None:
    """Replace classes of Hypercorn with the classes below.

    Raises:
      UnknownHypercorn: one of them cannot be replaced. Without it, releases would be early, or
        tickets would be answered 500.
    """
    for module, name, ours in (
        (hypercorn.trio.run, "TCPServer", Connection),
        (hypercorn.trio.tcp_server, "TaskGroup", Requests),
        (hypercorn.protocol, "H11Protocol", HTTP1),
        (hypercorn.protocol, "H2Protocol", HTTP2),
        (hypercorn.protocol.h11, "HTTPStream", Stream),
        (hypercorn.protocol.h2, "HTTPStream", Stream),
        (hypercorn.protocol.h2, "StreamBuffer", Buffer),
    ):
        theirs = getattr(module, name, None)
        if not (isinstance(theirs, type) and issubclass(ours, theirs)):
            raise UnknownHypercorn(
                f"this version of Hypercorn is not supported: {module.__name__}.{name} is not a "
                f"class that {ours.__name__} extends; install hypercorn>=0.18,<0.19"
            )
        setattr(module, name, ours)
