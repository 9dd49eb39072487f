"""Patient text as Unicode, whatever it was labelled (PS3.5 6.1, PS3.3 C.12.1.1.2).

Chinese modalities send GB18030 or GBK under the label ISO_IR 100 or under none, and UTF-8 under either. All text of
one data set is evidence together: a label that the bytes do not bear out is replaced, and the one that was used is
named. Decoding comes before any splitting on `^`, `=` or `\\`: a second byte of GBK may be 0x5C or 0x5E.

The bytes themselves are never changed: this is only how they are read.
"""

import codecs
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

GB18030 = "GB18030"
UTF_8 = "ISO_IR 192"

_CODEC_OF_NUMBER = {
    6: "ascii", 13: "shift_jis", 58: "gb18030", 87: "ascii", 100: "latin_1", 101: "iso8859_2", 109: "iso8859_3",
    110: "iso8859_4", 126: "iso8859_7", 127: "iso8859_6", 138: "iso8859_8", 144: "iso8859_5", 148: "iso8859_9",
    149: "euc_kr", 159: "ascii", 166: "tis_620", 192: "utf_8", 203: "iso8859_15",
}  # fmt: skip
"""ISO registration number to codec, for bytes outside escape sequences (PS3.3 Tables C.12-2 to C.12-5)."""

_CODEC_OF_ESCAPE: dict[bytes, tuple[str, bool]] = {
    b"(B": ("ascii", False), b"(J": ("shift_jis", False), b")I": ("shift_jis", False),
    b"-A": ("latin_1", False), b"-B": ("iso8859_2", False), b"-C": ("iso8859_3", False), b"-D": ("iso8859_4", False),
    b"-F": ("iso8859_7", False), b"-G": ("iso8859_6", False), b"-H": ("iso8859_8", False), b"-L": ("iso8859_5", False),
    b"-M": ("iso8859_9", False), b"-T": ("tis_620", False), b"-b": ("iso8859_15", False),
    b"$B": ("iso2022_jp", True), b"$(D": ("iso2022_jp_2", True),
    b"$)C": ("euc_kr", False), b"$)A": ("gb18030", False),
}  # fmt: skip
"""Escape sequence to (codec, whether the codec wants to see the escape) (PS3.3 Tables C.12-3 and C.12-4)."""

_NUMBERED = re.compile(r"ISO[ _-]*(?:2022)?[ _-]*(?:IR)?[ _-]*(\d+)$")
_HIGH_RUN = re.compile(rb"[\x80-\xff]+")
_NOT_ASCII = re.compile(r"[^\x00-\x7f]+")


@dataclass(frozen=True)
class TextReading:
    """How the text of one data set is to be read."""

    codec: str
    repaired: str = ""  # Specific Character Set that was used instead of the label; empty: the label holds

    def read(self, value: bytes) -> str:
        """Text without control characters and without the padding around it; what cannot be read becomes U+FFFD."""
        text = _with_escapes(value, self.codec) if b"\x1b" in value else value.decode(self.codec, "replace")
        return "".join(c for c in text if unicodedata.category(c) not in ("Cc", "Cs")).strip()


def _with_escapes(value: bytes, codec: str) -> str:
    """PS3.5 6.1.2.5: an escape sequence holds until the next one."""
    first, *others = value.split(b"\x1b")
    text = first.decode(codec, "replace")
    for part in others:
        escape = next((known for known in _CODEC_OF_ESCAPE if part.startswith(known)), None)
        if escape is None:
            text += part.decode(codec, "replace")
        else:
            used, sees_escape = _CODEC_OF_ESCAPE[escape]
            body = b"\x1b" + part if sees_escape else part[len(escape) :]
            text += body.decode(used, "replace")
    return text


def declared_codec(specific_character_set: str) -> str | None:
    """Codec of the first value of (0008,0005); None if it is empty or no term that is known, however spelled."""
    term = specific_character_set.split("\\", maxsplit=1)[0].strip(" \0").upper()
    numbered = _NUMBERED.search(term)
    if numbered:
        return _CODEC_OF_NUMBER.get(int(numbered[1]))
    if "GB" in term:  # GB18030, GBK, GB2312, ISO 2022 GBK: each inside the next, and GB18030 holds all
        return "gb18030"
    return "utf_8" if term in ("UTF-8", "UTF8", "UNICODE") else None


def _others(specific_character_set: str) -> list[str]:
    return specific_character_set.split("\\")[1:]


