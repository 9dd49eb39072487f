"""The demonstration certificates: what each may be used for, and that making them again changes nothing."""

import ssl
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import pkcs12
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from deploy.pki import Pki, ensure_pki, issue_gateway, issue_reader
from storage.receipts import load_public_key, load_signing_key


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return ensure_pki(tmp_path_factory.mktemp("pki") / "pki", ["centre.example"])


def test_every_private_key_is_readable_by_its_owner_only(pki: Pki) -> None:
    issue_gateway(pki, "county-a")
    issue_reader(pki, "reader", "Reader", "1234")
    secrets = [path for path in pki.directory.rglob("*") if path.suffix in {".key", ".p12"}]
    assert {path.name for path in secrets} >= {"ingest.key", "receipt.key", "county-a.key", "reader.p12"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in secrets} == {0o600}


def test_making_them_again_changes_no_file(pki: Pki) -> None:
    first = issue_gateway(pki, "county-b")
    before = {path: path.read_bytes() for path in pki.directory.rglob("*") if path.is_file()}
    ensure_pki(pki.directory, ["centre.example"])
    assert issue_gateway(pki, "county-b") == first
    assert {path: path.read_bytes() for path in pki.directory.rglob("*") if path.is_file()} == before


def test_a_new_host_name_renews_the_server_certificate_and_nothing_else(tmp_path: Path) -> None:
    pki = ensure_pki(tmp_path)
    ca, server = pki.site_ca.read_bytes(), pki.ingest_certificate.read_bytes()
    ensure_pki(tmp_path, ["192.0.2.7"])
    assert pki.site_ca.read_bytes() == ca
    assert pki.ingest_certificate.read_bytes() != server


def test_a_gateway_certificate_is_good_for_a_client_and_not_for_a_server(pki: Pki) -> None:
    gateway = issue_gateway(pki, "county-c")
    certificate = x509.load_pem_x509_certificate(gateway.certificate.read_bytes())
    store = Store([x509.load_pem_x509_certificate(pki.site_ca.read_bytes())])
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH]
    server = PolicyBuilder().store(store).build_server_verifier(x509.DNSName("localhost"))
    with pytest.raises(VerificationError):
        server.verify(certificate, [])


def test_the_server_certificate_verifies_for_every_configured_name(pki: Pki) -> None:
    certificate = x509.load_pem_x509_certificate(pki.ingest_certificate.read_bytes())
    store = Store([x509.load_pem_x509_certificate(pki.site_ca.read_bytes())])
    for name in ("localhost", "centre.example"):
        PolicyBuilder().store(store).build_server_verifier(x509.DNSName(name)).verify(certificate, [])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki.ingest_certificate, pki.ingest_key)


def test_a_readers_key_opens_with_the_pin_and_with_nothing_else(pki: Pki) -> None:
    path = issue_reader(pki, "li", "李医生", "271828")
    _, certificate, chain = pkcs12.load_key_and_certificates(path.read_bytes(), b"271828")
    assert certificate is not None
    certificate.verify_directly_issued_by(chain[0])
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.content_commitment
    with pytest.raises(ValueError, match="password"):
        pkcs12.load_key_and_certificates(path.read_bytes(), b"wrong")


def test_the_receipt_key_is_the_kind_that_receipts_are_signed_with(pki: Pki) -> None:
    private = load_signing_key(pki.receipt_key.read_bytes())
    assert private.public_key() == load_public_key(pki.receipt_public_key.read_bytes())


@pytest.mark.parametrize("name", ["../ingest", ".hidden", "a/b", ""])
def test_a_name_that_could_leave_its_folder_is_refused(pki: Pki, name: str) -> None:
    with pytest.raises(ValueError, match="only letters"):
        issue_gateway(pki, name)
