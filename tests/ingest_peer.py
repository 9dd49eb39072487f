"""A gateway for the tests of the ingest server, and the server itself as a process of its own, over real mutual TLS.

The gateway here is written against storage/wire.py alone, so that it can also send what ours never would.
"""

import hashlib
import io
import os
import ssl
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import httpx
import pytest
import sqlalchemy as sa
from pydicom.dataset import Dataset
from pydicom.filewriter import write_dataset
from pydicom.uid import ExplicitVRLittleEndian

from deploy.pki import Pki, ensure_pki, issue_gateway
from deploy.postgres import Postgres
from deploy.process import free_ports, is_free
from deploy.valkey import Valkey
from storage import dataset, packs, wire
from storage.database import Database
from storage.rows import Gateway
from tests.centre import Sites
from tests.servers import S3Server

CR_STORAGE = "1.2.840.10008.5.1.4.1.1.1"
START_S = 60.0
M = TypeVar("M", bound=wire.Message)


@dataclass(frozen=True)
class Image:
    """An instance as a gateway keeps it."""

    facts: wire.InstanceFacts
    data: bytes


def image(
    uid: str,
    *,
    study: str = "1.2.3",
    series: str = "1.2.3.1",
    patient_id: str = "P1",
    patient_name: str = "Zhang^San=张^三",
    patient_birth_date: str = "",
    patient_sex: str = "",
    fill: int = 7,
    side: int = 16,
    description: str = "",
    transfer_syntax_uid: str = ExplicitVRLittleEndian,
) -> Image:
    """A small CR image whose pixels all are `fill`."""
    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.SOPClassUID, ds.SOPInstanceUID = CR_STORAGE, uid
    ds.StudyInstanceUID, ds.SeriesInstanceUID = study, series
    ds.PatientID, ds.PatientName, ds.Modality = patient_id, patient_name, "CR"
    ds.PatientBirthDate, ds.PatientSex = patient_birth_date, patient_sex
    ds.SeriesNumber, ds.InstanceNumber, ds.BodyPartExamined = 3, 1, "CHEST"
    if description:
        ds.SeriesDescription = description
    ds.Rows = ds.Columns = side
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = 16
    ds.HighBit, ds.PixelRepresentation = 15, 0
    little = transfer_syntax_uid != dataset.EXPLICIT_VR_BIG_ENDIAN
    ds.PixelData = fill.to_bytes(2, "little" if little else "big") * (side * side)
    ds["PixelData"].VR = "OW"
    return of_data(uid, series, encode(ds, transfer_syntax_uid), transfer_syntax_uid)


def encode(ds: Dataset, transfer_syntax_uid: str) -> bytes:
    """The data set's bytes, without file meta information."""
    out = io.BytesIO()
    from pydicom.filebase import DicomIO

    file = DicomIO(out)
    file.is_little_endian = transfer_syntax_uid != dataset.EXPLICIT_VR_BIG_ENDIAN
    file.is_implicit_VR = transfer_syntax_uid == dataset.IMPLICIT_VR_LITTLE_ENDIAN
    write_dataset(file, ds)
    return out.getvalue()


def of_data(uid: str, series: str, data: bytes, transfer_syntax_uid: str, sop_class_uid: str = CR_STORAGE) -> Image:
    """Any bytes as an instance."""
    try:
        found = dataset.find_pixel_data(data, transfer_syntax_uid).element_offset
        cut = len(data) if found is None else found
    except dataset.MalformedDataSetError:
        cut = len(data)
    facts = wire.InstanceFacts(
        sop_instance_uid=uid,
        sop_class_uid=sop_class_uid,
        series_instance_uid=series,
        transfer_syntax_uid=transfer_syntax_uid,
        sha256=hashlib.sha256(data).hexdigest(),
        size_bytes=len(data),
        header_sha256=hashlib.sha256(data[:cut]).hexdigest(),
        pixel_sha256=hashlib.sha256(data[cut:]).hexdigest(),
        received_at=datetime.now(UTC),
    )
    return Image(facts, data)


def facts_of(study: str = "1.2.3", patient_id: str = "P1", **others: object) -> wire.StudyFacts:
    """A study's facts as its first image gives them."""
    values = {
        "study_instance_uid": study,
        "patient_id": patient_id,
        "patient_name": "Zhang^San=张^三",
        "accession_number": "A1",
        "first_received_at": datetime.now(UTC),
        "specific_character_set": "ISO_IR 192",
        "acquired_at": datetime(2026, 11, 23, 8, tzinfo=UTC),
        **others,
    }
    return wire.StudyFacts.model_validate(values)


@dataclass
class Packed:
    """A pack ready to go, and its plan."""

    plan: wire.PackPlan
    data: bytes
    study: wire.StudyFacts
    images: Sequence[Image]

    def offer(self) -> wire.Offer:
        """The offer of this pack alone."""
        return wire.Offer(study=self.study, instances=tuple(i.facts for i in self.images), packs=(self.plan,))

    def commit(self) -> wire.Commit:
        """Its commit."""
        return wire.Commit(study_instance_uid=self.study.study_instance_uid, pack_id=self.plan.pack_id)


def pack(folder: Path, study: wire.StudyFacts, images: Sequence[Image], pack_id: str | None = None) -> Packed:
    """Write a pack as the gateway does."""
    files = []
    for one in images:
        path = folder / one.facts.sha256
        path.write_bytes(one.data)
        files.append((one.facts, path))
    out = io.BytesIO()
    size, digest = packs.write_pack(out, study, files)
    plan = wire.PackPlan(
        pack_id=pack_id or uuid.uuid4().hex,
        size_bytes=size,
        sha256=digest,
        digests=tuple(one.facts.sha256 for one in images),
    )
    return Packed(plan, out.getvalue(), study, images)


