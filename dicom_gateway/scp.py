"""The DICOM services of the gateway: Verification and Storage as SCP (PS3.4 Annexes A and B), on pynetdicom.

Every C-STORE ends in one of the rows of `_STATUS_OF`: Success only after the spool said that the instance is kept.
pynetdicom is given what it lacks: PDUs are bounded before they are read, reads fill one buffer, delayed
acknowledgements are off (a DCMTK sender with Nagle's algorithm otherwise waits 40 ms for each image), connections that
ask for nothing do not keep others out, and the memory of all messages under way is bounded (dicom_gateway/inflow.py).
"""

import contextlib
import hashlib
import logging
import socket
import threading
import time
from collections import Counter
from functools import partial
from typing import Any

import structlog
from pydicom.dataset import Dataset
from pynetdicom import AE, evt, register_uid
from pynetdicom.service_class import StorageServiceClass
from pynetdicom.sop_class import uid_to_service_class
from pynetdicom.transport import AssociationServer, RequestHandler

from dicom_gateway.inflow import Inflow, Received
from dicom_gateway.intake import Arrival, DataSetMismatchError, receive
from dicom_gateway.quarantine import now
from dicom_gateway.settings import GatewaySettings
from dicom_gateway.sop_classes import STORAGE_SOP_CLASSES, TRANSFER_SYNTAXES, VERIFICATION
from dicom_gateway.spool import Spool
from storage.errors import MalformedDataSetError, OutOfSpaceError, RetryableError, YuanzhenError

log = structlog.get_logger(__name__)
logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)  # its lines have no action name, and may hold patient data

SUCCESS = 0x0000
PROCESSING_FAILURE = 0x0110  # PS3.7 C.5.16: not the data set's fault
_STATUS_OF: tuple[tuple[type[YuanzhenError], int], ...] = (
    # PS3.4 Table B.2-1, the first that fits.
    (OutOfSpaceError, 0xA700),  # Refused: Out of resources
    (RetryableError, 0xA700),
    (DataSetMismatchError, 0xA900),  # Error: Data Set does not match SOP Class
    (MalformedDataSetError, 0xC000),  # Error: Cannot understand
)
MAX_COMMENT_CHARACTERS = 64  # ErrorComment (0000,0902) is LO
MAX_PDU_BYTES = 8 * 1024 * 1024
"""Far above an A-ASSOCIATE-RQ with 128 contexts and above any P-DATA-TF that we allow."""
_WAITING_FOR_EACH_ASSOCIATION = 2
"""Connections that have not asked yet, for each association that may be: two threads each."""
_STOP_PATIENCE_S = 5.0


def _read_exactly(association_socket: Any, nr_bytes: int) -> bytearray:
    """In place of AssociationSocket.recv: what there is of `nr_bytes`, less only if the peer closed."""
    if nr_bytes > MAX_PDU_BYTES:
        raise OSError(f"PDU of {nr_bytes} bytes")
    connection: socket.socket = association_socket.socket
    buffer = bytearray(nr_bytes)
    view, filled = memoryview(buffer), 0
    while filled < nr_bytes:
        got = connection.recv_into(view[filled:])
        if not got:
            break
        filled += got
    if hasattr(socket, "TCP_QUICKACK"):  # it does not last: the kernel turns it off again by itself
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
    view.release()
    return buffer if filled == nr_bytes else buffer[:filled]


