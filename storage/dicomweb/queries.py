"""QIDO-RS: a query string to a statement, and its rows to DICOM JSON (PS3.18 10.6).

Which attributes can be matched and returned from rows is one table per level. Every value is a bound parameter. An
attribute that is asked for and is in no row comes from the sidecar of one instance (`Answer.missing`).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Any

import sqlalchemy as sa
from pydicom.datadict import keyword_for_tag, tag_for_keyword
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Session

from storage.dicomweb.errors import BadRequestError
from storage.dicomweb.library import Scope
from storage.dicomweb.metadata import with_visible_text
from storage.rows import Instance, Series, Site, Study

MAX_RESULTS = 5000
MAX_VALUE_CHARACTERS = 1024
_MAX_PARAMETERS = 100


class Level(IntEnum):
    """What a query returns; a level can be matched by its own attributes and those above it."""

    STUDY = 0
    SERIES = 1
    INSTANCE = 2


class Matching(Enum):
    """How a value is compared (PS3.4 C.2.2.2)."""

    UID_LIST = "list of UID"
    RANGE = "single value or range"
    TEXT = "single value or wild card, any case"
    NAME = "any component group of a person name"
    CODE = "single value, list or wild card"
    ANY_OF = "element of an array"
    NUMBER = "single number"
    NONE = "returned only"


@dataclass(frozen=True)
class Attribute:
    """One attribute that rows can answer."""

    tag: str
    vr: str
    matching: Matching
    column: sa.ColumnElement[Any]


_PATIENT_ID = Site.code + ":" + Study.patient_id  # as storage.dicomweb.library.public_patient_id

ATTRIBUTES: dict[Level, tuple[Attribute, ...]] = {
    Level.STUDY: (
        Attribute("00080020", "DA", Matching.RANGE, Study.study_date.expression),
        Attribute("00080030", "TM", Matching.RANGE, Study.study_time.expression),
        Attribute("00080050", "SH", Matching.TEXT, Study.accession_number.expression),
        Attribute("00080061", "CS", Matching.ANY_OF, Study.modalities.expression),
        Attribute("00081030", "LO", Matching.TEXT, Study.study_description.expression),
        Attribute("00100010", "PN", Matching.NAME, Study.patient_name.expression),
        Attribute("00100020", "LO", Matching.TEXT, _PATIENT_ID),
        Attribute("00100030", "DA", Matching.RANGE, Study.patient_birth_date.expression),
        Attribute("00100040", "CS", Matching.CODE, Study.patient_sex.expression),
        Attribute("0020000D", "UI", Matching.UID_LIST, Study.study_instance_uid.expression),
        Attribute("00201206", "IS", Matching.NONE, Study.series_count.expression),
        Attribute("00201208", "IS", Matching.NONE, Study.instance_count.expression),
    ),
    Level.SERIES: (
        Attribute("00080021", "DA", Matching.RANGE, Series.series_date.expression),
        Attribute("00080031", "TM", Matching.RANGE, Series.series_time.expression),
        Attribute("00080060", "CS", Matching.CODE, Series.modality.expression),
        Attribute("0008103E", "LO", Matching.TEXT, Series.series_description.expression),
        Attribute("00180015", "CS", Matching.CODE, Series.body_part_examined.expression),
        Attribute("0020000E", "UI", Matching.UID_LIST, Series.series_instance_uid.expression),
        Attribute("00200011", "IS", Matching.NUMBER, Series.series_number.expression),
        Attribute("00201209", "IS", Matching.NONE, Series.instance_count.expression),
    ),
    Level.INSTANCE: (
        Attribute("00080016", "UI", Matching.UID_LIST, Instance.sop_class_uid.expression),
        Attribute("00080018", "UI", Matching.UID_LIST, Instance.sop_instance_uid.expression),
        Attribute("00200013", "IS", Matching.NUMBER, Instance.instance_number.expression),
        Attribute("00280008", "IS", Matching.NUMBER, Instance.number_of_frames.expression),
    ),
}
_UID_TAG = {Level.STUDY: "0020000D", Level.SERIES: "0020000E", Level.INSTANCE: "00080018"}
# PS3.18 Table 10.6.3-5: always part of an instance's answer; they are in no row.
_INSTANCE_DEFAULTS = frozenset({"00280010", "00280011", "00280100"})


@dataclass(frozen=True)
class Query:
    """A parsed query string."""

    matches: tuple[tuple[Attribute, str], ...] = ()
    include: frozenset[str] = frozenset()
    include_all: bool = False
    limit: int = MAX_RESULTS
    offset: int = 0
    not_supported: tuple[str, ...] = ()  # parameters that were passed over


@dataclass(frozen=True)
class Answer:
    """One result: what rows know, and what a sidecar has to add."""

    content: dict[str, Any]
    study_instance_uid: str
    series_instance_uid: str | None
    sop_instance_uid: str | None


def tag_of(name: str) -> str | None:
    """Tag, eight hexadecimal digits upper case, of a keyword or tag as a query names it; None if it is neither."""
    if len(name) == 8 and all(c in "0123456789abcdefABCDEF" for c in name):
        return name.upper()
    tag = tag_for_keyword(name)
    return None if tag is None else f"{tag:08X}"


def parse(level: Level, parameters: Iterable[tuple[str, str]]) -> Query:
    """Read a query string's pairs. Raises BadRequestError; what is known to DICOM and not to us is passed over."""
    known = {attribute.tag: attribute for upto in Level if upto <= level for attribute in ATTRIBUTES[upto]}
    matches: list[tuple[Attribute, str]] = []
    include: set[str] = set()
    include_all = False
    numbers = {"limit": MAX_RESULTS, "offset": 0}
    passed_over: list[str] = []
    for count, (name, value) in enumerate(parameters):
        if count >= _MAX_PARAMETERS or len(value) > MAX_VALUE_CHARACTERS or "\0" in value:
            raise BadRequestError("The query is too long, or has a value that is no text")
        if name in numbers:
            numbers[name] = _number(name, value)
        elif name == "fuzzymatching":
            if value.lower() == "true":
                passed_over.append(name)
        elif name == "includefield":
            include_all |= "all" in value.split(",")
            include.update(tag for part in value.split(",") if (tag := tag_of(part)) is not None)
        elif (attribute := known.get(tag_of(name) or "")) is not None and attribute.matching is not Matching.NONE:
            if value not in ("", "*"):  # PS3.4 C.2.2.2.3: universal matching
                matches.append((attribute, value))
        else:
            passed_over.append(_printable(name))
    return Query(
        tuple(matches),
        frozenset(include),
        include_all,
        min(numbers["limit"], MAX_RESULTS),
        numbers["offset"],
        tuple(passed_over),
    )


