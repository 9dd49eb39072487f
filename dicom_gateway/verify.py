"""Does a report carry good signatures? PAdES (ETSI EN 319 142-1), checked by pyHanko against the report CA.

Lives with the gateway, because the county must be able to say so itself; the centre uses the same function. Hostile
bytes never raise here: what cannot be parsed is simply not intact.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO

from asn1crypto import cms, pem, x509
from asn1crypto.parser import peek
from pyhanko.pdf_utils.misc import PdfError
from pyhanko.pdf_utils.reader import PdfFileReader
from pyhanko.sign.general import SigningError
from pyhanko.sign.validation import validate_pdf_signature
from pyhanko.sign.validation.errors import SignatureValidationError
from pyhanko.sign.validation.pdf_embedded import EmbeddedPdfSignature
from pyhanko.sign.validation.status import SignatureCoverageLevel
from pyhanko_certvalidator import ValidationContext

from storage.errors import ConfigurationError, SignatureInvalidError

# What pyHanko and asn1crypto raise for damaged input, beside their own errors.
_DAMAGED = (
    PdfError,
    SigningError,
    SignatureValidationError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    OverflowError,
    RecursionError,
    NotImplementedError,
)


@dataclass(frozen=True, slots=True)
class Signature:
    """One signature of a document."""

    field: str  # Author, Reviewer
    intact: bool  # the signed bytes are those that were signed, and later revisions only added signatures
    trusted: bool  # the chain ends at the report CA, the certificate is a person's (non-repudiation) and was valid
    signer: str  # common name
    signed_at: datetime | None  # as the signer's clock said (signature dictionary, M)
    covers_whole_document: bool


@dataclass(frozen=True, slots=True)
class SignatureReport:
    """All signatures of a document, in the order they were made; `problem` in words if any is not good."""

    signatures: tuple[Signature, ...]
    problem: str = ""

    @property
    def intact(self) -> bool:
        """Every signature's bytes are unchanged, and there is at least one."""
        return bool(self.signatures) and all(s.intact for s in self.signatures)

    @property
    def trusted(self) -> bool:
        """Every signer's chain ends at the report CA."""
        return bool(self.signatures) and all(s.trusted for s in self.signatures)

    @property
    def covers_whole_document(self) -> bool:
        """The last signature covers every byte of the file."""
        return bool(self.signatures) and self.signatures[-1].covers_whole_document

    @property
    def signer(self) -> str:
        """Who signed last."""
        return self.signatures[-1].signer if self.signatures else ""

    @property
    def signed_at(self) -> datetime | None:
        """When the last signature was made."""
        return self.signatures[-1].signed_at if self.signatures else None

    @property
    def valid(self) -> bool:
        """Intact, trusted, and nothing outside the last signature."""
        return self.intact and self.trusted and self.covers_whole_document and not self.problem


def _roots(ca_pem: bytes) -> list[x509.Certificate]:
    try:
        found = [x509.Certificate.load(der) for _, _, der in pem.unarmor(ca_pem, multiple=True)]
    except ValueError as error:
        raise ConfigurationError("The report CA is not a PEM certificate") from error
    return found


def _is_plain(embedded: EmbeddedPdfSignature) -> bool:
    """Whether the CMS says nothing in the places that no signature covers (RFC 5652 5.1, 5.3).

    Versions follow from how the signer is named, the list of digests from the signer's own, and what is left of the
    reserved room is zero: then every byte of the file is accounted for.
    """
    contents = bytes(embedded.pkcs7_content)
    claimed = contents[: peek(contents)]
    message = cms.ContentInfo.load(claimed, strict=True)
    signed_data = message["content"]
    (signer,) = signed_data["signer_infos"]
    version = "v1" if signer["sid"].name == "issuer_and_serial_number" else "v3"
    digest = signer["digest_algorithm"]
    return (
        not contents[len(claimed) :].strip(b"\0")
        and message.dump(force=True) == claimed  # DER: no other lengths, nothing between the parts
        and (signed_data["version"].native, signer["version"].native) == (version, version)
        and [item.dump() for item in signed_data["digest_algorithms"]] == [digest.dump()]
        and digest["parameters"].native is None
    )


def _examine(embedded: EmbeddedPdfSignature, roots: list[x509.Certificate], moment: datetime) -> Signature:
    # Nothing is fetched: a county reaches the centre and nothing else. Revocation comes with the CA (design §8).
    context = ValidationContext(trust_roots=roots, allow_fetching=False, moment=moment)
    status = validate_pdf_signature(embedded, context)
    certificate = embedded.signer_cert
    return Signature(
        field=str(embedded.field_name),
        # Within what was signed nothing changed, and what was added later is signatures only.
        intact=bool(status.intact and status.valid and status.docmdp_ok is not False and _is_plain(embedded)),
        trusted=bool(status.trusted),
        signer=str(certificate.subject.native.get("common_name", "")),
        signed_at=status.signer_reported_dt,
        covers_whole_document=status.coverage == SignatureCoverageLevel.ENTIRE_FILE,
    )


def verify_pdf(pdf: bytes, ca_pem: bytes, *, moment: datetime | None = None) -> SignatureReport:
    """Check every signature of `pdf` against the CA certificates in `ca_pem`, as of `moment` (default: now).

    Raises ConfigurationError if `ca_pem` holds no certificate; never for what stands in `pdf`.
    """
    roots = _roots(ca_pem)
    signatures: list[Signature] = []
    try:
        reader = PdfFileReader(BytesIO(pdf))
        for embedded in reader.embedded_signatures:
            signatures.append(_examine(embedded, roots, moment or datetime.now(UTC)))
    except _DAMAGED as error:
        return SignatureReport(tuple(signatures), f"Not a readable signed PDF ({type(error).__name__})")
    report = SignatureReport(tuple(signatures))
    return SignatureReport(report.signatures, _problem(report))


def _problem(report: SignatureReport) -> str:
    if not report.signatures:
        return "The document is not signed"
    if not report.intact:
        return "The document was changed after it was signed"
    if not report.trusted:
        return "The signer's certificate does not lead to the report CA, or was not valid"
    if not report.covers_whole_document:
        return "Something was added after the last signature"
    return ""


def require_valid(pdf: bytes, ca_pem: bytes) -> SignatureReport:
    """The report of a validly signed `pdf`. Raises SignatureInvalidError, with the reason, for any other."""
    report = verify_pdf(pdf, ca_pem)
    if not report.valid:
        raise SignatureInvalidError(report.problem)
    return report
