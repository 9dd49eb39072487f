"""Which representation a client gets: Accept negotiation of DICOMweb (PS3.18 8.7, RFC 9110 12.5.1). Pure.

Quoting is read liberally: OHIF sends `type=application/octet-stream` without the quotes that RFC 2046 wants.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from storage.dicomweb.errors import NotAcceptableError

DICOM_JSON = "application/dicom+json"
DICOM = "application/dicom"
OCTET_STREAM = "application/octet-stream"
PDF = "application/pdf"

EXPLICIT_VR_LITTLE_ENDIAN = "1.2.840.10008.1.2.1"

# PS3.18 Table 8.7.3-2 and following: what a compressed frame may be called besides application/octet-stream.
IMAGE_MEDIA_TYPES = {
    "1.2.840.10008.1.2.4.50": "image/jpeg",
    "1.2.840.10008.1.2.4.51": "image/jpeg",
    "1.2.840.10008.1.2.4.57": "image/jpeg",
    "1.2.840.10008.1.2.4.70": "image/jpeg",
    "1.2.840.10008.1.2.4.80": "image/jls",
    "1.2.840.10008.1.2.4.81": "image/jls",
    "1.2.840.10008.1.2.4.90": "image/jp2",
    "1.2.840.10008.1.2.4.91": "image/jp2",
    "1.2.840.10008.1.2.4.92": "image/jpx",
    "1.2.840.10008.1.2.4.93": "image/jpx",
    "1.2.840.10008.1.2.4.110": "image/jxl",
    "1.2.840.10008.1.2.4.111": "image/jxl",
    "1.2.840.10008.1.2.4.112": "image/jxl",
    "1.2.840.10008.1.2.4.201": "image/jphc",
    "1.2.840.10008.1.2.4.202": "image/jphc",
    "1.2.840.10008.1.2.4.203": "image/jphc",
    "1.2.840.10008.1.2.5": "image/dicom-rle",
}


@dataclass(frozen=True, slots=True)
class Representation:
    """One way a resource can be sent."""

    media_type: str
    transfer_syntax_uid: str = ""  # "" where the bytes have none (JSON, PDF)
    multipart: bool = False  # inside multipart/related, or the body itself
    needs_transfer_syntax: bool = False  # only for a client that names the transfer syntax, or `*`

    @property
    def part_content_type(self) -> str:
        """Content-Type of a part. The viewer picks its decoder by the `transfer-syntax` parameter."""
        suffix = f"; transfer-syntax={self.transfer_syntax_uid}" if self.transfer_syntax_uid else ""
        return self.media_type + suffix

    def __str__(self) -> str:
        if not self.multipart:
            return self.part_content_type
        suffix = f"; transfer-syntax={self.transfer_syntax_uid}" if self.transfer_syntax_uid else ""
        return f'multipart/related; type="{self.media_type}"{suffix}'


@dataclass(frozen=True, slots=True)
class MediaRange:
    """One element of an Accept header, lower case, quotes off."""

    media_type: str
    quality: float = 1.0
    parameters: dict[str, str] = field(default_factory=dict)

    def accepts(self, offer: Representation) -> bool:
        """Whether this range takes that representation."""
        if self.media_type == "*/*":
            return True
        if self.media_type == "multipart/related":
            return (
                offer.multipart
                and _covers(self.parameters.get("type", "*/*"), offer.media_type)
                and self._takes_syntax(offer)
            )
        return not offer.multipart and _covers(self.media_type, offer.media_type) and self._takes_syntax(offer)

    def _takes_syntax(self, offer: Representation) -> bool:
        wanted = self.parameters.get("transfer-syntax", "")
        if not wanted:
            return not offer.needs_transfer_syntax
        return wanted == "*" or not offer.transfer_syntax_uid or wanted == offer.transfer_syntax_uid


def _covers(media_range: str, media_type: str) -> bool:
    kind, _, rest = media_range.partition("/")
    if kind == "*":
        return True
    return media_range == media_type or (rest == "*" and media_type.startswith(kind + "/"))


def _split(text: str, separator: str) -> list[str]:
    """Split at a separator that is not inside a quoted string."""
    parts: list[str] = [""]
    quoted = False
    for character in text:
        if character == '"':
            quoted = not quoted
        if character == separator and not quoted:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def parse_accept(header: str) -> list[MediaRange]:
    """The ranges of an Accept header, best first; an empty header takes anything."""
    ranges: list[MediaRange] = []
    for element in _split(header or "*/*", ","):
        media_type, *pairs = _split(element, ";")
        parameters: dict[str, str] = {}
        for pair in pairs:
            name, _, value = pair.partition("=")
            parameters[name.strip().lower()] = value.strip().strip('"').lower()
        try:
            quality = float(parameters.pop("q", "1"))
        except ValueError:
            quality = 0.0
        if media_type == "*":  # some HTTP clients (Java's) shorten */*
            media_type = "*/*"
        ranges.append(MediaRange(media_type.lower(), quality, parameters))
    return sorted((r for r in ranges if r.quality > 0), key=lambda r: -r.quality)


def negotiate(header: str, offers: Sequence[Representation]) -> Representation:
    """The representation to send: the client's preference first, then the order of `offers`.

    Raises NotAcceptableError, which lists all offers.
    """
    for media_range in parse_accept(header):
        for offer in offers:
            if media_range.accepts(offer):
                return offer
    raise NotAcceptableError("Available here: " + ", ".join(str(offer) for offer in offers))


def json_offers() -> tuple[Representation, ...]:
    """Query results and metadata."""
    return Representation(DICOM_JSON), Representation("application/json")


def dicom_offers(transfer_syntax_uid: str, *, single: bool) -> tuple[Representation, ...]:
    """Part 10 retrieval. Only the transfer syntax as received is on offer: what is archived is what is given back."""
    multipart = Representation(DICOM, transfer_syntax_uid, multipart=True)
    return (multipart, Representation(DICOM, transfer_syntax_uid)) if single else (multipart,)


def frame_offers(transfer_syntax_uid: str, *, native: bool, single: bool) -> tuple[Representation, ...]:
    """Frames as they lie in the archive. A native frame is Explicit VR Little Endian, PS3.18's default.

    A compressed one goes as application/octet-stream only to a client that names its transfer syntax (or `*`), for by
    default that media type means uncompressed.
    """
    if native:
        kinds = [(OCTET_STREAM, False)]
    else:
        kinds = [(OCTET_STREAM, True)]
        if image := IMAGE_MEDIA_TYPES.get(transfer_syntax_uid):
            kinds.append((image, False))
    offers = [Representation(kind, transfer_syntax_uid, True, strict) for kind, strict in kinds]
    if single:
        offers += [Representation(kind, transfer_syntax_uid, False, strict) for kind, strict in kinds]
    return tuple(offers)


def bulk_offers(media_type: str) -> tuple[Representation, ...]:
    """Bulk data: raw first, for a viewer's fetch() with `*/*` reads the body itself."""
    kinds = [media_type] if media_type == OCTET_STREAM else [media_type, OCTET_STREAM]
    return tuple(Representation(kind, multipart=multipart) for multipart in (False, True) for kind in kinds)
