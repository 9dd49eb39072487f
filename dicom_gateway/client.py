"""The gateway's side of the wire contract (storage/wire.py): HTTPS with a client certificate, every failure named.

It does not retry: callers do (uplink, heartbeat, returns), each in its own loop. What may succeed later is LinkError,
what the centre refused is PermanentError with the detail of its problem body (RFC 9457).
"""

import hashlib
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TypeVar

import httpx
from pydantic import ValidationError

from dicom_gateway.settings import GatewaySettings
from storage import wire
from storage.errors import DigestMismatchError, LinkError, NotFoundError, PermanentError


class CentreFaultError(LinkError):
    """The centre answered 500: the link is there, and it failed on this very message."""


M = TypeVar("M", bound=wire.Message)
ReportKind = Literal["pdf", "encapsulated", "sr"]

_PUT_BLOCK_BYTES = 256 * 1024
_MAX_ANSWER_BYTES = 64 * 1024 * 1024
_TOO_MANY, _NOT_FOUND, _FAULT = 429, 404, 500
_RETRYABLE_4XX = frozenset({408, 425, _TOO_MANY})


def _retry_after_s(answer: httpx.Response) -> float | None:
    """Seconds from a Retry-After header (RFC 9110 10.2.3); the date form is not used by our centre."""
    value = answer.headers.get("retry-after", "")
    return float(value) if value.isdigit() else None


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as source:
        while block := source.read(_PUT_BLOCK_BYTES):
            yield block


class CentreClient:
    """One for the process; thread safe. `close()` when done."""

    def __init__(self, settings: GatewaySettings) -> None:
        """Raises OSError or ssl.SSLError if a certificate or key file cannot be used."""
        trust = ssl.create_default_context(cafile=str(settings.ca_file))
        trust.minimum_version = ssl.TLSVersion.TLSv1_2
        trust.load_cert_chain(settings.cert_file, settings.key_file)
        # The object store never sees the gateway's certificate: the presigned URL is its whole authority.
        store_trust = ssl.create_default_context()
        store_trust.load_verify_locations(cafile=str(settings.ca_file))
        timeout = httpx.Timeout(settings.request_timeout_s, connect=settings.connect_timeout_s)
        self._centre = httpx.Client(
            base_url=settings.centre_url, verify=trust, timeout=timeout, proxy=settings.centre_proxy, trust_env=False
        )
        self._store = httpx.Client(verify=store_trust, timeout=timeout, proxy=settings.centre_proxy, trust_env=False)
        self._timeout = timeout

    def close(self) -> None:
        """Close both connections' pools."""
        self._centre.close()
        self._store.close()

    def offer(self, offer: wire.Offer) -> wire.OfferAnswer:
        """Announce instances and the packs they will come in."""
        return self._post("/gateway/v1/offer", offer, wire.OfferAnswer)

    def put_pack(self, order: wire.PutOrder, path: Path) -> None:
        """Stream one pack file to its presigned URL. Every refusal is a LinkError: the next offer brings a new URL."""
        headers = {**order.headers, "Content-Length": str(path.stat().st_size)}
        try:
            answer = self._store.put(order.url, content=_blocks(path), headers=headers)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise LinkError(f"The object store cannot be reached: {type(error).__name__}") from error
        if not answer.is_success:
            raise LinkError(f"The object store answered {answer.status_code} to a pack", _retry_after_s(answer))

    def commit(self, commit: wire.Commit) -> wire.CommitAnswer:
        """Ask for a pack that was PUT to be verified, archived and signed for."""
        return self._post("/gateway/v1/commit", commit, wire.CommitAnswer)

    def inventory(self, inventory: wire.Inventory) -> wire.InventoryAnswer:
        """Announce all instances of a study that has gone quiet."""
        return self._post("/gateway/v1/inventory", inventory, wire.InventoryAnswer)

    def heartbeat(self, heartbeat: wire.Heartbeat) -> wire.HeartbeatAnswer:
        """Say how the gateway is; get the centre's clock."""
        return self._post("/gateway/v1/heartbeat", heartbeat, wire.HeartbeatAnswer)

    def feed(self, cursor: int, wait_s: float = wire.FEED_WAIT_MAX_S) -> wire.Feed:
        """Signed reports after `cursor`; waits up to `wait_s` for one."""
        query = {"cursor": str(cursor), "wait_s": f"{min(wait_s, wire.FEED_WAIT_MAX_S):g}"}
        patience = httpx.Timeout(self._timeout.read or 0, connect=self._timeout.connect, read=wait_s + 15.0)
        return self._read(self._ask("GET", "/gateway/v1/feed", params=query, timeout=patience), wire.Feed)

    def report_object(self, report_id: int, kind: ReportKind) -> bytes:
        """One object of a report. Raises LinkError, NotFoundError."""
        return self._ask("GET", f"/gateway/v1/reports/{report_id}/{kind}").content

    def checked_report_object(self, report_id: int, kind: ReportKind, sha256: str) -> bytes:
        """The same, compared with the digest that the feed named. Raises DigestMismatchError (retryable)."""
        content = self.report_object(report_id, kind)
        if hashlib.sha256(content).hexdigest() != sha256:
            raise DigestMismatchError(f"Report {report_id} {kind}: the bytes are not those that the feed announced")
        return content

    def acknowledge(self, acknowledge: wire.Acknowledge) -> wire.AcknowledgeAnswer:
        """Tell the centre of a step of a report at the county."""
        return self._post("/gateway/v1/acknowledge", acknowledge, wire.AcknowledgeAnswer)

    def _post(self, path: str, message: wire.Message, kind: type[M]) -> M:
        body = message.model_dump_json().encode()
        return self._read(self._ask("POST", path, content=body, headers={"Content-Type": "application/json"}), kind)

    def _ask(
        self,
        method: str,
        path: str,
        *,
        content: bytes | None = None,
        headers: dict[str, str] | None = None,
        params: dict[str, str] | None = None,
        timeout: httpx.Timeout | None = None,
    ) -> httpx.Response:
        try:
            answer = self._centre.request(
                method, path, content=content, headers=headers, params=params, timeout=timeout or self._timeout
            )
        except httpx.HTTPError as error:
            raise LinkError(f"The centre cannot be reached: {type(error).__name__}") from error
        status = answer.status_code
        if answer.is_success:
            return answer
        if 400 <= status < 500 and status not in _RETRYABLE_4XX:
            reason = f"The centre refused ({status}): {_detail(answer)}"
            raise NotFoundError(reason) if status == _NOT_FOUND else PermanentError(reason)
        kind = CentreFaultError if status == _FAULT else LinkError
        raise kind(f"The centre answered {status}", _retry_after_s(answer))

    @staticmethod
    def _read(answer: httpx.Response, kind: type[M]) -> M:
        if len(answer.content) > _MAX_ANSWER_BYTES:
            raise LinkError("The centre's answer is too large")
        try:
            return kind.model_validate_json(answer.content)
        except ValidationError as error:
            # A captive portal or a proxy answers 200 with a page of its own: that passes.
            raise LinkError(f"The centre's answer is not a {kind.__name__}") from error


def _detail(answer: httpx.Response) -> str:
    """The problem's detail, or what there is."""
    try:
        problem = wire.Problem.model_validate_json(answer.content)
    except ValidationError:
        return "no reason given"
    return (problem.detail or problem.title)[:500]
