"""Demonstration certificates and keys, made once under `var/pki`. A real centre puts its own files there instead.

    site-ca.pem/.key        signs the ingest server's certificate and the gateways' client certificates
    ingest.pem/.key         the gateways' API (server authentication)
    gateways/NAME.pem/.key  one gateway (client authentication), bound in the database by its SHA-256 fingerprint
    receipt.key/.pub        Ed25519: the centre's signature on receipts
    report-ca.pem/.key      signs the readers' certificates
    readers/NAME.p12        one reader's RSA-3072 signing key and chain, locked with the reader's PIN

Private keys are mode 0600. Making a file that is there already is skipped, so every function may be called again.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    pkcs12,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_CA_DAYS = 3650
_LEAF_DAYS = 825
_RENEW_DAYS = 30
_ORGANISATION = "Yuanzhen demonstration"

_SigningKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


@dataclass(frozen=True)
class Pki:
    """Where the files are."""

    directory: Path

    @property
    def site_ca(self) -> Path:
        """Certificate that gateways and ingest server trust."""
        return self.directory / "site-ca.pem"

    @property
    def ingest_certificate(self) -> Path:
        """The ingest server's certificate."""
        return self.directory / "ingest.pem"

    @property
    def ingest_key(self) -> Path:
        """The ingest server's key."""
        return self.directory / "ingest.key"

    @property
    def receipt_key(self) -> Path:
        """Ed25519 private key that signs receipts."""
        return self.directory / "receipt.key"

    @property
    def receipt_public_key(self) -> Path:
        """Its public half, which gateways hold."""
        return self.directory / "receipt.pub"

    @property
    def report_ca(self) -> Path:
        """Certificate that says who may sign reports."""
        return self.directory / "report-ca.pem"


class Gateway(NamedTuple):
    """A gateway's client certificate, its key, and the SHA-256 of the certificate's DER as 64 hex digits."""

    certificate: Path
    key: Path
    fingerprint: str


