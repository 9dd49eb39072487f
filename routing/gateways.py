"""Who is calling: an enrolled gateway, known by the SHA-256 of its client certificate.

The TLS layer has checked that the certificate is from the site CA and that the caller holds its key. uvicorn does not
hand the certificate to the application, so the protocol class here puts its digest into the request's state.
"""

import asyncio
import hashlib
import ssl
from dataclasses import dataclass
from typing import Annotated

import sqlalchemy as sa
from fastapi import Depends, Request
from uvicorn.protocols.http.h11_impl import H11Protocol

from storage.database import Database
from storage.errors import ForbiddenError
from storage.rows import Gateway, Site
from storage.transitions import gateway_actor

_CLOSE_S = 1.0
_STATE = "client_certificate_sha256"


class CertificateProtocol(H11Protocol):
    """HTTP/1.1 whose requests know the client certificate: `request.state.client_certificate_sha256`, "" for none."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Read the certificate of this connection; `app_state` is copied into each request's scope."""
        channel: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
        certificate = channel.getpeercert(binary_form=True) if channel is not None else None
        digest = hashlib.sha256(certificate).hexdigest() if certificate else ""
        self.app_state = {**self.app_state, _STATE: digest}
        super().connection_made(transport)

    def shutdown(self) -> None:
        """The server stops: an idle connection is dropped, one with a request in it ends after the answer."""
        super().shutdown()
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()

    def on_response_complete(self) -> None:
        """Close within a second where a close is due: a peer that says nothing to it would hold the stop for 30."""
        super().on_response_complete()
        if self.transport.is_closing():
            self.loop.call_later(_CLOSE_S, self.transport.abort)


@dataclass(frozen=True, slots=True)
class Caller:
    """An enrolled gateway and its site."""

    gateway_id: int
    site_id: int
    site_code: str
    clock_offset_ms: int | None  # gateway minus centre, by its last heartbeat

    @property
    def actor(self) -> str:
        """Its name in events."""
        return gateway_actor(self.gateway_id)


def identify(database: Database, certificate_sha256: str) -> Caller:
    """The gateway with this certificate. Raises ForbiddenError if none is enrolled with it."""
    with database.centre() as session:
        row = session.execute(
            sa.select(Gateway.id, Gateway.site_id, Site.code, Gateway.clock_offset_ms)
            .join(Site, Site.site_id == Gateway.site_id)
            .where(Gateway.certificate_sha256 == certificate_sha256)
        ).one_or_none()
    if row is None or not certificate_sha256:
        raise ForbiddenError("No gateway is enrolled with this certificate")
    return Caller(*row)


def _caller(request: Request) -> Caller:
    return identify(request.app.state.database, getattr(request.state, _STATE, ""))


CallingGateway = Annotated[Caller, Depends(_caller)]
"""Parameter type of every route here: the enrolled gateway, which may reach the rows of its own site alone."""
