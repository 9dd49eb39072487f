"""Documents that repeat what code says must say the same. Left out: prose, which no test can read."""

import re
from pathlib import Path

from storage.states import Transition

ROOT = Path(__file__).resolve().parent.parent


def test_the_lifecycle_document_lists_every_transition_with_its_letter_and_sentence() -> None:
    text = (ROOT / "docs" / "lifecycle.md").read_text()
    listed = re.findall(r"^\| (\w) \| ([a-z_.]+) \| (.+?) \|$", text, flags=re.MULTILINE)
    assert listed == [(t.value.letter, t.event_name, t.value.sentence) for t in Transition]


def test_every_letter_of_the_lifecycle_is_used_once() -> None:
    letters = [t.value.letter for t in Transition]
    assert len(set(letters)) == len(letters)
