"""Bytes of text elements to Unicode, never failing: what cannot be decoded becomes U+FFFD (PS3.3 C.12.1.1.2).

Decoding comes before splitting on backslash, caret and equals sign: 0x5C is the second byte of 118 characters of GBK.
"""

import re
from collections.abc import Sequence

from pydicom.charset import CODES_TO_ENCODINGS, python_encoding

_NUMBERED = re.compile(r"(ISO[ _-]*2022)?[ _-]*IR[ _-]*(\d+)$")
_ESCAPED = re.compile(rb"(?=\x1b)")
_DELIMITER = re.compile(rb"[\\^=\r\n\t\f]")
_SEVEN_BIT = frozenset({"iso2022_jp", "iso2022_jp_2"})
DEFAULT = ("latin_1",)
"""ISO_IR 6 allows no byte above 127; where one is there all the same, Latin-1 shows something."""


def codecs_of(terms: Sequence[str]) -> tuple[str, ...]:
    """Python codecs for the values of Specific Character Set, however spelled; unknown ones count as the default."""
    names = tuple(python_encoding.get(_term(term), "") for term in terms)
    known = tuple("latin_1" if name in ("", "iso8859") else name for name in names)
    if known and not terms[0].strip() and "iso_ir_58" in known:
        return ("GB18030", *known[1:])  # PS3.5 K.2: ASCII first; senders that forget the escapes mean GB 2312 bytes
    return known or DEFAULT


def _term(written: str) -> str:
    """A defined term of PS3.3 C.12.1.1.2 from what senders write: `GB 18030`, `ISO-IR 100`, `UTF-8`."""
    term = written.strip(" \0").upper()
    if "GB" in term:
        return "GB18030"  # holds GBK and GB 2312
    if "UTF" in term:
        return "ISO_IR 192"
    numbered = _NUMBERED.search(term)
    return f"{'ISO 2022 IR' if numbered[1] else 'ISO_IR'} {numbered[2]}" if numbered else term


def decode(value: bytes, codecs: Sequence[str]) -> str:
    """Text of one element. With several codecs, escape sequences change over between them (PS3.5 6.1.2.5)."""
    first = codecs[0]
    plain, *escaped = _ESCAPED.split(value)
    return plain.decode(first, "replace") + "".join(_fragment(part, first) for part in escaped)


def _fragment(part: bytes, first: str) -> str:
    """Text from one escape sequence to the next."""
    length = 4 if part.startswith((b"\x1b$(", b"\x1b$)")) else 3
    codec = CODES_TO_ENCODINGS.get(part[:length], first)
    if codec in _SEVEN_BIT:  # no delimiters inside: the bytes of one may be half of a character
        return part.decode(codec, "replace")
    if codec == "iso8859":
        codec = "latin_1"
    text = part if codec == "iso_ir_58" else part[length:]  # Python's other codecs do not know the sequence
    # PS3.5 6.1.2.5.3: after each delimiter the first character set is active again.
    end = _DELIMITER.search(text, 0 if codec != "iso_ir_58" else length)
    if end is None:
        return text.decode(codec, "replace")
    return text[: end.start()].decode(codec, "replace") + text[end.start() :].decode(first, "replace")