def _printable(name: str) -> str:
    """A parameter's name for a Warning header: the DICOM keyword if it is one, else nothing of what was sent."""
    tag = tag_of(name.rpartition(".")[2])
    return keyword_for_tag(int(tag, 16)) or tag if tag is not None else "unknown"


def _number(name: str, value: str) -> int:
    if not (value.isascii() and value.isdigit()) or len(value) > 9:
        raise BadRequestError(f"{name} is not a whole number")
    return int(value)


def _like(value: str) -> str:
    """DICOM wild cards to SQL's, with SQL's own made plain."""
    plain = value.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
    return plain.replace("*", "%").replace("?", "_")


def _condition(attribute: Attribute, value: str) -> sa.ColumnElement[bool]:
    column = attribute.column
    values = [part for part in value.replace("\\", ",").split(",") if part]
    match attribute.matching:
        case Matching.UID_LIST:
            return column.in_(values)
        case Matching.ANY_OF:
            return column.op("&&")(sa.cast(sa.literal(values, ARRAY(sa.Text)), ARRAY(sa.Text)))
        case Matching.CODE if len(values) > 1:
            return column.in_(values)
        case Matching.NUMBER:
            return column == _number(attribute.tag, value)
        case Matching.RANGE:
            first, dash, last = value.partition("-")
            if not dash:
                return column == value
            bounds = [column != ""]
            if first:
                bounds.append(column >= first)
            if last:
                bounds.append(sa.func.left(column, len(last)) <= last)  # 1700 takes in 170030.5, as PS3.4 C.2.2.2.5
            return sa.and_(*bounds)
        case Matching.NAME:  # whole, or one of Alphabetic=Ideographic=Phonetic
            return ("=" + column + "=").ilike(f"%={_like(value)}=%", escape="\\")
        case _:
            return column.ilike(_like(value), escape="\\")


