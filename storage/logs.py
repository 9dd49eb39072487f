"""Logs of every process: one JSON object a line on standard output, with a fixed `action` and row ids only.

What libraries log goes the same way, by its level and place and without its words, for those may quote a data set, a
statement or an address: and with them a patient. So do warnings, and the errors that end a thread or the process.
"""

import contextlib
import errno
import logging
import sys
import threading
import traceback
import warnings
from types import TracebackType
from typing import TextIO

import structlog

from storage.errors import YuanzhenError

_SAFE_TEXTS = ("dramatiq.MainProcess", "dramatiq.WorkerProcess", "dramatiq.ForkProcess")
"""Loggers that speak of processes only; deploy/ waits for what a worker's says."""


def configure(process: str) -> None:
    """Set up structlog, the standard library's logging and warnings for this process, named so in every line."""
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
    root = logging.getLogger()
    for handler in list(root.handlers):
        if type(handler) in (logging.StreamHandler, LibraryHandler):  # such as basicConfig made
            root.removeHandler(handler)
    root.addHandler(LibraryHandler())
    warnings.showwarning = _show_warning
    sys.excepthook = _process_ended
    threading.excepthook = _thread_ended


class LibraryHandler(logging.Handler):
    """A library's record as one of our lines: level, logger and place; of an exception its type and frames."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line. Never raises: a log must not end what it tells of."""
        facts: dict[str, object] = {"logger": record.name, "place": f"{record.pathname}:{record.lineno}"}
        if record.name.startswith(_SAFE_TEXTS) and not record.exc_info:
            facts["text"] = record.getMessage()
        if isinstance(record.msg, OSError):  # asyncio's and uvicorn's way to say that a port is taken
            facts["errno"] = errno.errorcode.get(record.msg.errno or 0, "")
        level = min(max(record.levelno // 10 * 10, logging.INFO), logging.CRITICAL)  # structlog knows no others
        with contextlib.suppress(OSError, ValueError):  # standard output is closed
            structlog.get_logger().log(level, "library.said", exc_info=record.exc_info, **facts)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    structlog.get_logger().warning("library.warned", category=category.__name__, place=f"{filename}:{lineno}")


def _process_ended(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        return
    structlog.get_logger().critical("process.ended", exc_info=(kind, error, trace))


def _thread_ended(ended: threading.ExceptHookArgs) -> None:
    if ended.exc_value is not None and not issubclass(ended.exc_type, SystemExit):
        facts = (ended.exc_type, ended.exc_value, ended.exc_traceback)
        structlog.get_logger().critical("thread.ended", exc_info=facts)


def _frames_only(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """An exception by its type and frames: its text may quote a data set or a statement, and with them a patient. The
    reason of our own errors is written for people and free of patient data."""
    info = event.pop("exc_info", None)
    if not info:
        return event
    if isinstance(info, BaseException):
        info = (type(info), info, info.__traceback__)
    kind, error, trace = info if isinstance(info, tuple) else sys.exc_info()
    if kind is not None:
        event["error"] = kind.__name__
        event["frames"] = [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(trace)]
        if isinstance(error, YuanzhenError):
            event.setdefault("reason", error.reason)
    return event


def _named(process: str) -> structlog.typing.Processor:
    # Not a context variable: those do not reach the threads that a worker or a server starts.
    def add(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        return {"process": process, **event}

    return add
