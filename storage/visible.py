"""Text from a data set or a person, made safe to look at: what reorders or hides is shown as its code point.

A reader checks a patient by eye and then signs. A bidirectional control (UAX #9) in a name or an ID makes the eye read
another one, `[U+202E]` does not. Everything that is shown to a person goes through here: pages, problem details, DICOM
JSON for the viewer. What is stored, compared or sent on is never changed.
"""

import unicodedata

_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Control, format (all bidirectional controls are there), lone surrogate, line and paragraph separator."""
_LAYOUT = frozenset("\n\t")


def code_point(character: str) -> str:
    """`[U+202E]` for the right-to-left override."""
    return f"[U+{ord(character):04X}]"


def visible(text: str) -> str:
    """The text with each hidden character as its code point; line feeds, tabs and CR LF (as LF) stay. Idempotent."""
    if text.isprintable():
        return text
    return "".join(
        code_point(character) if character not in _LAYOUT and unicodedata.category(character) in _HIDDEN else character
        for character in text.replace("\r\n", "\n")
    )