def ensure_pki(directory: Path, hosts: Iterable[str] = ()) -> Pki:
    """Make what is missing. `hosts` are names or addresses that gateways reach the ingest server under."""
    pki = Pki(directory)
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o700)
    _ensure_ca(directory, "site-ca", "Yuanzhen site CA")
    _ensure_ca(directory, "report-ca", "Yuanzhen report CA")
    names = _alternative_names({"localhost", "127.0.0.1", *hosts})
    if _needs_issue(pki.ingest_certificate, names):
        _issue(directory, "site-ca", "ingest", "Yuanzhen ingest", ExtendedKeyUsageOID.SERVER_AUTH, names)
    if not pki.receipt_public_key.exists():
        signing = ed25519.Ed25519PrivateKey.generate()
        _write_secret(pki.receipt_key, signing.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        public = signing.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        pki.receipt_public_key.write_bytes(public)
    return pki


def issue_gateway(pki: Pki, name: str) -> Gateway:
    """A client certificate for the gateway called `name` (its common name)."""
    (pki.directory / "gateways").mkdir(mode=0o700, exist_ok=True)
    stem = f"gateways/{_file_name(name)}"
    certificate = pki.directory / f"{stem}.pem"
    if _needs_issue(certificate, ()):
        _issue(pki.directory, "site-ca", stem, name, ExtendedKeyUsageOID.CLIENT_AUTH, ())
    der = x509.load_pem_x509_certificate(certificate.read_bytes()).public_bytes(Encoding.DER)
    return Gateway(certificate, certificate.with_suffix(".key"), hashlib.sha256(der).hexdigest())


def issue_reader(pki: Pki, username: str, display_name: str, pin: str) -> Path:
    """A reader's PKCS#12 with signing key and chain, locked with `pin`. The common name is `display_name`."""
    path = pki.directory / "readers" / f"{_file_name(username)}.p12"
    if path.exists():
        return path
    path.parent.mkdir(mode=0o700, exist_ok=True)
    ca, ca_key = _load_ca(pki.directory, "report-ca")
    # RSA, because every PDF reader verifies it; 3072 bits stand for 128 bits of strength (NIST SP 800-57).
    key = rsa.generate_private_key(public_exponent=65537, key_size=3072)
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, _ORGANISATION),
            x509.NameAttribute(NameOID.COMMON_NAME, display_name),
            x509.NameAttribute(NameOID.USER_ID, username),
        ]
    )
    # Non-repudiation is what makes it a person's signature and not a machine's (RFC 5280, 4.2.1.3).
    usage = _key_usage(digital_signature=True, content_commitment=True)
    leaf = (
        _builder(subject, ca.subject, key, _LEAF_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(_authority(ca_key), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    locked = BestAvailableEncryption(pin.encode())
    _write_secret(path, pkcs12.serialize_key_and_certificates(username.encode(), key, leaf, [ca], locked))
    return path


def _file_name(name: str) -> str:
    """`name` as a file name. Raises ValueError for one that could leave its folder."""
    if not name or name.startswith(".") or not all(letter.isalnum() or letter in "._-" for letter in name):
        raise ValueError(f"{name!r}: only letters, digits, dot, dash and underscore")
    return name


def _alternative_names(hosts: Iterable[str]) -> list[x509.GeneralName]:
    found: list[x509.GeneralName] = []
    for host in sorted(hosts):
        try:
            found.append(x509.IPAddress(ip_address(host)))
        except ValueError:
            found.append(x509.DNSName(host))
    return found


def _needs_issue(path: Path, names: Sequence[x509.GeneralName]) -> bool:
    """Whether a certificate is missing, about to expire, or lacks one of the names."""
    if not path.exists():
        return True
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    if certificate.not_valid_after_utc < datetime.now(UTC) + timedelta(days=_RENEW_DAYS):
        return True
    if not names:
        return False
    present = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return not set(names) <= set(present)


def _key_usage(*, digital_signature: bool = False, content_commitment: bool = False, ca: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=content_commitment,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


def _authority(ca_key: _SigningKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())


def _builder(subject: x509.Name, issuer: x509.Name, key: _SigningKey, days: int) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # A day back: a county's clock may be behind the centre's.
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _ensure_ca(directory: Path, stem: str, common_name: str) -> None:
    if (directory / f"{stem}.pem").exists():
        return
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, _ORGANISATION),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )
    certificate = (
        _builder(name, name, key, _CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(ca=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    _write_pair(directory, stem, key, [certificate])


def _load_ca(directory: Path, stem: str) -> tuple[x509.Certificate, _SigningKey]:
    certificate = x509.load_pem_x509_certificate((directory / f"{stem}.pem").read_bytes())
    key = load_pem_private_key((directory / f"{stem}.key").read_bytes(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise ValueError(f"{stem}.key is neither an elliptic curve nor an RSA key")
    return certificate, key


def _issue(
    directory: Path,
    ca_stem: str,
    stem: str,
    common_name: str,
    purpose: x509.ObjectIdentifier,
    names: Sequence[x509.GeneralName],
) -> None:
    """A TLS certificate for one purpose: a gateway's may not stand for the server."""
    ca, ca_key = _load_ca(directory, ca_stem)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    builder = (
        _builder(subject, ca.subject, key, _LEAF_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(_authority(ca_key), critical=False)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    _write_pair(directory, stem, key, [builder.sign(ca_key, hashes.SHA256()), ca])


def _write_pair(directory: Path, stem: str, key: _SigningKey, chain: Sequence[x509.Certificate]) -> None:
    """Key first: a certificate that is there has its key beside it."""
    _write_secret(directory / f"{stem}.key", key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    pem = b"".join(certificate.public_bytes(Encoding.PEM) for certificate in chain)
    (directory / f"{stem}.pem").write_bytes(pem)


def _write_secret(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_bytes(content)
