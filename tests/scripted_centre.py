"""A centre in memory for gateway tests: the wire contract over real HTTPS with client certificates, and faults on cue.

It verifies what it is sent as the real one does (pack digest, each instance's digest) and signs real receipts. A fault
is queued for an endpoint and used up by one request: a status with headers, "cut" (the connection dies), or a word the
endpoint itself knows (see `_commit`).
"""

import hashlib
import ssl
import threading
from collections import defaultdict, deque
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from deploy.pki import Pki
from storage import wire
from storage.errors import MalformedDataSetError
from storage.packs import index_of
from storage.receipts import load_signing_key, sign

Fault = str | tuple[int, dict[str, str]]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A cut connection is what the test wanted."""


class ScriptedCentre:
    """`url` is where it listens. `faults[endpoint]` is used before the endpoint answers as it should."""

    def __init__(self, pki: Pki, site: str) -> None:
        self.site = site
        self.key = load_signing_key(pki.receipt_key.read_bytes())
        self.faults: dict[str, deque[Fault]] = defaultdict(deque)
        self.always: dict[str, Fault] = {}
        self.calls: list[str] = []
        self.offers: list[wire.Offer] = []
        self.plans: dict[str, wire.PackPlan] = {}
        self.staged: dict[str, bytes] = {}
        self.archive: dict[tuple[str, str], bytes] = {}
        self.puts: list[str] = []
        self.studies: dict[tuple[str, str], wire.StudyFacts] = {}
        self.inventories: list[wire.Inventory] = []
        self.heartbeats: list[wire.Heartbeat] = []
        self.failing: set[str] = set()  # SOP Instance UIDs whose offer is answered 500
        self.lock = threading.Lock()
        centre = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                centre._serve(self, b"")

            def do_POST(self) -> None:
                centre._serve(self, self.rfile.read(int(self.headers["Content-Length"])))

            do_PUT = do_POST

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = _Server(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pki.ingest_certificate, pki.ingest_key)
        context.load_verify_locations(pki.site_ca)
        context.verify_mode = ssl.CERT_OPTIONAL  # the presigned PUT comes without one; /gateway/ insists
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = f"https://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _serve(self, handler: Any, body: bytes) -> None:
        path = handler.path.split("?")[0]
        endpoint = "put" if path.startswith("/staging/") else path.removeprefix("/gateway/v1/").split("/")[0]
        with self.lock:
            self.calls.append(endpoint)
            fault = self.faults[endpoint].popleft() if self.faults[endpoint] else self.always.get(endpoint)
        if endpoint != "put" and not handler.connection.getpeercert():
            return self._answer(handler, 401, b"{}")
        if fault == "cut":
            handler.connection.close()
            raise ConnectionAbortedError
        if isinstance(fault, tuple):
            problem = wire.Problem(title="scripted", status=fault[0], detail="as the test wanted")
            return self._answer(handler, fault[0], problem.model_dump_json().encode(), fault[1])
        if fault == "portal":
            return self._answer(handler, 200, b"<html>Please log in to the network</html>")
        with self.lock:
            if endpoint == "put":
                self.staged[path.rsplit("/", 1)[1]] = body
                self.puts.append(path.rsplit("/", 1)[1])
                return self._answer(handler, 200, b"")
            answer = getattr(self, f"_{endpoint}")(body, fault)
        if isinstance(answer, int):
            return self._answer(handler, answer, wire.Problem(title="no", status=answer).model_dump_json().encode())
        return self._answer(handler, 200, answer.model_dump_json().encode())

    @staticmethod
    def _answer(handler: Any, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        handler.send_response(status)
        for name, value in (headers or {}).items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    def _offer(self, body: bytes, fault: Fault | None) -> wire.OfferAnswer | int:
        offer = wire.Offer.model_validate_json(body)
        self.offers.append(offer)
        if any(one.sop_instance_uid in self.failing for one in offer.instances):
            return 500
        self.studies[offer.study.study_instance_uid, offer.study.patient_id] = offer.study
        (plan,) = offer.packs
        self.plans[plan.pack_id] = plan
        if all((one.sop_instance_uid, one.sha256) in self.archive for one in offer.instances):
            return wire.OfferAnswer(receipts=(self._receipt(plan.pack_id, offer.instances, None),))
        url = f"{self.url}/staging/{plan.pack_id}"
        soon = datetime.now(UTC) + timedelta(minutes=5)
        return wire.OfferAnswer(puts=(wire.PutOrder(pack_id=plan.pack_id, url=url, expires_at=soon),))

    def _commit(self, body: bytes, fault: Fault | None) -> wire.CommitAnswer | int:
        commit = wire.Commit.model_validate_json(body)
        if fault == "verifying":
            return wire.CommitAnswer(status="verifying", retry_after_s=0.05)
        pack, plan = self.staged.get(commit.pack_id), self.plans.get(commit.pack_id)
        if plan is None:
            return 404
        if pack is None or hashlib.sha256(pack).hexdigest() != plan.sha256 or fault == "reject":
            return wire.CommitAnswer(status="rejected", reason="the bytes do not match")
        try:
            index = index_of(pack)
        except MalformedDataSetError as error:
            return wire.CommitAnswer(status="rejected", reason=error.reason)
        instances = []
        for entry in index.entries:
            one = pack[entry.offset : entry.offset + entry.length]
            assert hashlib.sha256(one).hexdigest() == entry.facts.sha256
            instances.append((entry.facts, one))
        receipt = self._receipt(commit.pack_id, tuple(facts for facts, _ in instances), fault)
        if fault is None:
            for facts, one in instances:
                self.archive[facts.sop_instance_uid, facts.sha256] = one
        return wire.CommitAnswer(status="receipted", receipt=receipt)

    def _receipt(self, pack_id: str, instances: tuple[wire.InstanceFacts, ...], fault: Fault | None) -> wire.Receipt:
        lines = tuple(wire.ReceiptLine(sop_instance_uid=one.sop_instance_uid, sha256=one.sha256) for one in instances)
        receipt = wire.Receipt(
            site="another-county" if fault == "other site" else self.site,
            pack_id=pack_id,
            instances=lines[1:] if fault == "one short" else lines,
            archived_at=datetime.now(UTC),
            key_id="",
        )
        return sign(receipt, Ed25519PrivateKey.generate() if fault == "forged" else self.key)

    def _inventory(self, body: bytes, fault: Fault | None) -> wire.InventoryAnswer | int:
        inventory = wire.Inventory.model_validate_json(body)
        self.inventories.append(inventory)
        if (inventory.study_instance_uid, inventory.patient_id) not in self.studies:
            return 404
        missing = tuple(
            line for line in inventory.instances if (line.sop_instance_uid, line.sha256) not in self.archive
        )
        return wire.InventoryAnswer(complete=not missing, missing=missing)

    def _heartbeat(self, body: bytes, fault: Fault | None) -> wire.HeartbeatAnswer:
        self.heartbeats.append(wire.Heartbeat.model_validate_json(body))
        return wire.HeartbeatAnswer(centre_time=datetime.now(UTC))

    def _feed(self, body: bytes, fault: Fault | None) -> wire.Feed | int:
        return 503  # no reports here: tests of the return have their own centre
