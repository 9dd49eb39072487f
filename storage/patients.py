"""Whether two sets of facts are one patient's: the rule of gateway and centre for one Study Instance UID (design §4.8).

Where they may not be, the answer is no: two studies are kept apart and a person decides (PS3.3 C.7.1.1). Pure.
"""

import re
import unicodedata
from typing import Protocol

_DATE = re.compile(r"(?!0000)[0-9]{8}")
_NAME_SEPARATORS = re.compile(r"[\s^.,_'·-]+")


class PatientFacts(Protocol):
    """What is known of a patient, decoded: a study's row at the centre, or StudyFacts."""

    @property
    def patient_id(self) -> str: ...
    @property
    def issuer_of_patient_id(self) -> str: ...
    @property
    def patient_name(self) -> str: ...
    @property
    def patient_birth_date(self) -> str: ...
    @property
    def patient_sex(self) -> str: ...


def same_patient(one: PatientFacts, other: PatientFacts) -> bool:
    """Whether both are one patient. The Patient ID has to agree, and birth date and sex where both are known.

    A Patient ID that names nobody (empty, or noughts) leaves the name to decide; with an ID the name counts for
    nothing, for names are written in many ways.
    """
    if not same_patient_id(one, other) or contradicting_demographics(one, other.patient_birth_date, other.patient_sex):
        return False
    return names_somebody(one.patient_id) or same_name(one.patient_name, other.patient_name)


def may_be_same_patient(one: PatientFacts, other: PatientFacts) -> bool:
    """As `same_patient`, but that a name which `other` does not say is no difference."""
    if same_patient(one, other):
        return True
    unnamed = not other.patient_name and same_patient_id(one, other)
    return unnamed and not contradicting_demographics(one, other.patient_birth_date, other.patient_sex)


def same_patient_id(one: PatientFacts, other: PatientFacts) -> bool:
    """Whether the Patient IDs agree. Issuers count only where both are known: modalities often leave them out, while
    the objects that a RIS adds to the same study have them."""
    mine, theirs = one.issuer_of_patient_id.strip(), other.issuer_of_patient_id.strip()
    return one.patient_id.strip() == other.patient_id.strip() and (not mine or not theirs or mine == theirs)


def contradicting_demographics(one: PatientFacts, patient_birth_date: str, patient_sex: str) -> str:
    """The attribute that speaks against this being the patient, or "". `O` as a sex says nothing (PS3.3 C.7.1.1:
    other), nor does a birth date that is none."""
    mine, theirs = one.patient_birth_date.strip(), patient_birth_date.strip()
    if _DATE.fullmatch(mine) and _DATE.fullmatch(theirs) and mine != theirs:
        return "patient_birth_date"
    if {one.patient_sex.strip().upper(), patient_sex.strip().upper()} == {"M", "F"}:
        return "patient_sex"
    return ""


def names_somebody(patient_id: str) -> bool:
    """Whether a Patient ID tells patients apart; modalities fill in noughts where none was typed."""
    return patient_id.strip().strip("0") not in {"", "-"}


def same_name(one: str, other: str) -> bool:
    """Whether two decoded person names (PN, PS3.5 6.2.1) are written alike: each component group that both have
    agrees, or all that the one has are in the other, wherever they stand (modalities put ideographs first). Case, width
    and separators are no difference. Two empty names are alike: nothing speaks against it."""
    groups, others = _name_groups(one), _name_groups(other)
    if not groups or not others:
        return not groups and not others
    fewer, more = sorted((set(groups.values()), set(others.values())), key=len)
    shared = groups.keys() & others.keys()
    return fewer <= more or (bool(shared) and all(groups[place] == others[place] for place in shared))


def _name_groups(name: str) -> dict[int, str]:
    """Component groups by their place (0 alphabetic, 1 ideographic, 2 phonetic), normalised, without empty ones."""
    groups = unicodedata.normalize("NFKC", name).casefold().split("=")
    plain = (_NAME_SEPARATORS.sub("", group) for group in groups)
    return {place: group for place, group in enumerate(plain) if group}
