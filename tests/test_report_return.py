"""Signed reports coming home: every step durable, nothing unverified in the PACS, no fault that ends the way.

Real HTTPS with client certificates, real signatures, and a real C-STORE SCP in a process of its own. Not covered here:
the centre's side of the feed (test_feed_home) and SIGKILL of the whole gateway, which the demonstration does.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pydicom
import pytest

from deploy.pki import ensure_pki, issue_reader
from dicom_gateway.client import CentreClient
from dicom_gateway.returns import ReportReturn
from dicom_gateway.settings import GatewaySettings
from dicom_gateway.spool import Spool
from reading_queue.report_dicom import StudyIdentity, encapsulate, structured_report
from reading_queue.report_pdf import SIGNATURE_BOXES, ReportContent, render_pdf
from reading_queue.signing import Pkcs12Signer
from storage import wire
from tests.gateway_kit import SITE, free_port, pki, settings_for, until
from tests.report_material import CONTENT, PIN, READER, content, fonts_dir
from tests.report_peers import ReportCentre, county_pacs

__all__ = ["fonts_dir"]

# pynetdicom does not close the socket of a connection that was refused; the interpreter does, and says so.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <socket.socket:pytest.PytestUnraisableExceptionWarning"
)

BASIC_TEXT_SR = "1.2.840.10008.5.1.4.1.1.88.11"
ENCAPSULATED_PDF = "1.2.840.10008.5.1.4.1.1.104.1"
STUDY = StudyIdentity(
    study_instance_uid=CONTENT.study_instance_uid,
    patient_name="Wang^Xiao=王^小𠮷",
    patient_id="P0012345",
    accession_number="A20261123-0007",
)


@dataclass(frozen=True)
class SignedReport:
    """The three objects as signing leaves them."""

    content: ReportContent
    pdf: bytes
    encapsulated: bytes
    sr: bytes

    @property
    def item(self) -> wire.FeedItem:
        return wire.FeedItem(
            cursor=0,
            report_id=self.content.report_id,
            study_instance_uid=self.content.study_instance_uid,
            accession_number=self.content.accession_number,
            patient_id=self.content.patient_id,
            version=self.content.version,
            signed_at=self.content.signed_at,
            pdf_sha256="0" * 64,
            encapsulated_sha256="0" * 64,
            sr_sha256="0" * 64,
        )


@pytest.fixture(scope="module")
def signed(fonts_dir: Path) -> Callable[[int], SignedReport]:
    """Makes the signed report with a number."""
    key = issue_reader(pki(), "reader", READER, PIN).read_bytes()
    signer = Pkcs12Signer(key, PIN, fonts_dir=fonts_dir)

    def make(report_id: int) -> SignedReport:
        report = content(report_id=report_id)
        pdf = signer.sign(
            render_pdf(report, fonts_dir), field="Author", name=READER, at=report.signed_at,
            box=SIGNATURE_BOXES["Author"],
        )  # fmt: skip
        return SignedReport(report, pdf, encapsulate(pdf, STUDY, report), structured_report(STUDY, report, []))

    return make


@pytest.fixture
def centre() -> Iterator[ReportCentre]:
    started = ReportCentre(pki(), SITE)
    yield started
    started.close()


def publish(centre: ReportCentre, report: SignedReport, **instead: Any) -> wire.FeedItem:
    objects = {"pdf": report.pdf, "encapsulated": report.encapsulated, "sr": report.sr} | instead
    return centre.publish(report.item, **objects)


class County:
    """A gateway's returns, running, with what it knows."""

    def __init__(self, settings: GatewaySettings) -> None:
        self.settings = settings
        self.spool = Spool(settings)
        self.client = CentreClient(settings)
        self.returns = ReportReturn(settings, self.spool, self.client)
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self.returns.run, args=(self.stopping,))
        self.thread.start()

    def row(self, report_id: int) -> dict[str, Any]:
        found = self.spool.ledger.row("SELECT * FROM report_delivery WHERE report_id = ?", report_id)
        return dict(found) if found else {"state": "", "error": ""}

    def open_quarantine(self) -> list[str]:
        rows = self.spool.ledger.rows("SELECT reason FROM quarantine WHERE resolved_at IS NULL")
        return [row["reason"] for row in rows]

    def stop(self) -> None:
        self.stopping.set()
        self.client.close()
        self.thread.join()
        self.spool.close()


