"""Logs of every process: one JSON object a line on standard output, with a fixed `action` and row ids only."""

import logging
import sys
import traceback

import structlog


def configure(process: str) -> None:
    """Set structlog up for this process; `process` names it in every line."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            _named(process),
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _frames_only,
            structlog.processors.EventRenamer("action"),
            structlog.processors.JSONRenderer(ensure_ascii=False),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(),
        cache_logger_on_first_use=True,
    )


def _frames_only(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """An exception by its type and frames: its text may quote a data set or a statement, and with them a patient."""
    if event.pop("exc_info", None):
        kind, _error, trace = sys.exc_info()
        if kind is not None:
            event["error"] = kind.__name__
            event["frames"] = [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(trace)]
    return event


def _named(process: str) -> structlog.typing.Processor:
    # Not a context variable: those do not reach the threads that a worker or a server starts.
    def add(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        return {"process": process, **event}

    return add
