"""What the report tests share: a report's content, fonts, and readers with keys made by the project's own PKI."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, pkcs12
from cryptography.x509.oid import NameOID

from deploy.pki import Pki, ensure_pki, issue_reader
from reading_queue.report_pdf import ReportContent
from storage.vocabulary import Conclusion

FONTS_DIR = Path(__file__).resolve().parent.parent / ".cache" / "assets" / "fonts"
PIN = "246810"
READER = "李文涛"

CONTENT = ReportContent(
    report_id=42,
    version=1,
    language="both",
    county_name_zh="示范县人民医院",
    county_name_en="Demonstration County Hospital",
    centre_name_zh="示范中心医院",
    centre_name_en="Demonstration Central Hospital",
    patient_name="Wang^Xiao=王^小",
    patient_id="P0012345",
    patient_sex="F",
    patient_age="045Y",
    accession_number="A20261123-0007",
    modality="CT",
    study_description="胸部平扫",
    study_datetime=datetime(2026, 11, 23, 9, 12, 33),
    study_instance_uid="1.2.826.0.1.3680043.8.498.123",
    clinical_question="咳嗽、发热 3 天",
    findings="双肺纹理增多。\n心影不大。",
    impression="1. 右肺下叶占位。",
    conclusion=Conclusion.POSITIVE,
    author_name=READER,
    signed_at=datetime.now(UTC).replace(microsecond=0),
)


def content(**changes: Any) -> ReportContent:
    """The report with some fields changed."""
    return replace(CONTENT, **changes)


@pytest.fixture(scope="session")
def fonts_dir() -> Path:
    if not FONTS_DIR.is_dir():
        pytest.skip(f"No report fonts in {FONTS_DIR}: `make assets` brings them")
    return FONTS_DIR


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return ensure_pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="session")
def reader_key(pki: Pki) -> Callable[[str], bytes]:
    """A reader's PKCS#12, opened by PIN, for a display name."""

    def issue(name: str) -> bytes:
        return issue_reader(pki, f"r{name.encode().hex()}", name, PIN).read_bytes()

    return issue


def self_made_key(name: str, *, begins: timedelta, ends: timedelta) -> bytes:
    """A PKCS#12 of a certificate that nobody vouches for, valid from now + begins to now + ends."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + begins)
        .not_valid_after(now + ends)
        .sign(key, hashes.SHA256())
    )
    return pkcs12.serialize_key_and_certificates(b"key", key, certificate, None, BestAvailableEncryption(PIN.encode()))
