"""Brings signed reports home: from the centre's feed to the hospital's PACS, each step durable before it is told.

    announced --fetched, digests and signature good, fsync--> received --C-STORE Success--> delivered
        ^  |                                                   ^   |
        +--+ link: again, full jitter up to 60 s               +---+
           + refused (bad signature, PACS says no): again every hour, with a row in the quarantine until it passes

The feed's cursor and the new rows are written in one transaction, so a report is neither lost nor asked for twice.
What the centre must hear (received, delivered, failed) waits in a table until it has heard it. A report whose
signature does not verify here against the report CA never reaches the PACS.
"""

import random
import sqlite3
import threading
import time
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import pydicom
import structlog
from pydicom.errors import InvalidDicomError

from dicom_gateway.client import CentreClient, ReportKind
from dicom_gateway.pacs import Answer, Outcome, in_character_set, send
from dicom_gateway.quarantine import note_quarantine, now
from dicom_gateway.settings import GatewaySettings
from dicom_gateway.spool import Spool
from dicom_gateway.verify import require_valid
from storage.durable import write_durably
from storage.errors import LinkError, PermanentError, RetryableError, SignatureInvalidError, YuanzhenError
from storage.wire import Acknowledge, FeedItem

log = structlog.get_logger(__name__)

_KINDS: tuple[ReportKind, ...] = ("pdf", "encapsulated", "sr")
_SUFFIX = {"pdf": "pdf", "encapsulated": "pdf.dcm", "sr": "sr.dcm"}
_CURSOR = "report_feed_cursor"
_IDLE_S = 0.25
_DETAIL_LENGTH = 500  # wire.Acknowledge


@dataclass(frozen=True, slots=True)
class _Delivery:
    """One row of report_delivery."""

    item: FeedItem
    state: str
    tries: int


