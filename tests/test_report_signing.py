"""Signatures on reports: good ones verify here and in poppler, and nothing that was changed does.

Real keys and certificates from the project's own PKI; `pdfsig` (poppler) is the independent verifier. Tokens
(PKCS#11) and time stamps (RFC 3161) are not covered: no such device or service is here.
"""

import random
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from deploy.pki import Pki, ensure_pki
from dicom_gateway.verify import require_valid, verify_pdf
from reading_queue.report_pdf import SIGNATURE_BOXES, render_pdf
from reading_queue.signing import (
    AlreadySignedError,
    CertificateExpiredError,
    CertificateNotYetValidError,
    Pkcs12Signer,
    SignerNameMismatchError,
    SigningFailedError,
    WrongPinError,
)
from storage.errors import ConfigurationError, SignatureInvalidError
from tests.report_material import CONTENT, PIN, READER, content, fonts_dir, pki, reader_key, self_made_key
from tests.test_report_pdf import check_pdf_a, poppler

__all__ = ["fonts_dir", "pki", "reader_key"]

REVIEWER = "陈𠮷"
AUTHOR_BOX = SIGNATURE_BOXES["Author"]


def author_signs(pdf: bytes, key: bytes, fonts_dir: Path, *, name: str = READER, at: datetime | None = None) -> bytes:
    signer = Pkcs12Signer(key, PIN, fonts_dir=fonts_dir)
    return signer.sign(pdf, field="Author", name=name, at=at or CONTENT.signed_at, box=AUTHOR_BOX)


@pytest.fixture(scope="module")
def signed(fonts_dir: Path, reader_key: Callable[[str], bytes]) -> bytes:
    return author_signs(render_pdf(content(), fonts_dir), reader_key(READER), fonts_dir)


@pytest.fixture(scope="module")
def twice_signed(fonts_dir: Path, reader_key: Callable[[str], bytes]) -> bytes:
    one = author_signs(render_pdf(content(reviewer_name=REVIEWER), fonts_dir), reader_key(READER), fonts_dir)
    signer = Pkcs12Signer(reader_key(REVIEWER), PIN, fonts_dir=fonts_dir)
    return signer.sign(one, field="Reviewer", name=REVIEWER, at=CONTENT.signed_at, box=SIGNATURE_BOXES["Reviewer"])


def test_a_signed_report_says_who_signed_and_when(signed: bytes, pki: Pki) -> None:
    report = require_valid(signed, pki.report_ca.read_bytes())
    assert (report.signer, report.signed_at) == (READER, CONTENT.signed_at)
    assert report.intact
    assert report.trusted
    assert report.covers_whole_document


def test_author_and_reviewer_sign_one_document(twice_signed: bytes, pki: Pki) -> None:
    report = verify_pdf(twice_signed, pki.report_ca.read_bytes())
    assert report.valid
    assert [(s.field, s.signer) for s in report.signatures] == [("Author", READER), ("Reviewer", REVIEWER)]


def test_a_signed_report_is_still_pdf_a(signed: bytes, twice_signed: bytes, tmp_path: Path) -> None:
    check_pdf_a(signed, tmp_path)
    check_pdf_a(twice_signed, tmp_path)


def test_the_stamp_shows_name_and_time(signed: bytes, tmp_path: Path) -> None:
    path = tmp_path / "signed.pdf"
    path.write_bytes(signed)
    text = subprocess.run([poppler("pdftotext"), path, "-"], check=True, capture_output=True).stdout.decode()
    assert READER in text
    assert "电子签名 Digitally signed" in text


def test_poppler_agrees(twice_signed: bytes, pki: Pki, tmp_path: Path) -> None:
    path = tmp_path / "signed.pdf"
    path.write_bytes(twice_signed)
    said = subprocess.run([poppler("pdfsig"), "-nocert", path], check=False, capture_output=True, text=True).stdout
    assert said.count("Signature is Valid.") == 2
    assert said.count("ETSI.CAdES.detached") == 2
    assert "Total document signed" in said


