"""Values of the DICOM JSON model (PS3.18 annex F) from raw bytes, one element at a time; no input makes it fail."""

import base64
import math
import struct
from typing import Any

from pydicom.datadict import dictionary_VR

from storage.character_sets import decode

ITEM = 0xFFFEE000
_CHARACTER_SET_VRS = frozenset({"LO", "LT", "PN", "SH", "ST", "UC", "UT"})  # PS3.5 6.1.2.2
_WHOLE_TEXT_VRS = frozenset({"LT", "ST", "UT", "UR"})  # a backslash is a character there (PS3.5 Table 6.2-1)
_ASCII_VRS = frozenset({"AE", "AS", "CS", "DA", "DS", "DT", "IS", "TM", "UI", "UR"})
TEXT_VRS = _CHARACTER_SET_VRS | _ASCII_VRS
_NUMBERS = {
    "FL": struct.Struct("f"),
    "FD": struct.Struct("d"),
    "SL": struct.Struct("i"),
    "SS": struct.Struct("h"),
    "SV": struct.Struct("q"),
    "UL": struct.Struct("I"),
    "US": struct.Struct("H"),
    "UV": struct.Struct("Q"),
}
_WORD_BYTES = {"OW": 2, "OF": 4, "OL": 4, "OD": 8, "OV": 8}
_BINARY_VRS = frozenset({"OB", "UN", *_WORD_BYTES})
_KNOWN_VRS = TEXT_VRS | _BINARY_VRS | frozenset(_NUMBERS) | {"AT", "SQ"}
_AMBIGUOUS = {"US or OW": "OW", "OB or OW": "OW", "US or SS or OW": "OW"}  # PS3.5 A.1, for implicit VR
_EXACT_JSON_INTEGER = 2**53
_MAX_DECIMAL = 16  # PS3.5 Table 6.2-1
_PN_GROUPS = ("Alphabetic", "Ideographic", "Phonetic")


def vr_of(tag: int, written: bytes, *, signed: bool) -> str:
    """VR of an element: as written, or the dictionary's for implicit VR and UN. `signed`: Pixel Representation is 1."""
    vr = written.decode("latin_1")
    if vr and vr != "UN":
        return vr if vr in _KNOWN_VRS else "UN"
    group, number = tag >> 16, tag & 0xFFFF
    if group & 1:
        return "LO" if 0x10 <= number <= 0xFF else "UN"  # PS3.5 7.8.1: private creators
    try:
        found = str(dictionary_VR(tag))
    except KeyError:
        return "UN"
    if found == "US or SS":
        return "SS" if signed else "US"
    return _AMBIGUOUS.get(found, found if found in _KNOWN_VRS else "UN")


def element(vr: str, raw: bytes, codec: str, *, big_endian: bool) -> dict[str, Any]:
    """One element of the JSON model: `vr` with `Value` or `InlineBinary`, or `vr` alone where it is empty."""
    if not raw:
        return {"vr": vr}
    if vr in TEXT_VRS:
        values = _texts(vr, raw, codec)
        return {"vr": vr, "Value": values} if any(v is not None for v in values) else {"vr": vr}
    values = _tags(raw, big_endian) if vr == "AT" else _numbers(vr, raw, big_endian)
    if values:
        return {"vr": vr, "Value": values}
    if vr not in _BINARY_VRS:
        vr = "UN"  # a number of half its bytes, a sequence that is none: shown as what it is, bytes
    if big_endian and (width := _WORD_BYTES.get(vr)) and len(raw) % width == 0:
        raw = b"".join(raw[at : at + width][::-1] for at in range(0, len(raw), width))  # PS3.18 F.2.7
    return {"vr": vr, "InlineBinary": base64.b64encode(raw).decode()}


def _texts(vr: str, raw: bytes, codec: str) -> list[Any]:
    text = decode(raw, codec) if vr in _CHARACTER_SET_VRS else raw.decode("latin_1")
    text = text.rstrip(" \0").replace("\0", "")
    if vr in _WHOLE_TEXT_VRS:
        return [text or None]
    return [_text(vr, part.strip()) for part in text.split("\\")]


def _text(vr: str, part: str) -> Any:
    if not part:
        return None
    if vr == "PN":
        groups = zip(_PN_GROUPS, part.split("=")[:3], strict=False)
        return {name: group for name, group in groups if group} or None
    if vr in ("DS", "IS"):
        return _decimal(vr, part)
    return part


def _decimal(vr: str, part: str) -> Any:
    """A number where it is one, the text as sent where it is not (PS3.18 F.2.3: DS and IS may be either)."""
    if "_" in part or len(part) > _MAX_DECIMAL:
        return part
    try:
        number = int(part) if vr == "IS" else float(part)
    except ValueError:
        return part
    return number if math.isfinite(number) else part


def _numbers(vr: str, raw: bytes, big_endian: bool) -> list[Any]:
    kind = _NUMBERS.get(vr)
    if kind is None or len(raw) % kind.size:
        return []
    return [
        _json_number(n) for n in struct.unpack(f"{'>' if big_endian else '<'}{len(raw) // kind.size}{kind.format}", raw)
    ]


def _json_number(number: float) -> float | str:
    """JSON has no NaN, and readers lose digits of integers above 2**53: both travel as text (PS3.18 F.2.3)."""
    if isinstance(number, float) and not math.isfinite(number):
        return "NaN" if math.isnan(number) else ("Infinity" if number > 0 else "-Infinity")
    return str(number) if isinstance(number, int) and abs(number) > _EXACT_JSON_INTEGER else number


def _tags(raw: bytes, big_endian: bool) -> list[Any]:
    if len(raw) % 4:
        return []
    halves = struct.unpack(f"{'>' if big_endian else '<'}{len(raw) // 2}H", raw)
    return [f"{group:04X}{number:04X}" for group, number in zip(halves[::2], halves[1::2], strict=True)]
