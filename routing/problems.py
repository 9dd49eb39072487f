"""Errors of the gateways' API as problem details (RFC 9457), and the limit on what a request may carry.

A gateway retries 5xx and 429 and gives 4xx to a person: so a server that is away is 503 with Retry-After, never 500.
No answer and no log line repeats what the request said.
"""

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from sqlalchemy import exc
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from storage.errors import (
    ForbiddenError,
    IdentityConflictError,
    IllegalTransitionError,
    LinkError,
    NotFoundError,
    PermanentError,
    RetryableError,
    YuanzhenError,
)
from storage.wire import Problem

_LOG = structlog.get_logger()
RETRY_AFTER_S = 5
_STATUS: tuple[tuple[type[YuanzhenError], int, str], ...] = (
    (NotFoundError, 404, "Not found"),
    (ForbiddenError, 403, "Forbidden"),
    (IdentityConflictError, 409, "Conflict"),
    (IllegalTransitionError, 409, "Conflict"),
    (PermanentError, 400, "Refused"),
    (RetryableError, 503, "Try again later"),
)
_AWAY = (exc.OperationalError, exc.InterfaceError, exc.TimeoutError, exc.IntegrityError)
"""Server gone, pool exhausted, lock not had in time, or two requests that met: the same call may succeed later."""


def problem(status: int, title: str, detail: str = "", retry_after_s: float | None = None) -> Response:
    """An answer with a problem body."""
    body = Problem(title=title, status=status, detail=detail).model_dump_json()
    headers = {"Retry-After": str(max(1, round(retry_after_s)))} if retry_after_s is not None else None
    return Response(body, status, headers, media_type="application/problem+json")


def _ours(request: Request, error: Exception) -> Response:
    if not isinstance(error, YuanzhenError):
        raise error
    status, title = next((status, title) for kind, status, title in _STATUS if isinstance(error, kind))
    _LOG.warning("ingest.problem", path=request.url.path, status=status, error=type(error).__name__)
    if status != 503:
        return problem(status, title, error.reason)
    wait_s = error.retry_after_s if isinstance(error, LinkError) else None
    return problem(status, title, error.reason, wait_s or RETRY_AFTER_S)


def _database(request: Request, error: Exception) -> Response:
    # The error's text holds statements and their values: only its kind is logged.
    _LOG.error("ingest.database", path=request.url.path, error=type(error).__name__)
    if isinstance(error, exc.DataError):
        return problem(400, "Refused", "A value cannot be stored")
    if isinstance(error, _AWAY) or (isinstance(error, exc.DBAPIError) and error.connection_invalidated):
        return problem(503, "Try again later", "The database did not answer", RETRY_AFTER_S)
    return problem(500, "Internal error")


def _invalid(request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestValidationError):
        raise error
    faults = (f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}" for fault in error.errors()[:10])
    return problem(400, "Malformed request", "; ".join(faults)[:1000])


def _http(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    return problem(error.status_code, error.detail)


def _unexpected(request: Request, error: Exception) -> Response:
    return problem(500, "Internal error", type(error).__name__)


def install(app: FastAPI) -> None:
    """Give every error of the application its problem body."""
    app.add_exception_handler(YuanzhenError, _ours)
    app.add_exception_handler(exc.SQLAlchemyError, _database)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unexpected)


class BodyLimit:
    """Refuses a request whose body is larger than `max_bytes`, announced or not, before it is held in memory."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        too_large = problem(413, "Content too large", f"At most {self._max_bytes} bytes")
        if not announced.isdigit() or int(announced) > self._max_bytes:
            await too_large(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise HTTPException(413, f"Content too large: at most {self._max_bytes} bytes")
            return message

        await self._app(scope, counted, send)
