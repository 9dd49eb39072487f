"""Text as it will be printed: what cannot be seen or set is made visible before anything is signed.

A signature covers what a person saw. So bidirectional controls, which reorder what is seen, other control characters,
and characters without a glyph in the report fonts are shown as their code point, `[U+202E]`; nothing becomes an empty
box, and nothing that carries meaning vanishes. Characters that carry no ink and no order are dropped.
"""

import re
import unicodedata
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from fontTools.ttLib import TTFont

from storage.errors import ConfigurationError
from storage.visible import code_point

_INKLESS = frozenset("\u00ad\u034f\u200b\u200c\u200d\u2060\ufeff")
"""Soft hyphen, joiners and zero-width spaces: neither ink nor order."""
_VARIATION_SELECTORS = frozenset([*map(chr, range(0xFE00, 0xFE10)), *map(chr, range(0xE0100, 0xE01F0))])
"""Ask for a variant of a glyph (UTS #37); the base character is what remains, as Unicode foresees."""
_RIGHT_TO_LEFT = frozenset({"R", "AL", "AN"})
_LINE_BREAKS = re.compile(r"\r\n|[\r\n\v\f\x85\u2028\u2029]")
_TAB = "    "


@cache
def covered_characters(fonts_dir: Path) -> frozenset[int]:
    """Code points that some font in the folder can set; typst tries them all, in the template's order.

    Raises ConfigurationError if there is no font: `yuanzhen assets` brings them.
    """
    paths = sorted(path for path in fonts_dir.glob("*") if path.suffix.lower() in {".otf", ".ttf"})
    if not paths:
        raise ConfigurationError(f"No report fonts (*.otf, *.ttf) in {fonts_dir}")
    covered: set[int] = set()
    for path in paths:
        with TTFont(path, lazy=True) as font:
            covered.update(font.getBestCmap())
    return frozenset(covered)


def _shown(character: str, covered: frozenset[int]) -> str:
    if character in _INKLESS or character in _VARIATION_SELECTORS:
        return ""
    if character == "\t":
        return _TAB
    # Cc control, Cf format (all bidirectional controls), Cs lone surrogate; Co and Cn only if a font knows them.
    if unicodedata.category(character) in {"Cc", "Cf", "Cs"} or ord(character) not in covered:
        return code_point(character)
    # A symbol font has single letters of right-to-left scripts: unjoined, and they would reorder their neighbours.
    return code_point(character) if unicodedata.bidirectional(character) in _RIGHT_TO_LEFT else character


@cache
def _unbreakable(longest: int) -> re.Pattern[str]:
    return re.compile(rf"[!-~\u00a1-\u024f]{{{longest + 1},}}")


def printable(text: str, covered: frozenset[int], longest: int = 40) -> str:
    """One line of text as it will be printed; line breaks become spaces.

    A run of more than `longest` Latin characters may break anywhere (zero-width spaces): it stays on the page.
    """
    shown = "".join(_shown(c, covered) for c in _LINE_BREAKS.sub(" ", text)).strip()
    return _unbreakable(longest).sub(lambda match: "\u200b".join(match.group()), shown)


def printable_lines(text: str, covered: frozenset[int]) -> list[str]:
    """A text of many lines as they will be printed: leading blanks kept as no-break spaces, empty ends dropped."""
    lines = []
    for line in _LINE_BREAKS.split(text):
        expanded = line.replace("\t", _TAB)
        indent = len(expanded) - len(expanded.lstrip(" "))
        lines.append("\u00a0" * min(indent, 24) + printable(expanded, covered))
    while lines and not lines[-1].strip():
        lines.pop()
    while lines and not lines[0].strip():
        lines.pop(0)
    return [line if line.strip() else "" for line in lines]


def unprintable(texts: Iterable[str], covered: frozenset[int]) -> list[str]:
    """The characters that will be shown as code points, in order of first appearance: to warn before signing."""
    seen: dict[str, None] = {}
    for text in texts:
        for character in _LINE_BREAKS.sub(" ", text):
            if len(_shown(character, covered)) > 1 and character != "\t":
                seen[character] = None
    return list(seen)
