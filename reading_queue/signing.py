"""The reader's signature on a report: PAdES B-B (ETSI EN 319 142-1) with a visible stamp that keeps PDF/A.

`Signer` is a port, because who holds the key differs: here a PKCS#12 file that the reader's PIN opens; a token
(PKCS#11), or a hospital's SM2 service where the law asks for it, takes its place without a change elsewhere.
Where the site contract asks for two people, the author signs first and the reviewer signs the signed document: the
PDF keeps both (PS3.15 C.4 allows one Verifying Observer; the PDF is not bound by that).
"""

import unicodedata
from collections.abc import Mapping
from datetime import datetime
from io import BytesIO
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Protocol

from asn1crypto import keys as asn1_keys
from asn1crypto import x509 as asn1_x509
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, pkcs12
from cryptography.x509.oid import NameOID
from pyhanko.pdf_utils.incremental_writer import IncrementalPdfFileWriter
from pyhanko.pdf_utils.layout import AxisAlignment, SimpleBoxLayoutRule
from pyhanko.pdf_utils.misc import PdfError
from pyhanko.sign.fields import SigFieldSpec, SigSeedSubFilter
from pyhanko.sign.general import SigningError
from pyhanko.sign.signers import PdfSignatureMetadata, PdfSigner, SimpleSigner
from pyhanko.sign.signers.pdf_signer import PdfSigningSession
from pyhanko.stamp import StaticStampStyle
from pyhanko_certvalidator.registry import SimpleCertificateStore

from reading_queue.printable import covered_characters, printable
from reading_queue.report_pdf import SignatureBox, local_time, press_for
from storage.errors import PermanentError

_WHOLE_BOX = SimpleBoxLayoutRule(x_align=AxisAlignment.ALIGN_MID, y_align=AxisAlignment.ALIGN_MID)


class SigningFailedError(PermanentError):
    """Base: the report could not be signed. `reason` is for the reader."""


class WrongPinError(SigningFailedError):
    """The PIN does not open the reader's key."""


class CertificateExpiredError(SigningFailedError):
    """The reader's certificate had ended at the time of signing."""


class CertificateNotYetValidError(SigningFailedError):
    """The reader's certificate had not begun at the time of signing."""


class SignerNameMismatchError(SigningFailedError):
    """The certificate names another person than the one who signs."""


class AlreadySignedError(SigningFailedError):
    """The signature field is filled already."""


class Signer(Protocol):
    """Signs a PDF in the name of one person. One method, so that any holder of keys can be one."""

    def sign(self, pdf: bytes, *, field: str, name: str, at: datetime, box: SignatureBox) -> bytes:
        """The same PDF with one more signature, appended. Raises a SigningFailedError."""
        ...


