"""Errors as people and programs see them: one table from the project's errors to HTTP, a page or problem details.

A browser that navigates gets a page in its language with what happened, what is safe and what to do; scripts, htmx and
viewers get RFC 9457 problem details. `type` is a fixed word that the page's script acts on.
"""

from typing import Any

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse
from sqlalchemy.exc import DBAPIError, OperationalError
from starlette.exceptions import HTTPException

from reading_queue.i18n import language_of, t
from reading_queue.pages import SECURITY_HEADERS, page
from storage.errors import (
    ConfigurationError,
    ForbiddenError,
    IllegalTransitionError,
    LeaseLostError,
    NotFoundError,
    ObjectStoreError,
    PermanentError,
    RetryableError,
    YuanzhenError,
)
from storage.visible import visible

_LOG = structlog.get_logger()
RETRY_AFTER_S = 5
_SIGN_ROUTE = "/cases/{case_id}/sign"


class SignInNeededError(PermanentError):
    """Nobody is signed in, or the sign-in has ended."""


class BadRequestError(PermanentError):
    """The request cannot be done as it was sent; `reason` says what to change."""


class ConflictError(PermanentError):
    """Somebody else was first. `extra` goes into the problem details: what is there now."""

    def __init__(self, reason: str, kind: str = "conflict", **extra: Any) -> None:
        super().__init__(reason)
        self.kind = kind
        self.extra = extra


_TABLE: tuple[tuple[type[YuanzhenError], int, str], ...] = (
    (SignInNeededError, 401, "sign-in"),
    (NotFoundError, 404, "not-found"),
    (ForbiddenError, 403, "forbidden"),
    (BadRequestError, 422, "bad-request"),
    (LeaseLostError, 409, "lease-lost"),
    (ConflictError, 409, "conflict"),
    (IllegalTransitionError, 409, "conflict"),
    (RetryableError, 503, "unavailable"),
    (YuanzhenError, 500, "failed"),
)


def wants_page(request: Request) -> bool:
    """Whether a person's browser navigates here, as against a script, htmx or a viewer."""
    if "hx-request" in request.headers:
        return False
    mode = request.headers.get("sec-fetch-mode")
    if mode is not None and mode != "navigate":
        return False
    return "text/html" in request.headers.get("accept", "")


def _answer(request: Request, status: int, kind: str, detail: str, **extra: Any) -> Response:
    language = language_of(request)
    detail = visible(detail)
    extra = {name: visible(value) if isinstance(value, str) else value for name, value in extra.items()}
    title = t(f"problems.{kind.replace('-', '_')}", language)
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status == 503 else None
    if wants_page(request):
        advice = t(f"problems.{kind.replace('-', '_')}_advice", language)
        return page(request, "problem.html", status=status, headers=headers, title=title, detail=detail, advice=advice)
    content = {"type": kind, "title": title, "status": status, "detail": detail} | extra
    return JSONResponse(content, status, headers, "application/problem+json")


def _of_project(request: Request, error: Exception) -> Response:
    assert isinstance(error, YuanzhenError)  # noqa: S101 - registered for nothing else
    status, kind = next((status, kind) for family, status, kind in _TABLE if isinstance(error, family))
    if isinstance(error, SignInNeededError) and wants_page(request) and request.method == "GET":
        target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        return RedirectResponse(str(request.url_for("sign_in_page").include_query_params(next=target)), 303)
    if status >= 500:
        # The reason is about our servers and in English: for the log.
        _LOG.warning("web.failed", kind=kind, error=type(error).__name__, reason=error.reason, route=_route(request))
        return _answer(request, status, kind, _in_words(request, error))
    extra: dict[str, Any] = {}
    if isinstance(error, ConflictError):
        extra = {"type": error.kind, **error.extra}
    return _answer(request, status, kind, error.reason, **extra)


def _in_words(request: Request, error: YuanzhenError) -> str:
    """What a person can use of an error of ours; "" where the page's advice says it all."""
    if isinstance(error, ConfigurationError):
        return t("problems.not_set_up", language_of(request))
    if not isinstance(error, ObjectStoreError):
        return ""
    not_signed = _route(request) == _SIGN_ROUTE
    return t("problems.store_away_not_signed" if not_signed else "problems.store_away", language_of(request))


def _of_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101
    fields = sorted({str(fault["loc"][-1]) for fault in error.errors()})
    if any(fault["loc"][0] == "path" for fault in error.errors()):  # no number, or none that PostgreSQL has
        return _answer(request, 404, "not-found", "")
    return _answer(request, 422, "bad-request", ", ".join(fields))


def _of_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101
    kind = {404: "not-found", 405: "not-found", 403: "forbidden", 413: "bad-request"}.get(error.status_code, "failed")
    answer = _answer(request, error.status_code, kind, error.detail if error.status_code not in {404, 405} else "")
    answer.headers.update(error.headers or {})
    return answer


def _of_database(request: Request, error: Exception) -> Response:
    _LOG.warning("web.database", error=type(error).__name__, route=_route(request))
    if isinstance(error, OperationalError):
        return _answer(request, 503, "unavailable", "")
    return _answer(request, 500, "failed", "")


def _unforeseen(request: Request, error: Exception) -> Response:
    """The process's edge: the error is ours, goes on to the server's log, and the person gets words."""
    _LOG.error("web.unforeseen", error=type(error).__name__, route=_route(request))
    answer = _answer(request, 500, "failed", "")
    answer.headers.update(SECURITY_HEADERS)  # this handler stands outside the shell that adds them
    return answer


def _route(request: Request) -> str:
    return getattr(request.scope.get("route"), "path", "")


def install(app: FastAPI) -> None:
    """Register the handlers."""
    app.add_exception_handler(YuanzhenError, _of_project)
    app.add_exception_handler(RequestValidationError, _of_request)
    app.add_exception_handler(HTTPException, _of_http)
    app.add_exception_handler(DBAPIError, _of_database)
    app.add_exception_handler(Exception, _unforeseen)