@contextmanager
def county(spool_dir: Path, centre: ReportCentre, pacs_port: int | None = None, **changes: object) -> Iterator[County]:
    if pacs_port is not None:
        changes |= {"pacs_host": "127.0.0.1", "pacs_port": pacs_port, "pacs_ae_title": "COUNTYPACS"}
    running = County(settings_for(spool_dir, centre.url, **changes))
    try:
        yield running
    finally:
        running.stop()


def delivered(centre: ReportCentre, *report_ids: int) -> Callable[[], bool]:
    return lambda: all("delivered" in centre.steps(report_id) for report_id in report_ids)


Maker = Callable[[int], SignedReport]


def test_a_signed_report_reaches_the_pacs_and_each_step_is_told(
    tmp_path: Path, centre: ReportCentre, signed: Maker
) -> None:
    report = signed(7)
    with county_pacs(tmp_path / "pacs") as pacs, county(tmp_path / "spool", centre, pacs.port) as home:
        publish(centre, report)
        until(delivered(centre, 7), "report 7 delivered")
        assert home.row(7)["state"] == "delivered"
        assert centre.steps(7) == ["received", "delivered"]
        stored = [pydicom.dcmread(tmp_path / "pacs" / line["path"]) for line in pacs.said("pacs.stored")]
    by_class = {str(dataset.SOPClassUID): dataset for dataset in stored}
    assert set(by_class) == {ENCAPSULATED_PDF, BASIC_TEXT_SR}
    document = by_class[ENCAPSULATED_PDF]
    assert document.EncapsulatedDocument[: document.EncapsulatedDocumentLength] == report.pdf
    for dataset in stored:
        assert str(dataset.PatientName) == STUDY.patient_name
        assert (dataset.StudyInstanceUID, dataset.PatientID) == (STUDY.study_instance_uid, STUDY.patient_id)


def test_a_restart_asks_only_for_what_is_new_and_delivers_nothing_twice(
    tmp_path: Path, centre: ReportCentre, signed: Maker
) -> None:
    with county_pacs(tmp_path / "pacs") as pacs:
        with county(tmp_path / "spool", centre, pacs.port):
            publish(centre, signed(1))
            until(delivered(centre, 1), "report 1 delivered")
        centre.cursors.clear()
        with county(tmp_path / "spool", centre, pacs.port):
            publish(centre, signed(2))
            until(delivered(centre, 2), "report 2 delivered")
        assert min(centre.cursors) == 1
        assert len(pacs.said("pacs.stored")) == 4
        assert centre.steps(1) == centre.steps(2) == ["received", "delivered"]


def test_a_report_waits_for_a_pacs_that_is_off(tmp_path: Path, centre: ReportCentre, signed: Maker) -> None:
    port = free_port()
    with county(tmp_path / "spool", centre, port) as home:
        publish(centre, signed(1))
        until(lambda: "cannot be reached" in home.row(1)["error"], "the PACS is found to be off")
        assert home.row(1)["state"] == "received"
        assert centre.steps(1) == ["received"]
        with county_pacs(tmp_path / "pacs", port=port):
            until(delivered(centre, 1), "report 1 delivered")


def test_a_report_that_was_received_is_delivered_after_a_restart(
    tmp_path: Path, centre: ReportCentre, signed: Maker
) -> None:
    with county(tmp_path / "spool", centre) as home:  # no PACS is configured yet
        publish(centre, signed(1))
        until(lambda: centre.steps(1) == ["received"], "report 1 received")
        assert home.row(1)["state"] == "received"
    centre.always = {"reports": (503, {})}  # it has it and need not ask again
    with county_pacs(tmp_path / "pacs") as pacs, county(tmp_path / "spool", centre, pacs.port):
        until(delivered(centre, 1), "report 1 delivered")


@pytest.mark.parametrize("fault", [(503, {}), (429, {"Retry-After": "0"}), "cut", "portal"])
def test_a_fault_of_the_link_on_every_step_delays_and_loses_nothing(
    tmp_path: Path, centre: ReportCentre, signed: Maker, fault: Any
) -> None:
    for endpoint in ("feed", "reports", "acknowledge"):
        centre.faults[endpoint].extend([fault, fault])
    with county_pacs(tmp_path / "pacs") as pacs, county(tmp_path / "spool", centre, pacs.port):
        publish(centre, signed(1))
        until(delivered(centre, 1), "report 1 delivered")
        assert len(pacs.said("pacs.stored")) == 2