class _Contexts(list[Any]):
    """Presentation contexts that associations share: a copy of 11,000 UIDs for each would cost it 70 ms."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Contexts":
        return self


class _Entity(AE):
    """Counts only peers that asked for an association towards the maximum: a bare connection is none."""

    @property
    def active_associations(self) -> list[Any]:
        return [one for one in super().active_associations if one.requestor.primitive is not None]


class _Handler(RequestHandler):
    server: "_Server"

    def _create_association(self) -> Any:
        association: Any = super()._create_association()
        transport = association.dul.socket
        transport.recv = partial(_read_exactly, transport)
        self.server.inflow.watch(association)
        return association


class _Server(AssociationServer):
    """Not pynetdicom's threaded one: each association has its threads anyway, and here connections are counted right.

    Of connections that have not asked for an association there are never more than `waiting_most`: the oldest of the
    address that has most of them goes when another one comes. A modality asks at once, so it is not among the oldest.
    """

    request_queue_size = 128
    inflow: Inflow
    waiting_most: int

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Make room; every connection is let in."""
        waiting = [one for one in self.active_associations if one.requestor.primitive is None and not one._kill]
        while len(waiting) >= self.waiting_most:
            addresses = Counter(one.requestor.address for one in waiting)
            busiest = max(addresses.values())
            oldest = next(one for one in waiting if addresses[one.requestor.address] == busiest)
            waiting.remove(oldest)
            _let_go(oldest)
        return True

    def shutdown(self) -> None:
        """Stop accepting; pynetdicom's own also wants to be found in a list of the AE."""
        super(AssociationServer, self).shutdown()
        self.server_close()


def _let_go(association: Any) -> None:
    """Hang up on a connection; its threads end as if the peer had (PS3.8 Evt17), in whatever state they are."""
    connection = association.dul.socket.socket
    if connection is not None:
        with contextlib.suppress(OSError):  # the peer was quicker
            connection.shutdown(socket.SHUT_RDWR)


