"""The ingest server: the gateways' API over mutual TLS. `python -m routing.server`.

Files in the PKI folder (deploy/pki.py makes them for a demonstration): `ingest.pem` and `ingest.key` for the server,
`site-ca.pem` that signed the gateways' certificates, `receipt.key` (Ed25519) for receipts. It answers nobody without a
client certificate, so it is probed by connecting.
"""

import asyncio
import contextlib
import logging
import socket
import ssl
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import FrameType

import structlog
import uvicorn
from fastapi import FastAPI

from routing import feed, ingest, problems
from routing.commit import Committer
from routing.gateways import CertificateProtocol
from routing.ingest import Commits
from storage import logs
from storage.database import Database, psycopg_dsn
from storage.errors import ConfigurationError
from storage.notify import Hub
from storage.objects import Objects
from storage.receipts import read_signing_key
from storage.settings import Settings, settings
from storage.transitions import EVENTS_CHANNEL

_LOG = structlog.get_logger()
_POOL_SIZE = 20
_STOP_S = 30
"""A commit in progress may end; its gateway would only ask again."""


def create_app(configuration: Settings) -> FastAPI:
    """The application. Raises ConfigurationError if the receipt key cannot be used."""
    key = read_signing_key(configuration.pki_dir / "receipt.key")

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        state = app.state
        state.settings = configuration
        state.receipt_key = key
        state.database = Database(configuration.database_url, pool_size=_POOL_SIZE)
        state.objects = Objects(configuration)
        state.commits = Commits(Committer(state.database, state.objects, key))
        state.hub = Hub(psycopg_dsn(configuration.database_url), (EVENTS_CHANNEL,))
        await state.hub.start()
        try:
            yield
        finally:
            await state.hub.stop()
            await asyncio.to_thread(state.commits.close)
            state.database.close()

    app = FastAPI(title="Yuanzhen ingest", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.stopping = asyncio.Event()
    app.include_router(ingest.router)
    app.include_router(feed.router)
    app.add_middleware(problems.BodyLimit, max_bytes=ingest.MAX_BODY_BYTES)
    problems.install(app)
    return app


def tls_context(pki_dir: Path) -> ssl.SSLContext:
    """TLS 1.2 or newer, with a client certificate from the site CA required. Raises ConfigurationError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_cert_chain(pki_dir / "ingest.pem", pki_dir / "ingest.key")
        context.load_verify_locations(pki_dir / "site-ca.pem")
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(f"Certificates in {pki_dir} cannot be used: {error}") from error
    return context


class IngestServer(uvicorn.Server):
    """uvicorn that ends the long polls before it waits for the connections."""

    def __init__(self, configuration: Settings) -> None:
        self._app = create_app(configuration)
        context = tls_context(configuration.pki_dir)
        config = uvicorn.Config(
            self._app,
            host=configuration.ingest_host,
            port=configuration.ingest_port,
            http=CertificateProtocol,
            ssl_context_factory=lambda _config, _default: context,
            access_log=False,
            log_config=None,  # its loggers' records go the way of storage/logs.py
            log_level=logging.WARNING,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=_STOP_S,
        )
        super().__init__(config)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop in order and exit with 0; uvicorn itself would end by the same signal again."""
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        if self.started:
            _LOG.info("ingest.ready", host=self.config.host, port=self.config.port)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wake the long polls, then stop as uvicorn does."""
        self._app.state.stopping.set()
        await self._app.state.hub.stop()
        await super().shutdown(sockets)


def main() -> int:
    """Run until SIGTERM. Exit status 2: a setting or file that cannot be used."""
    logs.configure("ingest")
    try:
        server = IngestServer(settings())
    except ConfigurationError as error:
        _LOG.error("ingest.configuration", reason=error.reason)
        return 2
    server.run()
    return 0 if server.started else 1


if __name__ == "__main__":
    sys.exit(main())