def choose(specific_character_set: str, values: Sequence[bytes]) -> TextReading:
    """How to read these values, given their label. Never raises: some reading is always possible."""
    declared = declared_codec(specific_character_set)
    if declared in (None, "ascii") and any(
        declared_codec(term) == "gb18030" for term in _others(specific_character_set)
    ):
        declared = "gb18030"  # `\ISO 2022 IR 58`: ASCII, and Chinese by escapes (PS3.5 K.2), which some leave out
    high = [value for value in values if not value.isascii() and b"\x1b" not in value]
    if not high:
        return TextReading(declared or "ascii")
    utf_8, gb = _all_decoded(high, "utf_8"), _all_decoded(high, "gb18030")
    if declared in (None, "ascii", "latin_1"):
        return _unlabelled(declared, high, utf_8, gb)
    if declared == "gb18030":
        if utf_8 is not None and _weight(utf_8) > _weight(gb or ""):
            return TextReading("utf_8", UTF_8)
        return TextReading("gb18030")
    if declared == "utf_8" and utf_8 is not None and not _weight(utf_8) and _weight(gb or "") >= 2:
        # Two bytes of GBK are often two bytes of UTF-8 as well; then they spell a jumble of scripts.
        return TextReading("utf_8") if _is_one_script(utf_8) else TextReading("gb18030", GB18030)
    if _all_decoded(high, declared) is not None:
        return TextReading(declared)
    if utf_8 is not None:
        return TextReading("utf_8", UTF_8)
    return TextReading("gb18030", GB18030) if gb is not None else TextReading(declared)


def _unlabelled(declared: str | None, high: list[bytes], utf_8: str | None, gb: str | None) -> TextReading:
    """No label, or the one that stands for none: let the bytes say what they are."""
    # Text that is valid UTF-8 by chance is rare, so UTF-8 gets one step of weight ahead of GB18030.
    if utf_8 is not None and (_is_one_script(utf_8) or (_weight(utf_8) and _weight(utf_8) + 1 > _weight(gb or ""))):
        return TextReading("utf_8", UTF_8)
    if gb is not None and _weight(gb) >= 1 and not all(_is_latin(value) for value in high):
        return TextReading("gb18030", GB18030)
    if utf_8 is not None:  # accented letters in UTF-8: as Latin-1 they would be pairs like "Ã¼"
        return TextReading("utf_8", UTF_8)
    return TextReading("latin_1", "" if declared == "latin_1" else "ISO_IR 100")


def _all_decoded(values: list[bytes], codec: str) -> str | None:
    """All values, or None if one is not valid; a character cut off at the end by a length limit is forgiven."""
    try:
        return "".join(codecs.getincrementaldecoder(codec)("strict").decode(value) for value in values)
    except UnicodeDecodeError:
        return None


def _weight(text: str) -> float:
    """How Chinese the characters beyond ASCII look: 3 is all common hanzi, 0 none."""
    weights = [_character_weight(character) for character in text if not character.isascii()]
    return sum(weights) / len(weights) if weights else 0.0


def _character_weight(character: str) -> int:
    try:
        lead = character.encode("gb2312")[0]
    except UnicodeEncodeError:
        pass
    else:  # GB 2312 rows: 1 and 3 punctuation and full width, 16 to 55 common hanzi, 56 to 87 the others
        return 3 if 0xB0 <= lead <= 0xD7 else 2 if lead >= 0xD8 or lead in (0xA1, 0xA3) else 0
    try:
        if 0xA4 <= character.encode("big5")[0] <= 0xC6:  # common traditional hanzi
            return 2
    except UnicodeEncodeError:
        pass
    return 1 if unicodedata.name(character, "").startswith("CJK UNIFIED IDEOGRAPH") else 0


def _is_one_script(text: str) -> bool:
    """Whether what is not ASCII spells words of one alphabet: accented letters among plain ones, or all of another."""
    scripts = {unicodedata.name(c, "?").split()[0] for c in text if not c.isascii() and c.isalpha()}
    if scripts == {"LATIN"}:
        runs = list(_NOT_ASCII.finditer(text))
        return all(
            len(run[0]) <= 2 and (text[: run.start()][-1:].isalpha() or text[run.end() :][:1].isalpha()) for run in runs
        )
    return len(scripts) == 1 and not scripts & {"CJK", "?"} and len(_NOT_ASCII.findall(text)[0]) >= 3


def _is_latin(value: bytes) -> bool:
    """Whether every run of high bytes looks like accented letters or signs in a word of Latin script."""
    for run in _HIGH_RUN.finditer(value):
        before, after = value[: run.start()][-1:], value[run.end() :][:1]
        letters = all(byte >= 0xC0 and byte not in (0xD7, 0xF7) for byte in run[0])
        if len(run[0]) == 1:
            if letters:
                fits = before.isalpha() or after.isalpha()
            elif run[0][0] >= 0xA0:  # a sign: 30°, 5 µl
                fits = before.isalnum() or after.isalpha()
            else:  # C1 of ISO 8859, a quotation mark of Windows-1252
                fits = before.isalpha() and after.isalpha()
        else:
            begins_a_word = 0xC0 <= run[0][0] <= 0xDE and run[0][1] >= 0xDF  # a capital, then a small letter
            fits = len(run[0]) == 2 and letters and after.isalpha() and (before.isalpha() or begins_a_word)
        if not fits:
            return False
    return True
