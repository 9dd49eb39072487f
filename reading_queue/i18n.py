"""The pages' words in Chinese and English, and how times, ages and names are written.

Texts are data: `texts/<module>.toml`, one table a key with `zh` and `en`; a template says `t(…)` with `module.key`.
A missing text stops whoever asks for it, and a test asks for all of them.
"""

import tomllib
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Literal
from zoneinfo import ZoneInfo

from fastapi import Request

from storage.errors import ConfigurationError

Language = Literal["zh", "en"]
LANGUAGES: tuple[Language, ...] = ("zh", "en")
LANGUAGE_COOKIE = "yuanzhen_language"
_DIRECTORY = Path(__file__).resolve().parent / "texts"
_AGE_UNITS = {  # PS3.5 Table 6.2-1, AS: nnnD, nnnW, nnnM, nnnY
    "D": ("天", " d"),
    "W": ("周", " wk"),
    "M": ("个月", " mo"),
    "Y": ("岁", " y"),
}


@cache
def texts() -> dict[str, dict[Language, str]]:
    """Every text by `module.key`. Raises ConfigurationError naming the file and key that lacks a language."""
    found: dict[str, dict[Language, str]] = {}
    for path in sorted(_DIRECTORY.glob("*.toml")):
        for key, pair in tomllib.loads(path.read_text("utf-8")).items():
            if not isinstance(pair, dict) or not all(pair.get(language) for language in LANGUAGES):
                raise ConfigurationError(f"{path.name}: [{key}] needs `zh` and `en`")
            found[f"{path.stem}.{key}"] = {language: str(pair[language]) for language in LANGUAGES}
    return found


def t(key: str, language: Language, **values: object) -> str:
    """The text of a key, with `{name}` places filled. Raises KeyError for an unknown key."""
    return texts()[key][language].format(**values) if values else texts()[key][language]


def language_of(request: Request) -> Language:
    """The remembered choice, else the browser's first of ours (RFC 9110 12.5.4, by its q values), else Chinese."""
    chosen = request.cookies.get(LANGUAGE_COOKIE)
    for language in LANGUAGES:
        if chosen == language:
            return language
    best: tuple[float, Language] = (0.0, "zh")
    for part in request.headers.get("accept-language", "")[:256].split(","):
        tag, _, weight = part.strip().partition(";q=")
        try:
            quality = float(weight) if weight else 1.0
        except ValueError:
            continue
        for language in LANGUAGES:
            if tag.lower().split("-")[0] == language and quality > best[0]:
                best = (quality, language)
    return best[1]


def local_minute(moment: datetime | None, time_zone: str) -> str:
    """`2026-11-23 14:05` in the centre's zone; "" for None."""
    return "" if moment is None else f"{moment.astimezone(ZoneInfo(time_zone)):%Y-%m-%d %H:%M}"


def local_second(moment: datetime, time_zone: str) -> str:
    """`2026-11-23 14:05:09.250` in the centre's zone: a timeline needs what lies within a second."""
    local = moment.astimezone(ZoneInfo(time_zone))
    return f"{local:%Y-%m-%d %H:%M:%S}.{local.microsecond // 1000:03d}"


def event_name(name: str, language: Language) -> str:
    """An event's name in words; a name that has none yet as it is."""
    pair = texts().get(f"events.{name.replace('.', '_')}")
    return pair[language] if pair else name


def local_clock(moment: datetime | None, time_zone: str) -> str:
    """`14:05`, or `11-22 14:05` when that is not today, in the centre's zone; "" for None."""
    if moment is None:
        return ""
    local = moment.astimezone(ZoneInfo(time_zone))
    today = datetime.now(UTC).astimezone(ZoneInfo(time_zone)).date()
    return f"{local:%H:%M}" if local.date() == today else f"{local:%m-%d %H:%M}"


def duration(seconds: float | None) -> str:
    """A length of time for a table: `0.3 s`, `18 s`, `3:05` (minutes), `2 h 05`, `3 d 04 h`; a dash for None."""
    if seconds is None:
        return "–"
    if abs(seconds) < 9.95:
        return f"{seconds:.1f} s".replace("-", "−")
    whole = timedelta(seconds=round(abs(seconds)))
    sign = "−" if seconds <= -0.5 else ""
    total = int(whole.total_seconds())
    if total < 60:
        return f"{sign}{total} s"
    if total < 3600:
        return f"{sign}{total // 60}:{total % 60:02d}"
    if total < 86400:
        return f"{sign}{total // 3600} h {total % 3600 // 60:02d}"
    return f"{sign}{total // 86400} d {total % 86400 // 3600:02d} h"


def probability(value: float) -> str:
    """A model's probability to two digits; never `1.00` or `0.00`, for no model is certain."""
    if value >= 0.995:
        return ">0.99"
    return "<0.01" if value < 0.005 else f"{value:.2f}"


def age(value: str, language: Language) -> str:
    """A DICOM age string for reading: 004Y is `4岁` or `4 y`; anything else as sent."""
    number, unit = value[:-1], value[-1:]
    if not number.isdecimal() or unit not in _AGE_UNITS:
        return value
    return f"{int(number)}{_AGE_UNITS[unit][LANGUAGES.index(language)]}"


def dicom_date_time(date: str, time: str) -> str:
    """DA and TM for reading: `2026-11-23 14:05`; as sent when they are not what PS3.5 6.2 says."""
    shown = f"{date[:4]}-{date[4:6]}-{date[6:]}" if len(date) == 8 and date.isdecimal() else date
    if len(time) >= 4 and time[:4].isdecimal():
        return f"{shown} {time[:2]}:{time[2:4]}".strip()
    return shown
