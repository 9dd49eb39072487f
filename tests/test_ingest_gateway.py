"""Our gateway, as a process, sending real studies by C-STORE to our ingest server, as a process: both keep their word.

Peers of other makes on the DICOM side are in the gateway's own tests.
"""

import hashlib
from pathlib import Path

import sqlalchemy as sa
from pydicom import dcmread
from pydicom.uid import UID
from pynetdicom import AE, build_context

from storage import archive
from storage.database import Database
from storage.objects import Objects
from storage.rows import Event, Gateway, Instance, Study
from storage.transitions import verify_chain
from storage.vocabulary import StudyState
from tests import gateway_kit
from tests.centre import Sites
from tests.ingest_peer import Ingest, ingest, ingest_server

__all__ = ["ingest", "ingest_server"]


def send(port: int, files: list[Path]) -> None:
    """C-STORE each file, in its own transfer syntax."""
    association = AE("CT1")
    association.dimse_timeout = association.network_timeout = 120  # a busy machine is no failure
    sets = [dcmread(path) for path in files]
    contexts = {(str(ds.SOPClassUID), str(ds.file_meta.TransferSyntaxUID)) for ds in sets}
    linked = association.associate(
        "127.0.0.1", port, contexts=[build_context(UID(a), UID(b)) for a, b in sorted(contexts)], ae_title="YUANZHEN"
    )
    assert linked.is_established
    for ds in sets:
        assert linked.send_c_store(ds).Status == 0x0000
    linked.release()


def test_real_studies_from_our_gateway_arrive_bit_for_bit_and_complete(
    ingest: Ingest, database: Database, objects: Objects, sites: Sites, tmp_path: Path
) -> None:
    digests = gateway_kit.many(tmp_path / "ct", 30)
    digests |= gateway_kit.many(tmp_path / "us", 2, name="examples_ybr_color.dcm")
    files = sorted(tmp_path.glob("*/*.dcm"))
    pki = ingest.pki
    changes = {
        "ca_file": pki.site_ca,
        "cert_file": pki.directory / "gateways" / "a.pem",
        "key_file": pki.directory / "gateways" / "a.key",
        "receipt_public_key_file": pki.receipt_public_key,
    }
    with gateway_kit.gateway_process(tmp_path / "spool", ingest.url, **changes) as gateway:
        gateway.ready()
        send(gateway.port, files)

        def complete() -> bool:
            with database.county(sites.county) as session:
                return session.scalars(sa.select(Study.state)).all() == [StudyState.COMPLETE] * 2

        gateway_kit.until(complete, "both studies complete")
        with database.county(sites.county) as session:
            rows = session.scalars(sa.select(Instance)).all()
            assert {row.sop_instance_uid: row.sha256.hex() for row in rows} == digests
            for row in rows:
                assert hashlib.sha256(archive.read_instance(session, objects, row)).digest() == row.sha256
            for study in session.scalars(sa.select(Study)):
                verify_chain(session, study.id)
                assert study.calling_ae_title == "CT1"
            assert session.scalars(sa.select(Event.name).where(Event.name.like("study.held"))).all() == []
        gateway_kit.until(lambda: heard(database, sites), "heartbeat")
        assert gateway.terminate() == 0


def heard(database: Database, sites: Sites) -> bool:
    with database.centre() as session:
        gateway = session.get_one(Gateway, sites.gateway)
        return gateway.last_heartbeat_at is not None and abs(gateway.clock_offset_ms or 0) < 5000


def test_a_name_in_escaped_character_sets_holds_no_study(
    ingest: Ingest, database: Database, sites: Sites, tmp_path: Path
) -> None:
    """Gateway and centre each decode the identity: a difference would hold the study."""
    path = next(path for path in gateway_kit.pydicom_files() if path.name == "chrH31.dcm")
    pki = ingest.pki
    changes = {
        "ca_file": pki.site_ca,
        "cert_file": pki.directory / "gateways" / "a.pem",
        "key_file": pki.directory / "gateways" / "a.key",
        "receipt_public_key_file": pki.receipt_public_key,
    }
    with gateway_kit.gateway_process(tmp_path / "spool", ingest.url, **changes) as gateway:
        gateway.ready()
        send(gateway.port, [path])

        def state() -> StudyState | None:
            with database.county(sites.county) as session:
                return session.scalars(sa.select(Study.state).where(Study.instance_count > 0)).one_or_none()

        assert gateway_kit.until(state, "the study arrived") is not StudyState.HELD
