"""Facts about a study that models ask for, from the archive's rows or from a data set's own attributes."""

import re
from datetime import date

from pydicom.dataset import Dataset

_AGE = re.compile(r"^(\d{3})([DWMY])$")  # PS3.5 6.2: AS
_DAYS_PER_YEAR = 365.25
_YEARS_PER_UNIT = {"D": 1 / _DAYS_PER_YEAR, "W": 7 / _DAYS_PER_YEAR, "M": 1 / 12, "Y": 1.0}
_LATERAL = {"LATERAL", "LAT", "LL", "RL", "LLD", "RLD", "LLO", "RLO"}
_TELLING = ("SeriesDescription", "ProtocolName", "AcquisitionDeviceProcessingDescription")
_WORDS = re.compile(r"[A-Z]+")


def _date(text: str) -> date | None:
    try:
        return date(int(text[:4]), int(text[4:6]), int(text[6:8])) if len(text) >= 8 else None
    except ValueError:
        return None


def age_years(patient_age: str, birth_date: str, study_date: str) -> float | None:
    """Age at the study: Patient's Age (0010,1010) if it is well formed, else birth to study date, else None."""
    if match := _AGE.match(patient_age.strip().upper()):
        return int(match[1]) * _YEARS_PER_UNIT[match[2]]
    born, studied = _date(birth_date.strip()), _date(study_date.strip())
    if born is None or studied is None or studied < born:
        return None
    return (studied - born).days / _DAYS_PER_YEAR


def view_of(dataset: Dataset) -> str:
    """`AP`, `PA`, `LATERAL`, another View Position (0018,5101), or "" where the view is stated nowhere.

    Where View Position is empty, as many CR readers leave it, the words of the descriptions are asked.
    """
    stated = str(dataset.get("ViewPosition") or "").strip().upper()
    if stated:
        return "LATERAL" if stated in _LATERAL else stated
    text = " ".join(str(dataset.get(keyword) or "") for keyword in _TELLING).upper()
    words = set(_WORDS.findall(text))
    if words & _LATERAL or "侧位" in text:
        return "LATERAL"
    for view, chinese in (("PA", "后前位"), ("AP", "前后位")):
        if view in words or chinese in text:
            return view
    return ""


def body_part_of(dataset: Dataset) -> str:
    """Body Part Examined (0018,0015), upper case; "" if not stated."""
    return str(dataset.get("BodyPartExamined") or "").strip().upper()