def test_any_changed_byte_breaks_the_signature(signed: bytes, pki: Pki) -> None:
    ca = pki.report_ca.read_bytes()
    spread = random.Random(2)
    start = signed.index(b"/Contents <")
    contents = range(start, signed.index(b">", start))  # the signature itself and its padding
    places = [*spread.sample(range(len(signed)), 40), *spread.sample(contents, 40), contents[-1]]
    for place in [0, 9, *places, len(signed) - 2]:
        changed = bytearray(signed)
        changed[place] ^= 0x01
        assert not verify_pdf(bytes(changed), ca).valid, place


def test_bytes_added_after_the_signature_are_noticed(signed: bytes, pki: Pki) -> None:
    with pytest.raises(SignatureInvalidError):
        require_valid(signed + b"\n% one more\n", pki.report_ca.read_bytes())


def test_a_truncated_report_is_refused(signed: bytes, pki: Pki) -> None:
    for length in (0, 10, len(signed) // 2, len(signed) - 10):
        assert not verify_pdf(signed[:length], pki.report_ca.read_bytes()).valid


def test_an_unsigned_report_is_refused(fonts_dir: Path, pki: Pki) -> None:
    with pytest.raises(SignatureInvalidError, match="not signed"):
        require_valid(render_pdf(content(), fonts_dir), pki.report_ca.read_bytes())


def test_a_report_signed_under_another_authority_is_intact_and_not_trusted(signed: bytes, tmp_path: Path) -> None:
    other = ensure_pki(tmp_path)
    report = verify_pdf(signed, other.report_ca.read_bytes())
    assert report.intact
    assert not report.trusted
    assert not report.valid


def test_a_certificate_that_nobody_issued_is_not_trusted(fonts_dir: Path, pki: Pki) -> None:
    key = self_made_key(READER, begins=timedelta(days=-1), ends=timedelta(days=1))
    forged = author_signs(render_pdf(content(), fonts_dir), key, fonts_dir)
    assert not verify_pdf(forged, pki.report_ca.read_bytes()).trusted


def test_something_that_is_no_certificate_is_a_configuration_error(signed: bytes) -> None:
    with pytest.raises(ConfigurationError):
        verify_pdf(signed, b"not a certificate")


def test_a_wrong_pin_is_named(fonts_dir: Path, reader_key: Callable[[str], bytes]) -> None:
    for pin in ("135790", "", "密码"):
        with pytest.raises(WrongPinError):
            Pkcs12Signer(reader_key(READER), pin, fonts_dir=fonts_dir)


def test_an_expired_certificate_is_named(fonts_dir: Path) -> None:
    key = self_made_key(READER, begins=timedelta(days=-9), ends=timedelta(days=-1))
    with pytest.raises(CertificateExpiredError, match="ended on"):
        author_signs(render_pdf(content(), fonts_dir), key, fonts_dir)


def test_a_certificate_that_has_not_begun_is_named(fonts_dir: Path) -> None:
    key = self_made_key(READER, begins=timedelta(days=1), ends=timedelta(days=9))
    with pytest.raises(CertificateNotYetValidError, match="begins on"):
        author_signs(render_pdf(content(), fonts_dir), key, fonts_dir)


def test_one_reader_cannot_sign_as_another(fonts_dir: Path, reader_key: Callable[[str], bytes]) -> None:
    with pytest.raises(SignerNameMismatchError):
        author_signs(render_pdf(content(), fonts_dir), reader_key(READER), fonts_dir, name=REVIEWER)


def test_signing_twice_is_named(signed: bytes, fonts_dir: Path, reader_key: Callable[[str], bytes]) -> None:
    with pytest.raises(AlreadySignedError):
        author_signs(signed, reader_key(READER), fonts_dir)


def test_something_that_is_no_pdf_cannot_be_signed(fonts_dir: Path, reader_key: Callable[[str], bytes]) -> None:
    with pytest.raises(SigningFailedError):
        author_signs(b"GIF89a", reader_key(READER), fonts_dir)


def test_the_signing_time_is_the_centres_and_not_the_process_s(
    fonts_dir: Path, reader_key: Callable[[str], bytes], pki: Pki
) -> None:
    at = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=3)
    signed = author_signs(render_pdf(content(), fonts_dir), reader_key(READER), fonts_dir, at=at)
    assert verify_pdf(signed, pki.report_ca.read_bytes()).signed_at == at
