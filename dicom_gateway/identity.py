"""What a data set says of itself: the UIDs that name it and the facts that the centre shows (StudyFacts).

Only a few top-level elements are read, by offset; the rest of the data set is not interpreted in the county.
"""

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone, tzinfo

from dicom_gateway.character_sets import choose
from storage.dataset import DEFLATED_SYNTAXES, Data, inflate, top_level_values
from storage.errors import MalformedDataSetError
from storage.vocabulary import Priority
from storage.wire import StudyFacts

_TAGS = {
    "SpecificCharacterSet": 0x00080005,
    "SOPClassUID": 0x00080016,
    "SOPInstanceUID": 0x00080018,
    "StudyDate": 0x00080020,
    "AcquisitionDate": 0x00080022,
    "ContentDate": 0x00080023,
    "AcquisitionDateTime": 0x0008002A,
    "StudyTime": 0x00080030,
    "AcquisitionTime": 0x00080032,
    "ContentTime": 0x00080033,
    "AccessionNumber": 0x00080050,
    "TimezoneOffsetFromUTC": 0x00080201,
    "StudyDescription": 0x00081030,
    "AdmittingDiagnosesDescription": 0x00081080,
    "PatientName": 0x00100010,
    "PatientID": 0x00100020,
    "IssuerOfPatientID": 0x00100021,
    "PatientBirthDate": 0x00100030,
    "PatientSex": 0x00100040,
    "PatientAge": 0x00101010,
    "StudyInstanceUID": 0x0020000D,
    "SeriesInstanceUID": 0x0020000E,
    "StudyPriorityID": 0x0032000C,
    "ReasonForStudy": 0x00321030,
    "ReasonForTheRequestedProcedure": 0x00401002,
    "RequestedProcedurePriority": 0x00401003,
}
_KEYWORD_OF = {tag: keyword for keyword, tag in _TAGS.items()}
_TEXT = frozenset({
    "AccessionNumber", "StudyDescription", "AdmittingDiagnosesDescription", "PatientName", "PatientID",
    "IssuerOfPatientID", "ReasonForStudy", "ReasonForTheRequestedProcedure",
})  # fmt: skip
"""VRs LO, LT, PN, SH: those that Specific Character Set governs (PS3.5 6.1.2.3)."""

_UID = re.compile(r"(?=.{1,64}\Z)[0-9]+(\.[0-9]+)*")  # PS3.5 9.1, but components with leading zeros are out there
_PRIORITY = {"STAT": Priority.STAT, "HIGH": Priority.URGENT}
"""Requested Procedure Priority (PS3.3 C.4.11: STAT, HIGH, ROUTINE, MEDIUM, LOW), Study Priority ID (HIGH, MED, LOW)."""
_LONGEST_IDENTIFIER = {"PatientID": 256, "IssuerOfPatientID": 256, "AccessionNumber": 64}
_OFFSET = re.compile(r"([+-])(\d{2})(\d{2})")


@dataclass(frozen=True)
class Identity:
    """Names of an instance, and what it says of its study."""

    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str
    study: StudyFacts