class Peer:
    """One gateway's connection to the centre."""

    def __init__(self, base_url: str, pki: Pki, certificate: Path | None, key: Path | None) -> None:
        context = ssl.create_default_context(cafile=str(pki.site_ca))
        if certificate is not None:
            context.load_cert_chain(certificate, key)
        self.http = httpx.Client(base_url=base_url, verify=context, timeout=60, trust_env=False)
        self.store = httpx.Client(timeout=60, trust_env=False)

    def close(self) -> None:
        """Close the connections."""
        self.http.close()
        self.store.close()

    def post(self, name: str, message: wire.Message) -> httpx.Response:
        """POST one message."""
        body, headers = message.model_dump_json().encode(), {"Content-Type": "application/json"}
        return self.http.post(f"/gateway/v1/{name}", content=body, headers=headers)

    def offer(self, offer: wire.Offer) -> wire.OfferAnswer:
        """Offer, and expect an answer."""
        return _read(self.post("offer", offer), wire.OfferAnswer)

    def put(self, order: wire.PutOrder, data: bytes) -> None:
        """PUT to the presigned address."""
        self.store.put(order.url, content=data, headers=order.headers).raise_for_status()

    def commit(self, packed: Packed) -> wire.CommitAnswer:
        """Commit, asking again while the centre verifies."""
        while True:
            answer = _read(self.post("commit", packed.commit()), wire.CommitAnswer)
            if answer.status != "verifying":
                return answer

    def send(self, packed: Packed) -> wire.CommitAnswer:
        """Offer, PUT, commit."""
        answer = self.offer(packed.offer())
        if answer.receipts:
            return wire.CommitAnswer(status="receipted", receipt=answer.receipts[0])
        self.put(answer.puts[0], packed.data)
        return self.commit(packed)

    def inventory(self, images: Sequence[Image], study: str = "1.2.3", patient_id: str = "P1") -> wire.InventoryAnswer:
        """Say that the study consists of these."""
        lines = tuple(
            wire.ReceiptLine(sop_instance_uid=i.facts.sop_instance_uid, sha256=i.facts.sha256) for i in images
        )
        message = wire.Inventory(
            study_instance_uid=study, patient_id=patient_id, instances=lines, quiet_since=datetime.now(UTC)
        )
        return _read(self.post("inventory", message), wire.InventoryAnswer)


def _read(answer: httpx.Response, kind: type[M]) -> M:
    assert answer.status_code == 200, answer.text
    return kind.model_validate_json(answer.content)


@dataclass
class Ingest:
    """A running ingest server, or one that can be started again on the same port."""

    port: int
    pki: Pki
    environment: dict[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    peers: list[Peer] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Base of its addresses."""
        return f"https://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start and wait until it listens."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "routing.server"], env=self.environment, stdout=log, stderr=log
            )
        deadline = time.monotonic() + START_S
        while is_free(self.port):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, "the ingest server does not listen"
            time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(timeout=60)

    def peer(self, name: str) -> Peer:
        """A client with the certificate of gateway `name`."""
        issued = issue_gateway(self.pki, name)
        self.peers.append(Peer(self.url, self.pki, issued.certificate, issued.key))
        return self.peers[-1]

    def fingerprint(self, name: str) -> str:
        """What the gateway's row says."""
        return issue_gateway(self.pki, name).fingerprint


@contextmanager
def serving(folder: Path, postgres: Postgres, s3: S3Server, valkey: Valkey) -> Iterator[Ingest]:
    """An ingest server with certificates of its own, ended at the end."""
    pki = ensure_pki(folder / "pki")
    port = free_ports(1)[0]
    values = {
        "DATABASE_URL": postgres.app_url,
        "BROKER_URL": valkey.url,
        "S3_URL": s3.url,
        "S3_ACCESS_KEY": s3.access_key,
        "S3_SECRET_KEY": s3.secret_key,
        "PKI_DIR": str(pki.directory),
        "INGEST_PORT": str(port),
    }
    environment = os.environ | {f"YUANZHEN_{name}": value for name, value in values.items()}
    server = Ingest(port, pki, environment, folder / "ingest.log")
    server.start()
    try:
        yield server
    finally:
        for peer in server.peers:
            peer.close()
        server.kill()


def enrol(server: Ingest, database: Database, sites: Sites) -> None:
    """Give the two counties' gateways the certificates `a` and `b`."""
    with database.centre() as session:
        for gateway, name in ((sites.gateway, "a"), (sites.other_gateway, "b")):
            session.execute(
                sa.update(Gateway).where(Gateway.id == gateway).values(certificate_sha256=server.fingerprint(name))
            )


@pytest.fixture(scope="session")
def ingest_server(
    migrated: Postgres, s3_server: S3Server, valkey_server: Valkey, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Ingest]:
    """One ingest server for the whole run."""
    with serving(tmp_path_factory.mktemp("ingest"), migrated, s3_server, valkey_server) as server:
        yield server


@pytest.fixture
def ingest(ingest_server: Ingest, database: Database, sites: Sites) -> Ingest:
    """The ingest server, with fresh rows and both counties enrolled."""
    enrol(ingest_server, database, sites)
    return ingest_server


@pytest.fixture
def county(ingest: Ingest) -> Iterator[Peer]:
    """The first county's gateway."""
    peer = ingest.peer("a")
    yield peer
    peer.close()


@pytest.fixture
def other_county(ingest: Ingest) -> Iterator[Peer]:
    """The second county's gateway."""
    peer = ingest.peer("b")
    yield peer
    peer.close()
