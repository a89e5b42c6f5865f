"""Logs: one line per event on stderr, as text or as JSON."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable

import structlog
from structlog.dev import ConsoleRenderer, plain_traceback

from gateway_queue.observing.lines import Limiter, clean
from gateway_queue.observing.output import Output
from gateway_queue.settings import Settings

ACCEPTING = "trio.serve_listeners"
"""The logger by which trio reports that it has no descriptors to accept a connection."""

ACCEPTING_SECONDS = 10.0
"""Trio logs this ten times per second; at most one line in this time is written."""


def configure(settings: Settings) -> None:
    """Give all of this package's lines, structlog's and the standard library's, one form."""
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso"),
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.contextvars.merge_contextvars,
            Limiter(),
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = Output()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                clean,
                _renderer(settings.log_format),
            ],
        )
    )
    for name in ("gateway_queue", ACCEPTING):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(settings.log_level.upper())
    logging.getLogger(ACCEPTING).filters = [_seldom(ACCEPTING_SECONDS)]
    # It logs with a traceback what this package logs in one line.
    logging.getLogger("coredis").disabled = True


def _renderer(log_format: str) -> structlog.typing.Processor:
    if log_format == "json":
        return structlog.processors.JSONRenderer()
    # https://no-color.org
    colors = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    return ConsoleRenderer(colors=colors, exception_formatter=plain_traceback)


def _seldom(seconds: float) -> Callable[[logging.LogRecord], bool]:
    """Pass one line per interval, without its traceback."""
    next_at = -math.inf

    def passes(record: logging.LogRecord) -> bool:
        nonlocal next_at
        record.exc_info = None
        if record.created < next_at:
            return False
        next_at = record.created + seconds
        return True

    return passes
