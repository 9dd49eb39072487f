"""The web application: what every request passes through, and where each feature's routes hang.

Routes are in the feature modules, and every one names who may call it (`auth.require` or `auth.anyone`); a test walks
them all. State of the process: `app.state.settings`, `.database`, `.objects`, `.hub`.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import sqlalchemy as sa
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reading_queue import auth, county, problems, quality, reading, reports, stream, viewer, worklist
from reading_queue.pages import SECURITY_HEADERS
from storage.database import Database, psycopg_dsn
from storage.notify import Hub
from storage.objects import Objects
from storage.settings import Settings, settings
from storage.transitions import EVENTS_CHANNEL

_STATIC = Path(__file__).resolve().parent / "static"
_MAX_BODY_BYTES = 1024 * 1024  # the longest thing a person sends is a report's text


class Shell:
    """Around every answer: the security headers, unless the route set its own; and no body above the limit."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "0")
        if not announced.isdecimal() or int(announced) > _MAX_BODY_BYTES:
            await _too_large(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > _MAX_BODY_BYTES:  # chunked: nothing was announced
                return {"type": "http.disconnect"}
            return message

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self.app(scope, counted, with_headers)


async def _too_large(scope: Scope, receive: Receive, send: Send) -> None:
    content = {"type": "too-large", "title": "Too large", "status": 413, "detail": f"At most {_MAX_BODY_BYTES} bytes"}
    answer = JSONResponse(content, 413, SECURITY_HEADERS | {"Connection": "close"}, "application/problem+json")
    await answer(scope, receive, send)


class Precompressed(StaticFiles):
    """Files as set-up left them, with the Brotli or gzip twin that lies beside a file when the browser takes it."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """As StaticFiles, plus Content-Encoding."""
        accepted = Headers(scope=scope).get("accept-encoding", "")
        for name, suffix in (("br", ".br"), ("gzip", ".gz")):
            _, found = self.lookup_path(path + suffix) if name in accepted else ("", None)
            if found is not None:
                answer = await super().get_response(path + suffix, scope)
                kind = "text/css" if path.endswith(".css") else "text/javascript"
                answer.headers.update({"Content-Encoding": name, "Content-Type": f"{kind}; charset=utf-8"})
                break
        else:
            answer = await super().get_response(path, scope)
        answer.headers.update({"Vary": "Accept-Encoding", "Cache-Control": "public, max-age=86400"})
        return answer


def create_app(configuration: Settings | None = None) -> FastAPI:
    """The application on these settings (default: the process's). Servers are opened at start and closed at stop."""
    chosen = configuration or settings()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.database = Database(chosen.database_url, pool_size=20)
        app.state.objects = Objects(chosen)
        app.state.hub = Hub(psycopg_dsn(chosen.database_url), (EVENTS_CHANNEL,))
        await app.state.hub.start()
        try:
            yield
        finally:
            await app.state.hub.stop()
            app.state.database.close()

    # The interactive API pages load scripts from elsewhere, and this API is for our own pages.
    app = FastAPI(title="Yuanzhen", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.state.settings = chosen
    problems.install(app)
    app.add_middleware(Shell)
    for module in (auth, worklist, stream, reading, reports, county, quality, viewer):
        app.include_router(module.router)
    app.add_api_route("/healthz", health, dependencies=[Depends(auth.anyone)])
    app.mount("/static", StaticFiles(directory=_STATIC), name="static")
    app.mount("/assets", Precompressed(directory=chosen.assets_dir, check_dir=False), name="assets")
    return app


def health(request: Request) -> Response:
    """200 when the database answers; for supervisors and proxies."""
    with request.app.state.database.centre() as session:
        session.execute(sa.text("SELECT 1"))
    return JSONResponse({"status": "ok"}, headers={"Cache-Control": "no-store"})