def run(
    session: Session,
    scope: Scope,
    level: Level,
    query: Query,
    study_instance_uid: str | None = None,
    series_instance_uid: str | None = None,
) -> list[Answer]:
    """Results in the scope, under that study and series if they are given, in a stable order."""
    levels = [upto for upto in Level if upto <= level]
    # A parent's attributes belong to the answer where the address does not name that parent (PS3.18 10.6.3.3).
    named = {Level.STUDY: study_instance_uid, Level.SERIES: series_instance_uid, Level.INSTANCE: None}
    attributes = [
        a
        for upto in levels
        for a in ATTRIBUTES[upto]
        if upto == level or not named[upto] or a.tag in query.include or a.tag == _UID_TAG[upto]
    ]
    statement = sa.select(*(a.column.label(f"t{a.tag}") for a in attributes)).select_from(Study)
    statement = statement.join(Site, Site.site_id == Study.site_id).where(Study.id.in_(scope.study_ids))
    order: list[Any] = [Study.study_date.desc(), Study.id]
    if level >= Level.SERIES:
        # A series of variants alone would be one without an instance.
        statement = statement.join(Series, Series.study_id == Study.id).where(Series.instance_count > 0)
        order += [Series.series_number, Series.id]
    if level >= Level.INSTANCE:
        statement = statement.join(Instance, Instance.series_id == Series.id).where(Instance.is_variant.is_(False))
        order += [Instance.instance_number, Instance.id]
    if study_instance_uid:
        statement = statement.where(Study.study_instance_uid == study_instance_uid)
    if series_instance_uid:
        statement = statement.where(Series.series_instance_uid == series_instance_uid)
    for attribute, value in query.matches:
        statement = statement.where(_condition(attribute, value))
    statement = statement.order_by(*order).limit(query.limit).offset(query.offset)
    return [_answer(scope, level, attributes, row) for row in session.execute(statement)]


def missing(level: Level, answer: Answer, query: Query, metadata: dict[str, Any]) -> dict[str, Any]:
    """What of an instance's metadata (as shown) the query asks for and the rows did not answer."""
    asked = query.include | (_INSTANCE_DEFAULTS if level is Level.INSTANCE else frozenset())
    return {
        tag: element
        for tag, element in metadata.items()
        if tag not in answer.content and (tag in asked or (query.include_all and level is Level.INSTANCE))
    }


def wants_more(level: Level, query: Query) -> bool:
    """Whether `missing` may find anything, so that a sidecar has to be read."""
    known = {attribute.tag for upto in Level if upto <= level for attribute in ATTRIBUTES[upto]}
    return level is Level.INSTANCE or bool(query.include - known)


def _answer(scope: Scope, level: Level, attributes: list[Attribute], row: sa.Row[Any]) -> Answer:
    content: dict[str, Any] = {
        "00080005": {"vr": "CS", "Value": ["ISO_IR 192"]},
        "00080056": {"vr": "CS", "Value": ["ONLINE"]},
    }
    uids: dict[str, str] = {}
    for attribute, value in zip(attributes, row, strict=True):
        if attribute.vr == "UI":
            uids[attribute.tag] = value
        if attribute.tag == "00280008" and not value:
            continue  # not an image
        content[attribute.tag] = with_visible_text(_element(attribute.vr, value))
    study = uids["0020000D"]
    series = uids.get("0020000E")
    instance = uids.get("00080018")
    url = f"{scope.root}/studies/{study}"
    if series is not None:
        url += f"/series/{series}"
    if instance is not None:
        url += f"/instances/{instance}"
    content["00081190"] = {"vr": "UR", "Value": [url]}
    return Answer(dict(sorted(content.items())), study, series, instance)


def _element(vr: str, value: Any) -> dict[str, Any]:
    if value is None or value in ("", []):
        return {"vr": vr}
    if vr == "PN":
        groups = zip(("Alphabetic", "Ideographic", "Phonetic"), value.split("="), strict=False)
        return {"vr": vr, "Value": [{name: group for name, group in groups if group}]}
    return {"vr": vr, "Value": value if isinstance(value, list) else [value]}