class StorageScp:
    """Listens from `start()` until `stop()`. `counts` says what happened since the start, by name."""

    def __init__(self, settings: GatewaySettings, spool: Spool) -> None:
        self._settings = settings
        self._spool = spool
        self.counts: Counter[str] = Counter()
        self._counting = threading.Lock()
        self._inflow = Inflow(settings.receive_memory_bytes)
        self._storing = 0  # C-STOREs being answered now
        self._server: Any = None
        self._thread: threading.Thread | None = None

    def start(self) -> int:
        """Begin to listen. Returns the port. Raises OSError if it is taken."""
        settings = self._settings
        for uid in STORAGE_SOP_CLASSES:
            if uid_to_service_class(uid) is not StorageServiceClass:  # the retired ones
                register_uid(uid, f"Storage_{uid.replace('.', '_')}", StorageServiceClass)
        entity = _Entity(ae_title=settings.ae_title)
        entity.require_called_aet = True
        entity.require_calling_aet = list(settings.allowed_ae_titles)
        entity.maximum_associations = settings.maximum_associations
        entity.maximum_pdu_size = settings.maximum_pdu_bytes
        entity.network_timeout = settings.network_timeout_s
        entity.dimse_timeout = settings.dimse_timeout_s
        entity.acse_timeout = settings.acse_timeout_s
        for uid in (VERIFICATION, *STORAGE_SOP_CLASSES):
            entity.add_supported_context(uid, list(TRANSFER_SYNTAXES))
        self._server = entity.make_server(
            (settings.host, settings.port),
            contexts=_Contexts(entity.supported_contexts),
            server_class=_Server,
            request_handler=_Handler,
            evt_handlers=[
                (evt.EVT_CONN_OPEN, self._on_connection),
                (evt.EVT_CONN_CLOSE, lambda event: self._inflow.forget(event.assoc)),
                (evt.EVT_REJECTED, self._on_rejected),
                (evt.EVT_FSM_TRANSITION, self._on_transition),
                (evt.EVT_C_STORE, self._on_store),
            ],
        )
        self._server.inflow = self._inflow
        self._server.waiting_most = _WAITING_FOR_EACH_ASSOCIATION * settings.maximum_associations
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="scp", daemon=True)
        self._thread.start()
        return int(self._server.server_address[1])

    def stop(self) -> None:
        """Stop listening, let messages under way end, then abort what is still open."""
        if self._server is None or self._thread is None:
            return
        self._server.shutdown()
        self._thread.join()
        deadline = time.monotonic() + _STOP_PATIENCE_S
        while self._storing and time.monotonic() < deadline:
            time.sleep(0.02)
        for association in self._server.active_associations:
            association.abort()
        for association in self._server.active_associations:
            association.join(max(0.0, deadline - time.monotonic()))

    def _count(self, what: str) -> None:
        with self._counting:
            self.counts[what] += 1

    # Events

    def _on_connection(self, event: Any) -> None:
        connection = event.assoc.dul.socket.socket
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(self._settings.network_timeout_s)  # half a PDU and then silence must end
        self._count("connections")

    def _on_rejected(self, event: Any) -> None:
        """PS3.8 Table 9-21; pynetdicom has answered the peer with the same reason."""
        answer = event.assoc.acceptor.primitive
        asked = event.assoc.requestor.primitive
        self._count("rejected")
        log.warning(
            "scp.association_rejected",
            peer=event.assoc.requestor.address,
            calling_ae_title=asked.calling_ae_title if asked else "",
            called_ae_title=asked.called_ae_title if asked else "",
            source=answer.result_source if answer else None,
            diagnostic=answer.diagnostic if answer else None,
        )

    def _on_transition(self, event: Any) -> None:
        """PS3.8 Table 9-10. Evt17 in Sta2: the peer hung up before it asked for anything; the thread that waits for it
        is told. Evt19: unrecognized or invalid PDU. pynetdicom aborts (AA-1, AA-8)."""
        if event.fsm_event == "Evt17" and event.current_state == "Sta2":
            event.assoc.dul.to_user_queue.put(None)
        if event.fsm_event == "Evt19" and event.current_state != "Sta13":  # Sta13: the rest of what was cut off
            self._count("not_dicom")
            log.warning("scp.not_dicom", peer=event.assoc.requestor.address)
            connection = event.assoc.dul.socket.socket
            if connection is not None:
                with contextlib.suppress(OSError):  # the peer was quicker
                    connection.shutdown(socket.SHUT_RD)  # what else it sends must not be waited for

    def _on_store(self, event: Any) -> Dataset:
        with self._counting:
            self._storing += 1
        try:
            return self._store(event)
        finally:
            if isinstance(event.request.DataSet, Received):
                event.request.DataSet.release()
            with self._counting:
                self._storing -= 1

    def _store(self, event: Any) -> Dataset:
        """Answer one C-STORE. Whatever goes wrong, the answer is a failure and says what and where."""
        request = event.request
        received = request.DataSet
        asked = event.assoc.requestor.primitive
        arrival = Arrival(
            data=received.getvalue() if received else b"",
            transfer_syntax_uid=str(event.context.transfer_syntax),
            sop_class_uid=str(request.AffectedSOPClassUID or ""),
            sop_instance_uid=str(request.AffectedSOPInstanceUID or ""),
            calling_ae_title=str(asked.calling_ae_title).strip(),
            called_ae_title=str(asked.called_ae_title).strip(),
            received_at=now(),
        )
        try:
            if isinstance(received, Received) and received.overflowed:
                raise OutOfSpaceError("No memory for a data set of this size now")
            outcome = receive(self._spool, arrival)
        except YuanzhenError as error:
            return self._refuse(arrival, error)
        except Exception:  # the edge of the process: no mistake of ours may look like Success
            log.exception("scp.store_failed")
            self._count("failed")
            return _answer(PROCESSING_FAILURE, "Internal error, see the gateway's log")
        self._count(outcome)
        return _answer(SUCCESS)

    def _refuse(self, arrival: Arrival, error: YuanzhenError) -> Dataset:
        status = next((code for kind, code in _STATUS_OF if isinstance(error, kind)), PROCESSING_FAILURE)
        self._count("refused")
        log.warning("scp.store_refused", status=f"{status:04X}", reason=error.reason)
        if isinstance(error, MalformedDataSetError):
            try:
                self._spool.keep_refused(
                    arrival.data,
                    hashlib.sha256(arrival.data).hexdigest(),
                    subject=arrival.sop_instance_uid[:64],
                    reason=error.reason,
                    calling_ae_title=arrival.calling_ae_title,
                )
            except RetryableError as trouble:
                log.warning("scp.quarantine_failed", reason=trouble.reason)
        return _answer(status, error.reason)


def _answer(status: int, comment: str = "") -> Dataset:
    answer = Dataset()
    answer.Status = status
    if comment:
        answer.ErrorComment = comment.encode("ascii", "replace").decode()[:MAX_COMMENT_CHARACTERS]
    return answer