class _TimedPdfSigner(PdfSigner):
    """Signs at the centre's clock's time, which is also on the page, instead of the process's."""

    def __init__(self, at: datetime, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._at = at

    def init_signing_session(self, *args: Any, **kwargs: Any) -> PdfSigningSession:
        session = super().init_signing_session(*args, **kwargs)
        session.system_time = self._at
        return session


class Pkcs12Signer:
    """A reader's PKCS#12 file (RFC 7292) and the PIN that opens it. Made for one signature and then forgotten."""

    def __init__(
        self, container: bytes, pin: str, *, fonts_dir: Path, language: str = "both", time_zone: str = "Asia/Shanghai"
    ) -> None:
        """Open the key. Raises WrongPinError, and SigningFailedError if the file holds no key and certificate."""
        try:
            key, certificate, chain = pkcs12.load_key_and_certificates(container, pin.encode())
        except ValueError as error:
            raise WrongPinError("The PIN does not open the signing key") from error
        if key is None or certificate is None:
            raise SigningFailedError("The signing file holds no key, or no certificate")
        self._certificate = certificate
        self._fonts_dir = fonts_dir
        self._language = language
        self._time_zone = time_zone
        registry = SimpleCertificateStore()  # type: ignore[no-untyped-call]
        registry.register_multiple([_asn1_certificate(c) for c in chain])
        self._signer = SimpleSigner(
            signing_cert=_asn1_certificate(certificate),
            signing_key=asn1_keys.PrivateKeyInfo.load(
                key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
            ),
            cert_registry=registry,
            # A CMS does not sign the certificates it carries; the CA's the verifier has, so it need not travel.
            embed_roots=False,
        )

    @property
    def common_name(self) -> str:
        """Whom the certificate names."""
        values = self._certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        return str(values[0].value) if values else ""

    def sign(self, pdf: bytes, *, field: str, name: str, at: datetime, box: SignatureBox) -> bytes:
        """The PDF with the signature `field` of `name`, made `at` (aware), shown in `box`.

        Runs its own event loop: call it from a worker thread, never from a coroutine. Raises
        CertificateExpiredError, CertificateNotYetValidError, SignerNameMismatchError, AlreadySignedError, or
        SigningFailedError for a document that cannot be signed.
        """
        self._check(name, at)
        metadata = PdfSignatureMetadata(
            field_name=field,
            name=name,
            subfilter=SigSeedSubFilter.PADES,
            md_algorithm="sha256",
            reason={"Author": "报告 Reported", "Reviewer": "审核 Verified"}.get(field),
        )
        corners = (round(box.x1), round(box.y1), round(box.x2), round(box.y2))
        spec = SigFieldSpec(field, on_page=box.page, box=corners)
        # pyHanko reads the stamp's page from a file by name.
        with NamedTemporaryFile(suffix=".pdf") as stamp:
            stamp.write(self._stamp(name, at, box))
            stamp.flush()
            style = StaticStampStyle.from_pdf_file(
                stamp.name, border_width=0, background_opacity=1, background_layout=_WHOLE_BOX
            )
            try:
                writer = IncrementalPdfFileWriter(BytesIO(pdf))
                signer = _TimedPdfSigner(at, metadata, self._signer, stamp_style=style, new_field_spec=spec)
                return bytes(signer.sign_pdf(writer).getvalue())
            except SigningError as error:
                if "already" in str(error) or "filled" in str(error):
                    raise AlreadySignedError(f"The signature {field} is there already") from error
                raise SigningFailedError(f"The document cannot be signed: {error}") from error
            except PdfError as error:
                raise SigningFailedError("The document is not a PDF that can be signed") from error

    def _check(self, name: str, at: datetime) -> None:
        if at < self._certificate.not_valid_before_utc:
            raise CertificateNotYetValidError(
                f"The certificate of {self.common_name} begins on {self._certificate.not_valid_before_utc:%Y-%m-%d}"
            )
        if at > self._certificate.not_valid_after_utc:
            raise CertificateExpiredError(
                f"The certificate of {self.common_name} ended on {self._certificate.not_valid_after_utc:%Y-%m-%d}"
            )
        if _comparable(name) != _comparable(self.common_name):
            raise SignerNameMismatchError(f"The certificate is {self.common_name}'s and not {name}'s")

    def _stamp(self, name: str, at: datetime, box: SignatureBox) -> bytes:
        covered = covered_characters(self._fonts_dir)
        words = {"zh": "电子签名", "en": "Digitally signed", "both": "电子签名 Digitally signed"}[self._language]
        document: Mapping[str, Any] = {
            "width": box.x2 - box.x1,
            "height": box.y2 - box.y1,
            "name": printable(name, covered),
            "time": local_time(at, self._time_zone),
            "words": f"{words} · PAdES",
        }
        return press_for("stamp.typ", self._fonts_dir).press("stamp", document, at)


def _asn1_certificate(certificate: x509.Certificate) -> asn1_x509.Certificate:
    return asn1_x509.Certificate.load(certificate.public_bytes(Encoding.DER))


def _comparable(name: str) -> str:
    """A name without differences that nobody sees: normal form, case, runs of blanks."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())
