"""An event's details and states in words, for the timeline: no names of columns, no lists as a program writes them.

Words are data (`texts/timeline.toml`); what has none is shown as it was written, so that nothing is left out.
"""

import re
from datetime import datetime
from typing import Any

from reading_queue.i18n import Language, local_second, texts

_MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)")  # RFC 3339, as events hold it
_FIXED = re.compile(r"[a-z][a-z_ ]{0,40}")
_BEFORE_AND_AFTER = frozenset({"tier", "due_at"})  # of a case that moved: [before, after]
_CHINESE = re.compile(r"[\u3400-\u9fff]")


def state_word(state: str, language: Language) -> str:
    """A state's name."""
    return _word("state", state, language) or state


def details_in_words(details: dict[str, Any], language: Language, time_zone: str) -> list[tuple[str, str]]:
    """(name, value) of every detail that says something; moments in the zone `time_zone`."""
    said = []
    for key, value in details.items():
        if value in (None, "", []):
            continue
        name = _word("key", key, language) or key.replace("_", " ")
        said.append((name, _value(key, value, language, time_zone)))
    return said


def _word(kind: str, name: str, language: Language) -> str:
    pair = texts().get(f"timeline.{kind}_{name.replace(' ', '_')}")
    return pair[language] if pair else ""


def _value(key: str, value: Any, language: Language, time_zone: str) -> str:
    if isinstance(value, list):
        between = " → " if key in _BEFORE_AND_AFTER else ", "
        return between.join(_value(key, one, language, time_zone) for one in value)
    if isinstance(value, dict):
        pairs = details_in_words(value, language, time_zone)
        return ", ".join(f"{name} {said}" for name, said in pairs)
    if not isinstance(value, str):
        return str(value)
    if _MOMENT.fullmatch(value):
        return local_second(datetime.fromisoformat(value), time_zone).removesuffix(".000")
    if _FIXED.fullmatch(value) and (word := _word("value", value, language)):
        return word
    chinese, slash, english = value.partition(" / ")  # a reason written in both languages
    if slash and _CHINESE.search(chinese) and not _CHINESE.search(english):
        return chinese if language == "zh" else english
    return value