def test_a_changed_report_never_reaches_the_pacs(tmp_path: Path, centre: ReportCentre, signed: Maker) -> None:
    report = signed(1)
    forged = bytearray(report.pdf)
    forged[len(forged) // 2] ^= 1
    pdf = bytes(forged)
    wrapped = encapsulate(pdf, STUDY, report.content)
    with county_pacs(tmp_path / "pacs") as pacs, county(tmp_path / "spool", centre, pacs.port) as home:
        publish(centre, report, pdf=pdf, encapsulated=wrapped)
        until(lambda: "failed" in centre.steps(1), "the centre is told")
        publish(centre, signed(2))
        until(delivered(centre, 2), "the next report passes by")
        assert "delivered" not in centre.steps(1)
        assert home.row(1)["state"] == "announced"
        assert len(home.open_quarantine()) == 1
        assert len(pacs.said("pacs.stored")) == 2


def test_a_report_signed_under_another_authority_is_refused(
    tmp_path: Path, centre: ReportCentre, fonts_dir: Path
) -> None:
    stranger = issue_reader(ensure_pki(tmp_path / "other"), "reader", READER, PIN).read_bytes()
    pdf = Pkcs12Signer(stranger, PIN, fonts_dir=fonts_dir).sign(
        render_pdf(CONTENT, fonts_dir), field="Author", name=READER, at=CONTENT.signed_at, box=SIGNATURE_BOXES["Author"]
    )
    report = SignedReport(CONTENT, pdf, encapsulate(pdf, STUDY, CONTENT), structured_report(STUDY, CONTENT, []))
    with county(tmp_path / "spool", centre) as home:
        publish(centre, report)
        until(lambda: centre.steps(CONTENT.report_id) == ["failed"], "the centre is told")
        (reason,) = home.open_quarantine()
        assert "report CA" in reason


def test_a_dicom_object_that_holds_another_document_is_refused(
    tmp_path: Path, centre: ReportCentre, signed: Maker
) -> None:
    one, other = signed(1), signed(2)
    with county(tmp_path / "spool", centre) as home:
        publish(centre, one, encapsulated=other.encapsulated)
        until(lambda: centre.steps(1) == ["failed"], "the centre is told")
        assert "another document" in home.open_quarantine()[0]


@pytest.mark.parametrize("kind", ["encapsulated", "sr"])
def test_a_dicom_object_of_another_study_is_refused(
    tmp_path: Path, centre: ReportCentre, signed: Maker, kind: str
) -> None:
    report = signed(1)
    elsewhere = StudyIdentity(study_instance_uid="1.2.3", patient_name="X", patient_id="X")
    wrong = {
        "encapsulated": encapsulate(report.pdf, elsewhere, report.content),
        "sr": structured_report(elsewhere, report.content, []),
    }
    with county(tmp_path / "spool", centre) as home:
        publish(centre, report, **{kind: wrong[kind]})
        until(lambda: centre.steps(1) == ["failed"], "the centre is told")
        assert "another study" in home.open_quarantine()[0]


def test_bytes_that_are_not_those_announced_are_fetched_again(
    tmp_path: Path, centre: ReportCentre, signed: Maker
) -> None:
    report = signed(1)
    publish(centre, report)
    centre.objects[1, "sr"] = report.sr[:-2]
    with county(tmp_path / "spool", centre) as home:
        until(lambda: "not those" in home.row(1)["error"], "the digest differs")
        assert centre.steps(1) == []
        centre.objects[1, "sr"] = report.sr
        until(lambda: centre.steps(1) == ["received"], "report 1 received")


def test_a_pacs_that_refuses_is_shown_and_asked_again(tmp_path: Path, centre: ReportCentre, signed: Maker) -> None:
    port = free_port()
    with county(tmp_path / "spool", centre, port) as home:
        with county_pacs(tmp_path / "pacs", "--refuse", "C001", port=port):
            publish(centre, signed(1))
            until(lambda: "failed" in centre.steps(1), "the centre is told")
            assert home.row(1)["state"] == "received"
            assert "C001" in home.open_quarantine()[0]
        with county_pacs(tmp_path / "pacs", port=port):
            until(delivered(centre, 1), "report 1 delivered")
            until(lambda: not home.open_quarantine(), "the quarantine row is resolved")


def test_a_pacs_without_room_is_waited_for(tmp_path: Path, centre: ReportCentre, signed: Maker) -> None:
    port = free_port()
    with county(tmp_path / "spool", centre, port) as home:
        with county_pacs(tmp_path / "pacs", "--refuse", "A700", port=port):
            publish(centre, signed(1))
            until(lambda: "A700" in home.row(1)["error"], "the PACS has no room")
            assert not home.open_quarantine()
        with county_pacs(tmp_path / "pacs", port=port):
            until(delivered(centre, 1), "report 1 delivered")
    assert centre.steps(1) == ["received", "delivered"]


def test_a_pacs_that_knows_no_structured_reports_gets_the_document(
    tmp_path: Path, centre: ReportCentre, signed: Maker
) -> None:
    with (
        county_pacs(tmp_path / "pacs", "--accept", ENCAPSULATED_PDF) as pacs,
        county(tmp_path / "spool", centre, pacs.port),
    ):
        publish(centre, signed(1))
        until(delivered(centre, 1), "report 1 delivered")
        assert "Basic Text SR" in centre.acknowledged[-1].detail
        assert len(pacs.said("pacs.stored")) == 1


def test_a_pacs_that_knows_no_documents_is_a_refusal(tmp_path: Path, centre: ReportCentre, signed: Maker) -> None:
    with (
        county_pacs(tmp_path / "pacs", "--accept", BASIC_TEXT_SR) as pacs,
        county(tmp_path / "spool", centre, pacs.port) as home,
    ):
        publish(centre, signed(1))
        until(lambda: "failed" in centre.steps(1), "the centre is told")
        assert "Encapsulated PDF" in home.open_quarantine()[0]


def test_a_wrong_ae_title_is_named(tmp_path: Path, centre: ReportCentre, signed: Maker) -> None:
    with (
        county_pacs(tmp_path / "pacs", "--ae-title", "ANOTHER") as pacs,
        county(tmp_path / "spool", centre, pacs.port) as home,
    ):
        publish(centre, signed(1))
        until(lambda: "does not take an association" in home.row(1)["error"], "the rejection is named")


def test_the_report_is_written_in_the_character_set_the_pacs_reads(
    tmp_path: Path, centre: ReportCentre, signed: Maker
) -> None:
    report = signed(1)
    changes = {"pacs_character_set": "ISO_IR 192"}
    with county_pacs(tmp_path / "pacs") as pacs, county(tmp_path / "spool", centre, pacs.port, **changes):
        publish(centre, report)
        until(delivered(centre, 1), "report 1 delivered")
        paths = [tmp_path / "pacs" / line["path"] for line in pacs.said("pacs.stored")]
    for path in paths:
        assert STUDY.patient_name.encode() in path.read_bytes()
        assert pydicom.dcmread(path).SpecificCharacterSet == "ISO_IR 192"
    assert any(report.pdf in path.read_bytes() for path in paths)


def test_a_received_report_that_the_disk_lost_is_fetched_again(
    tmp_path: Path, centre: ReportCentre, signed: Maker
) -> None:
    with county(tmp_path / "spool", centre) as home:
        publish(centre, signed(1))
        until(lambda: centre.steps(1) == ["received"], "report 1 received")
        home.returns.path(1, "sr").unlink()
    with county_pacs(tmp_path / "pacs") as pacs, county(tmp_path / "spool", centre, pacs.port):
        until(delivered(centre, 1), "report 1 delivered")


def test_without_a_report_ca_nothing_is_fetched(tmp_path: Path, centre: ReportCentre, signed: Maker) -> None:
    publish(centre, signed(1))
    with county(tmp_path / "spool", centre, report_ca_file=None) as home:
        home.thread.join(10)
        assert not home.thread.is_alive()
        assert "report CA" in home.returns.error
    assert "feed" not in centre.calls


def test_an_acknowledgement_is_told_until_it_is_heard(tmp_path: Path, centre: ReportCentre, signed: Maker) -> None:
    centre.always = {"acknowledge": (503, {})}
    with county(tmp_path / "spool", centre) as home:
        publish(centre, signed(1))
        until(lambda: home.row(1)["state"] == "received", "report 1 received")
        until(lambda: centre.calls.count("acknowledge") >= 2, "the centre is told again")
    assert centre.steps(1) == []
    centre.always = {}
    with county(tmp_path / "spool", centre):
        until(lambda: centre.steps(1) == ["received"], "the centre has heard")
    assert centre.acknowledged[0].at - CONTENT.signed_at < timedelta(days=1)
