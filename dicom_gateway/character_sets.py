"""Which character set the text of a data set really is in, whatever it was labelled (PS3.3 C.12.1.1.2).

Chinese modalities send GB18030 or GBK under the label ISO_IR 100 or under none, and UTF-8 under either. All text of
one data set is evidence together: a label that the bytes do not bear out is replaced, and the one that was used is
named. The centre then reads by that name; decoding itself is the same code on both sides (storage/character_sets.py).

The bytes themselves are never changed: this is only how they are read.
"""

import codecs
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from storage.character_sets import DEFAULT, declared_codec, decode

GB18030 = "GB18030"
UTF_8 = "ISO_IR 192"

_HIGH_RUN = re.compile(rb"[\x80-\xff]+")
_NOT_ASCII = re.compile(r"[^\x00-\x7f]+")


@dataclass(frozen=True)
class TextReading:
    """How the text of one data set is to be read."""

    codec: str
    repaired: str = ""  # Specific Character Set that was used instead of the label; empty: the label holds

    def read(self, value: bytes) -> str:
        """Text without control characters and without the padding around it; what cannot be read becomes U+FFFD."""
        text = decode(value, self.codec)
        return "".join(c for c in text if unicodedata.category(c) not in ("Cc", "Cs")).strip()


def choose(specific_character_set: str, values: Sequence[bytes]) -> TextReading:
    """How to read these values, given their label. Never raises: some reading is always possible."""
    declared = declared_codec(specific_character_set.split("\\"))
    high = [value for value in values if not value.isascii() and b"\x1b" not in value]
    if not high:
        return TextReading(declared or DEFAULT)
    utf_8, gb = _all_decoded(high, "utf_8"), _all_decoded(high, "gb18030")
    if declared in (None, DEFAULT, "latin_1"):
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