def identify(
    data: Data,
    transfer_syntax_uid: str,
    *,
    calling_ae_title: str,
    called_ae_title: str,
    received_at: datetime,
    zone: tzinfo,
) -> Identity:
    """Read a data set's identity; times in it that name no zone are in `zone`. Raises MalformedDataSetError where a UID
    is missing or is none, or an identifier is too long to be carried whole. An absent patient name, ID or date is fine
    (type 2)."""
    if transfer_syntax_uid in DEFLATED_SYNTAXES:
        data, transfer_syntax_uid = inflate(data), "1.2.840.10008.1.2.1"
    raw = {_KEYWORD_OF[tag]: value for tag, value in top_level_values(data, transfer_syntax_uid, _KEYWORD_OF).items()}
    character_set = _code(raw, "SpecificCharacterSet")
    reading = choose(character_set, [value for keyword, value in raw.items() if keyword in _TEXT])
    text = {keyword: reading.read(raw.get(keyword, b"")) for keyword in _TEXT}
    for keyword, longest in _LONGEST_IDENTIFIER.items():
        if len(text[keyword]) > longest:
            raise MalformedDataSetError(f"{keyword} is {len(text[keyword])} characters long, more than {longest}")
    study = StudyFacts(
        study_instance_uid=_uid(raw, "StudyInstanceUID"),
        patient_id=text["PatientID"],
        issuer_of_patient_id=text["IssuerOfPatientID"],
        patient_name=text["PatientName"].rstrip("^= ")[:512],
        patient_birth_date=_date(raw, "PatientBirthDate"),
        patient_sex=_code(raw, "PatientSex")[:16],
        patient_age=_matching(_code(raw, "PatientAge"), r"\d{3}[DWMY]"),
        accession_number=text["AccessionNumber"],
        study_date=_date(raw, "StudyDate"),
        study_time=_matching(_code(raw, "StudyTime"), r"[\d:.]{2,16}"),
        study_description=text["StudyDescription"][:256],
        specific_character_set=character_set[:128],
        repaired_character_set=reading.repaired,
        calling_ae_title=calling_ae_title,
        called_ae_title=called_ae_title,
        priority=_priority(raw),
        clinical_question=_first(
            text, "ReasonForTheRequestedProcedure", "ReasonForStudy", "AdmittingDiagnosesDescription"
        )[:2000],
        acquired_at=_acquired_at(raw, zone),
        first_received_at=received_at,
    )
    return Identity(
        sop_class_uid=_uid(raw, "SOPClassUID"),
        sop_instance_uid=_uid(raw, "SOPInstanceUID"),
        series_instance_uid=_uid(raw, "SeriesInstanceUID"),
        study=study,
    )


def _code(raw: dict[str, bytes], keyword: str) -> str:
    """A value of the default repertoire (CS, DA, TM, AS, UI), without padding; anything else in it is dropped."""
    return "".join(c for c in raw.get(keyword, b"").decode("ascii", "ignore") if c.isprintable()).strip()


def _uid(raw: dict[str, bytes], keyword: str) -> str:
    if keyword not in raw:
        raise MalformedDataSetError(f"{keyword} is missing")
    value = raw[keyword].strip(b" \0").decode("ascii", "replace")
    if not _UID.fullmatch(value):
        raise MalformedDataSetError(f"{keyword} is empty or is no UID")
    return value


def _matching(value: str, pattern: str) -> str:
    return value if re.fullmatch(pattern, value) else ""


def _date(raw: dict[str, bytes], keyword: str) -> str:
    """DA, also in the form with dots of ACR-NEMA (PS3.5 6.2 note)."""
    return _matching(_code(raw, keyword).replace(".", ""), r"\d{8}")


def _first(text: dict[str, str], *keywords: str) -> str:
    return next((text[keyword] for keyword in keywords if text[keyword]), "")


def _priority(raw: dict[str, bytes]) -> Priority:
    words = (_code(raw, "RequestedProcedurePriority").upper(), _code(raw, "StudyPriorityID").upper())
    return next((_PRIORITY[word] for word in words if word in _PRIORITY), Priority.ROUTINE)


def _acquired_at(raw: dict[str, bytes], local: tzinfo) -> datetime | None:
    """The modality's clock, as UTC. A DT may carry its offset; what carries none is in Timezone Offset From UTC
    (PS3.3 C.12.1.1.8), and where that is absent in `local`, never in the zone of the machine this runs on."""
    stamp = _code(raw, "AcquisitionDateTime")
    for prefix in ("Acquisition", "Content", "Study"):
        if not stamp and (date := _date(raw, f"{prefix}Date")) and (time := _code(raw, f"{prefix}Time")):
            stamp = date + time.replace(":", "")
    moment = re.fullmatch(r"(\d{8})(\d{2})(\d{2})(\d{2})?(?:\.(\d{1,6}))?([+-]\d{4})?", stamp)
    if moment is None:
        return None
    day, hour, minute, second, fraction, suffix = moment.groups()
    try:
        naive = datetime.strptime(day + hour + minute + (second or "00"), "%Y%m%d%H%M%S")
        naive = naive.replace(microsecond=int((fraction or "0").ljust(6, "0")))
        offset = _OFFSET.fullmatch(suffix or _code(raw, "TimezoneOffsetFromUTC"))
        if offset is not None:
            minutes = int(offset[2]) * 60 + int(offset[3])
            local = timezone(timedelta(minutes=-minutes if offset[1] == "-" else minutes))
        return naive.replace(tzinfo=local).astimezone(UTC)
    except (ValueError, OverflowError):
        return None
