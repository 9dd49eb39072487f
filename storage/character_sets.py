"""Bytes of text elements to Unicode, never failing: what cannot be read becomes U+FFFD (PS3.5 6.1, PS3.3 C.12.1.1.2).

Used by gateway and centre, which must read one name alike: a difference would hold the study. Decoding comes before
splitting on backslash, caret and equals sign: 0x5C is the second byte of 118 characters of GBK. Senders misspell the
defined terms, leave escape sequences out and put bytes above 127 where none may be; each is read as it was meant.
"""

import re
from collections.abc import Sequence

ASCII, GB18030, UTF_8 = "ascii", "gb18030", "utf_8"
DEFAULT = ASCII
"""ISO_IR 6, where there is no Specific Character Set."""

_CODEC_OF_NUMBER = {
    6: ASCII, 13: "shift_jis", 58: GB18030, 87: ASCII, 100: "latin_1", 101: "iso8859_2", 109: "iso8859_3",
    110: "iso8859_4", 126: "iso8859_7", 127: "iso8859_6", 138: "iso8859_8", 144: "iso8859_5", 148: "iso8859_9",
    149: "euc_kr", 159: ASCII, 166: "tis_620", 192: UTF_8, 203: "iso8859_15",
}  # fmt: skip
"""ISO registration number to codec, for bytes outside escape sequences (PS3.3 Tables C.12-2 to C.12-5)."""

_CODEC_OF_ESCAPE = {
    b"(B": ASCII, b"(J": "shift_jis", b")I": "shift_jis", b"-A": "latin_1", b"-B": "iso8859_2", b"-C": "iso8859_3",
    b"-D": "iso8859_4", b"-F": "iso8859_7", b"-G": "iso8859_6", b"-H": "iso8859_8", b"-L": "iso8859_5",
    b"-M": "iso8859_9", b"-T": "tis_620", b"-b": "iso8859_15", b"$B": "iso2022_jp", b"$(D": "iso2022_jp_2",
    b"$)C": "euc_kr", b"$)A": GB18030,
}  # fmt: skip
"""What follows ESC, to codec (PS3.3 Tables C.12-3 and C.12-4)."""

_SEVEN_BIT = frozenset({"iso2022_jp", "iso2022_jp_2"})
"""Codecs that want to see their escape sequence. Their bytes below 128 are halves of characters, not delimiters."""

_NUMBERED = re.compile(r"(?:ISO[ _-]*(?:2022)?[ _-]*(?:IR)?|IR)[ _-]*(\d+)$")
_DELIMITER = re.compile(rb"[\\^=\r\n\t\f]")


def codec_of_term(written: str) -> str | None:
    """Codec of one defined term, from what senders write (`GB 18030`, `ISO-IR 100`, `UTF-8`); None if it is none."""
    term = written.strip(" \0").upper()
    if "GB" in term:  # GB18030, GBK, GB2312, ISO 2022 GBK: each inside the next, and GB18030 holds all
        return GB18030
    if "UTF" in term or term == "UNICODE":
        return UTF_8
    numbered = _NUMBERED.search(term)
    return _CODEC_OF_NUMBER.get(int(numbered[1])) if numbered else None


def declared_codec(terms: Sequence[str]) -> str | None:
    """Codec for bytes outside escape sequences, by the values of (0008,0005); None if they say nothing known.

    The first value rules (PS3.3 C.12.1.1.2). But where it is ASCII and GB 2312 comes by escapes (PS3.5 K.2), bytes
    above 127 outside them are GB 2312 whose sender left the escapes out.
    """
    first = codec_of_term(terms[0]) if terms else None
    if first in (None, ASCII) and any(codec_of_term(term) == GB18030 for term in terms[1:]):
        return GB18030
    return first


def decode(value: bytes, codec: str) -> str:
    """Text of one element; escape sequences in it change over between character sets (PS3.5 6.1.2.5)."""
    plain, *escaped = value.split(b"\x1b")
    return _plain(plain, codec) + "".join(_fragment(part, codec) for part in escaped)


def _plain(value: bytes, codec: str) -> str:
    """ISO_IR 6 allows no byte above 127; where one is there all the same, Latin-1 shows something."""
    return value.decode("latin_1" if codec == ASCII else codec, "replace")


def _fragment(part: bytes, first: str) -> str:
    """Text between two escape characters; `part` begins with the rest of the sequence."""
    escape = next((known for known in _CODEC_OF_ESCAPE if part.startswith(known)), None)
    if escape is None:  # not one of DICOM's: only the control character itself is dropped
        return _plain(part, first)
    codec = _CODEC_OF_ESCAPE[escape]
    if codec in _SEVEN_BIT:
        return (b"\x1b" + part).decode(codec, "replace")
    text = part[len(escape) :]
    # PS3.5 6.1.2.5.3: after a delimiter the first character set is active again. Where that is ASCII, bytes above 127
    # have no meaning in it, so there the sequence holds on: its sender forgot to repeat it.
    end = None if first == ASCII else _DELIMITER.search(text)
    if end is None:
        return _plain(text, codec)
    return _plain(text[: end.start()], codec) + _plain(text[end.start() :], first)
