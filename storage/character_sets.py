"""Bytes of text elements to Unicode, never failing: what cannot be decoded becomes U+FFFD (PS3.3 C.12.1.1.2).

Decoding comes before splitting on backslash, caret and equals sign: 0x5C is the second byte of 118 characters of GBK.
"""

import re
from collections.abc import Sequence

from pydicom.charset import CODES_TO_ENCODINGS, python_encoding

_NUMBERED = re.compile(r"(ISO[ _-]*2022)?[ _-]*IR[ _-]*(\d+)$")
_ESCAPED = re.compile(rb"(?=\x1b)")
_STATEFUL = frozenset({"iso2022_jp", "iso2022_jp_2", "iso_ir_58"})
"""Codecs that read the escape sequence themselves; before the others it is cut off."""
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
    if b"\x1b" not in value:
        return value.decode(first, "replace")
    # PS3.5 6.1.2.5.3: the first character set is active again after each of these.
    parts = re.split(rb"([\\^=\r\n\t\f])", value) if first not in ("GB18030", "UTF8") else [value]
    return "".join(_fragments(part, first) for part in parts)


def _fragments(value: bytes, first: str) -> str:
    text = []
    for fragment in _ESCAPED.split(value):
        if not fragment.startswith(b"\x1b"):
            text.append(fragment.decode(first, "replace"))
            continue
        length = 4 if fragment.startswith((b"\x1b$(", b"\x1b$)")) else 3
        codec = CODES_TO_ENCODINGS.get(fragment[:length], first)
        if codec not in _STATEFUL:
            fragment = fragment[length:]  # noqa: PLW2901 - Python's codec does not know the escape sequence
        text.append(fragment.decode("latin_1" if codec == "iso8859" else codec, "replace"))
    return "".join(text)