class ReportReturn:
    """`run` is the body of a thread. `error` is for the status page: why nothing comes from the feed."""

    def __init__(self, settings: GatewaySettings, spool: Spool, client: CentreClient) -> None:
        self._settings = settings
        self._spool = spool
        self._ledger = spool.ledger
        self._client = client
        self._directory = spool.directory / "reports"
        self._directory.mkdir(exist_ok=True)
        self._ca_pem = settings.report_ca_file.read_bytes() if settings.report_ca_file else None
        self._wake = threading.Event()
        self.error = ""

    def run(self, stop: threading.Event) -> None:
        """Bring reports home until `stop`. Without a report CA nothing can be verified, so nothing is fetched."""
        if self._ca_pem is None:
            self.error = "No report CA is configured (report_ca_file): reports stay at the centre"
            log.warning("return.no_report_ca")
            return
        # A daemon, and not waited for at the stop: it may sit in a long poll, and what it holds is durable.
        threading.Thread(target=self._listen, args=(stop,), name="report-feed", daemon=True).start()
        while not stop.is_set():
            try:
                worked = self.work()
            except YuanzhenError as error:  # the spool's disk or database
                log.warning("return.waits", reason=error.reason)
                worked = False
            except Exception:  # the edge of the thread: a mistake of ours must not end the returns in silence
                log.exception("return.step_failed")
                worked = False
            if not worked:
                self._wake.wait(_IDLE_S)
                self._wake.clear()

    # The feed

    def _listen(self, stop: threading.Event) -> None:
        tries = 0
        while not stop.is_set():
            try:
                self.poll()
            except YuanzhenError as error:
                if not self.error and not stop.is_set():
                    log.warning("return.feed_failed", reason=error.reason)
                self.error, tries = error.reason, tries + 1
                stop.wait(self._pause_s(tries, error))
            except Exception:  # the edge of the thread; closing the client at the stop ends the poll in its own way
                if not stop.is_set():
                    log.exception("return.feed_error")
                    self.error, tries = "Internal error, see the gateway's log", tries + 1
                    stop.wait(self._pause_s(tries, None))
            else:
                self.error, tries = "", 0

    def poll(self) -> int:
        """Ask the feed once (waits up to 25 s there). Returns the number of new reports; they are durable."""
        row = self._ledger.row("SELECT value FROM setting WHERE key = ?", _CURSOR)
        feed = self._client.feed(int(row["value"]) if row else 0)

        def keep(connection: sqlite3.Connection) -> int:
            new = 0
            for item in feed.items:
                new += connection.execute(
                    "INSERT INTO report_delivery (report_id, cursor, study_instance_uid, item, state)"
                    " VALUES (?, ?, ?, ?, 'announced') ON CONFLICT (report_id) DO NOTHING",
                    (item.report_id, item.cursor, item.study_instance_uid, item.model_dump_json()),
                ).rowcount
            connection.execute(
                "INSERT INTO setting (key, value) VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
                (_CURSOR, str(feed.cursor)),
            )
            return new

        new = self._ledger.write(keep)
        if new:
            self._wake.set()
        return new

    # The work

    def work(self) -> bool:
        """One pass over what is due. Returns whether there was anything."""
        worked = self._tell()
        for row in self._due():
            delivery = _Delivery(FeedItem.model_validate_json(row["item"]), row["state"], row["tries"])
            try:
                if delivery.state == "announced":
                    self._receive(delivery.item)
                else:
                    self._deliver(delivery.item)
            except RetryableError as error:
                self._later(delivery, error.reason, self._pause_s(delivery.tries, error))
            except PermanentError as error:
                self._refused(delivery, error.reason)
            worked = True
        return self._tell() or worked

    def _due(self) -> list[sqlite3.Row]:
        # Without a PACS a received report is where it can get to.
        states = "state <> 'delivered'" if self._settings.pacs_host else "state = 'announced'"
        return self._ledger.rows(
            f"SELECT item, state, tries FROM report_delivery WHERE {states} AND next_try_at_s <= ?"  # noqa: S608
            " ORDER BY cursor LIMIT 20",
            time.time(),
        )

    def path(self, report_id: int, kind: ReportKind) -> Path:
        """Where an object of a report lies once it is received."""
        return self._directory / f"{report_id}.{_SUFFIX[kind]}"

    def _receive(self, item: FeedItem) -> None:
        digests = {"pdf": item.pdf_sha256, "encapsulated": item.encapsulated_sha256, "sr": item.sr_sha256}
        objects = {kind: self._client.checked_report_object(item.report_id, kind, digests[kind]) for kind in _KINDS}
        self._verify(item, objects)
        for kind, content in objects.items():
            _write_durably(self.path(item.report_id, kind), content)
        self._moved(item, "received", "received_at")

    def _verify(self, item: FeedItem, objects: dict[ReportKind, bytes]) -> None:
        """Signature good, and the DICOM objects are this report of this study. Raises SignatureInvalidError."""
        require_valid(objects["pdf"], self._ca_pem or b"")
        for kind in ("encapsulated", "sr"):
            try:
                dataset = pydicom.dcmread(BytesIO(objects[kind]))
                study_instance_uid = dataset.get("StudyInstanceUID")
                document = dataset.get("EncapsulatedDocument", b"")[: dataset.get("EncapsulatedDocumentLength", 0)]
            except (InvalidDicomError, EOFError) as error:
                raise SignatureInvalidError(f"The report's {kind} object is not a DICOM file") from error
            if study_instance_uid != item.study_instance_uid:
                raise SignatureInvalidError(f"The report's {kind} object names another study")
            if kind == "encapsulated" and document != objects["pdf"]:
                raise SignatureInvalidError("The report's DICOM object holds another document than the one signed")

    def _deliver(self, item: FeedItem) -> None:
        character_set = self._settings.pacs_character_set
        datasets = [in_character_set(self._stored(item, kind), character_set) for kind in ("encapsulated", "sr")]
        pdf, sr = send(self._settings, datasets)
        # The document is the report. A PACS that takes no structured reports has the report all the same.
        for answer in (pdf, sr):
            if answer.outcome is Outcome.LATER:
                raise LinkError(answer.reason)
        if pdf.outcome is Outcome.REFUSED:
            raise PermanentError(pdf.reason)
        self._moved(item, "delivered", "delivered_at", _shortfall(sr))

    def _stored(self, item: FeedItem, kind: ReportKind) -> bytes:
        try:
            return self.path(item.report_id, kind).read_bytes()
        except OSError as error:
            self._ledger.execute(
                "UPDATE report_delivery SET state = 'announced', tries = 0 WHERE report_id = ?", item.report_id
            )
            raise LinkError("A received report is no longer on the disk; it is fetched again") from error

    # What became of it

    def _moved(self, item: FeedItem, state: str, column: str, detail: str = "") -> None:
        at = now().isoformat()

        def move(connection: sqlite3.Connection) -> None:
            connection.execute(
                f"UPDATE report_delivery SET state = ?, {column} = ?, tries = 0, error = ?, next_try_at_s = 0"  # noqa: S608
                " WHERE report_id = ?",
                (state, at, detail, item.report_id),
            )
            connection.execute(
                "UPDATE quarantine SET resolved_at = ? WHERE kind = 'report_refused' AND subject = ?",
                (at, _subject(item)),
            )
            _note_acknowledgement(connection, item, state, at, detail)

        self._ledger.write(move)
        log.info(f"return.{state}", report_id=item.report_id)

    def _later(self, delivery: _Delivery, reason: str, pause_s: float) -> None:
        self._ledger.execute(
            "UPDATE report_delivery SET tries = tries + 1, error = ?, next_try_at_s = ? WHERE report_id = ?",
            reason,
            time.time() + pause_s,
            delivery.item.report_id,
        )
        log.warning("return.report_waits", report_id=delivery.item.report_id, reason=reason)

    def _refused(self, delivery: _Delivery, reason: str) -> None:
        """It will fail again until a person does something: tell them here, tell the centre, look again hourly."""
        item = delivery.item

        def note(connection: sqlite3.Connection) -> None:
            connection.execute(
                "UPDATE report_delivery SET tries = tries + 1, error = ?, next_try_at_s = ? WHERE report_id = ?",
                (reason, time.time() + self._settings.refused_retry_s, item.report_id),
            )
            note_quarantine(connection, kind="report_refused", subject=_subject(item), reason=reason)
            _note_acknowledgement(connection, item, "failed", now().isoformat(), reason[:_DETAIL_LENGTH])

        self._ledger.write(note)
        log.error("return.refused", report_id=item.report_id, reason=reason)

    def _tell(self) -> bool:
        """Tell the centre what it has not heard. Returns whether it heard something."""
        told = False
        for row in self._ledger.rows(
            "SELECT rowid, report_id, step, at, detail, tries FROM report_acknowledgement"
            " WHERE told_at IS NULL AND next_try_at_s <= ? ORDER BY rowid LIMIT 50",
            time.time(),
        ):
            message = Acknowledge(report_id=row["report_id"], step=row["step"], at=row["at"], detail=row["detail"])
            try:
                self._client.acknowledge(message)
            except YuanzhenError as error:
                permanent = isinstance(error, PermanentError)
                pause_s = self._settings.refused_retry_s if permanent else self._pause_s(row["tries"], error)
                self._ledger.execute(
                    "UPDATE report_acknowledgement SET tries = tries + 1, next_try_at_s = ? WHERE rowid = ?",
                    time.time() + pause_s,
                    row["rowid"],
                )
                log.warning("return.not_told", report_id=row["report_id"], reason=error.reason)
                continue
            self._ledger.execute(
                "UPDATE report_acknowledgement SET told_at = ? WHERE rowid = ?", now().isoformat(), row["rowid"]
            )
            told = True
        return told

    def _pause_s(self, tries: int, error: YuanzhenError | None) -> float:
        """Full jitter up to the ceiling (design §4.5), and not before what the other side asked for, up to it too."""
        ceiling_s = self._settings.retry_ceiling_s
        asked_s = min(getattr(error, "retry_after_s", None) or 0.0, ceiling_s)
        most_s = min(ceiling_s, self._settings.retry_base_s * 2 ** min(tries, 30))
        return max(random.uniform(0, most_s), asked_s)  # noqa: S311 - spreads load, no secret


def _subject(item: FeedItem) -> str:
    return f"report {item.report_id}"


def _shortfall(sr: Answer) -> str:
    return f"The document was stored, the structured report was not: {sr.reason}" if sr.reason else ""


def _note_acknowledgement(connection: sqlite3.Connection, item: FeedItem, step: str, at: str, detail: str) -> None:
    connection.execute(
        "INSERT INTO report_acknowledgement (report_id, step, at, detail) VALUES (?, ?, ?, ?)"
        " ON CONFLICT (report_id, step, detail) DO NOTHING",
        (item.report_id, step, at, detail),
    )


def _write_durably(path: Path, content: bytes) -> None:
    """As `write_durably`. Raises RetryableError for a disk that will not."""
    try:
        write_durably(path, content, suffix=".tmp")
    except OSError as error:
        raise RetryableError("A report could not be written to the spool's disk") from error
