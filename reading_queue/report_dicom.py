"""The signed report as DICOM, going home: an Encapsulated PDF (PS3.3 A.45.1) and a Basic Text SR (A.35.1, TID 2000).

Both carry the county's own identity of patient and study, in the character set its PACS reads. Their UIDs are made
from the report's identity, so that a job that runs twice makes the same objects and a PACS sees one report.
The SR has one Verifying Observer (PS3.15 C.4 allows no second): the reviewer where there is one, else the author.
"""

import unicodedata
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from itertools import groupby
from zoneinfo import ZoneInfo

from pydicom import config
from pydicom.charset import python_encoding
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filewriter import dcmwrite
from pydicom.uid import BasicTextSRStorage, EncapsulatedPDFStorage, ExplicitVRLittleEndian

from reading_queue.report_pdf import ReportContent
from storage.errors import ConfigurationError
from storage.visible import code_point
from storage.vocabulary import Conclusion

CHARACTER_SETS = frozenset({"GB18030", "ISO_IR 192"})
"""PS3.3 C.12.1.1.2: the two that write any Chinese text, each alone and without code extensions."""

_TEXT_VRS = frozenset({"LO", "LT", "PN", "SH", "ST", "UC", "UT"})  # PS3.5 6.1.2.3: those with character sets

_UID_NAMESPACE = uuid.UUID("6f0c1c39-3a4b-5a55-9d0e-1a0d5f2f7f11")  # this project's; never changed
_MANUFACTURER = "Yuanzhen"
_PDF_SERIES_NUMBER = 99801  # far from a modality's own series
_SR_SERIES_NUMBER = 99802

Code = tuple[str, str, str]  # Code Value, Coding Scheme Designator, Code Meaning

# CID 7000 Diagnostic Imaging Report Document Title
_TITLE_CODES: Mapping[str, Code] = {
    "CT": ("25045-6", "LN", "CT Report"),
    "MR": ("25056-3", "LN", "MRI Report"),
    "CR": ("43468-8", "LN", "X-Ray Report"),
    "DX": ("43468-8", "LN", "X-Ray Report"),
    "US": ("25061-3", "LN", "Ultrasound Report"),
    "ECG": ("11524-0", "LN", "ECG Report"),
}
_DIAGNOSTIC_IMAGING_REPORT: Code = ("18748-4", "LN", "Diagnostic Imaging Report")
# (section heading CID 7001, element CID 7002) of each text of the report
_REQUEST = (("55115-0", "LN", "Request"), ("55115-0", "LN", "Request"))
_FINDINGS = (("59776-5", "LN", "Findings"), ("121071", "DCM", "Finding"))
_IMPRESSIONS = (("19005-8", "LN", "Impressions"), ("121073", "DCM", "Impression"))
_CONCLUSIONS_SECTION: Code = ("55110-1", "LN", "Conclusions")
_CONCLUSION: Code = ("121077", "DCM", "Conclusion")
_CONCLUSION_CODES: Mapping[Conclusion, Code] = {
    Conclusion.NEGATIVE: ("260385009", "SCT", "Negative"),
    Conclusion.POSITIVE: ("10828004", "SCT", "Positive"),
    # No standard code says 危急值; the scheme is identified in the document (PS3.3 C.12.1.1.1 and PS3.16 8.2).
    Conclusion.CRITICAL: ("critical", "99YUANZHEN", "Critical value"),
}
_LANGUAGES: Mapping[str, Code] = {  # TID 1204, RFC 5646 tags
    "zh": ("zh-CN", "RFC5646", "Chinese (China)"),
    "both": ("zh-CN", "RFC5646", "Chinese (China)"),
    "en": ("en", "RFC5646", "English"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyIdentity:
    """Patient and study exactly as the county sent them (coercion undone), decoded to Unicode; "" where not sent."""

    study_instance_uid: str
    patient_name: str  # PN with its groups
    patient_id: str
    issuer_of_patient_id: str = ""
    patient_birth_date: str = ""  # DA
    patient_sex: str = ""  # CS
    patient_age: str = ""  # AS
    accession_number: str = ""
    study_date: str = ""  # DA
    study_time: str = ""  # TM
    study_id: str = ""
    study_description: str = ""
    referring_physician_name: str = ""  # PN


@dataclass(frozen=True, slots=True)
class ReportedInstance:
    """One instance that was read (PS3.3 C.17.2.1, evidence)."""

    series_instance_uid: str
    sop_class_uid: str
    sop_instance_uid: str


@dataclass(frozen=True, slots=True)
class ReportIdentity:
    """What makes one version of a report that version: the seed of its UIDs."""

    report_id: int
    version: int
    study_instance_uid: str
    signed_at: datetime

    def uid(self, kind: str) -> str:
        """A UID under 2.25 (PS3.5 B.2) for one object of this report; always the same for the same arguments."""
        signed = self.signed_at.astimezone(UTC).isoformat()
        seed = f"{kind}|{self.report_id}|{self.version}|{self.study_instance_uid}|{signed}"
        return f"2.25.{uuid.uuid5(_UID_NAMESPACE, seed).int}"


def identity_of(content: ReportContent) -> ReportIdentity:
    """The identity of a report from its content."""
    return ReportIdentity(content.report_id, content.version, content.study_instance_uid, content.signed_at)


def _put(dataset: Dataset, **values: object) -> None:
    """Set attributes by keyword without judging the value: a county's identity goes home as it came.

    Except what cannot be written: a code string (CS, AS, DA, TM, UI) knows ASCII only, so "女" as sex goes home empty.
    """
    for keyword, value in values.items():
        tag = tag_for_keyword(keyword)
        assert tag is not None, keyword  # noqa: S101 - a slip of the programmer
        vr = dictionary_VR(tag)
        if isinstance(value, str) and vr not in _TEXT_VRS and not value.isascii():
            value = ""  # noqa: PLW2901
        dataset.add(DataElement(tag, vr, value, validation_mode=config.IGNORE))


def _code(code: Code) -> list[Dataset]:
    item = Dataset()
    _put(item, CodeValue=code[0], CodingSchemeDesignator=code[1], CodeMeaning=code[2])
    return [item]


def _text(text: str) -> str:
    """Text for UT: lines end in CR LF (PS3.5 6.2); controls, ESC above all, are shown as code points."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return "\r\n".join(
        "".join(code_point(c) if unicodedata.category(c) in {"Cc", "Cs"} and c != "\t" else c for c in line)
        for line in lines
    )


def _short(text: str) -> str:
    """Text for PN or LO made here: without delimiters and controls, at most 64 characters."""
    return "".join(" " if c in "\\^=" or c < " " else c for c in text)[:64]


def _local(moment: datetime, time_zone: str) -> datetime:
    return moment.astimezone(ZoneInfo(time_zone))


def _common(
    study: StudyIdentity, content: ReportContent, *, kind: str, sop_class_uid: str, character_set: str
) -> Dataset:
    """Patient, General Study, Patient Study, General Equipment, SOP Common: the same for both objects."""
    if character_set not in CHARACTER_SETS:
        raise ConfigurationError(f"Reports are written in {' or '.join(sorted(CHARACTER_SETS))}, not {character_set!r}")
    identity = identity_of(content)
    local = _local(content.signed_at, content.time_zone)
    dataset = Dataset()
    _put(
        dataset,
        SpecificCharacterSet=character_set,
        InstanceCreationDate=f"{local:%Y%m%d}",
        InstanceCreationTime=f"{local:%H%M%S}",
        SOPClassUID=sop_class_uid,
        SOPInstanceUID=identity.uid(kind),
        StudyDate=study.study_date,
        ContentDate=f"{local:%Y%m%d}",
        StudyTime=study.study_time,
        ContentTime=f"{local:%H%M%S}",
        AccessionNumber=study.accession_number,
        Manufacturer=_MANUFACTURER,
        ReferringPhysicianName=study.referring_physician_name,
        PatientName=study.patient_name,
        PatientID=study.patient_id,
        PatientBirthDate=study.patient_birth_date,
        PatientSex=study.patient_sex,
        StudyInstanceUID=study.study_instance_uid,
        SeriesInstanceUID=identity.uid(f"{kind}-series"),
        StudyID=study.study_id,
        InstanceNumber=content.version,
    )
    if study.study_description:
        _put(dataset, StudyDescription=study.study_description)
    if study.issuer_of_patient_id:
        _put(dataset, IssuerOfPatientID=study.issuer_of_patient_id)
    if study.patient_age:
        _put(dataset, PatientAge=study.patient_age)
    centre = content.centre_name_zh or content.centre_name_en
    if centre:
        _put(dataset, InstitutionName=_short(centre))
    return dataset


def _write(dataset: Dataset) -> bytes:
    """The data set as a file (PS3.10), Explicit VR Little Endian.

    Raises ConfigurationError if its character set cannot write its text.
    """
    encoding = python_encoding[dataset.SpecificCharacterSet]
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta = meta
    buffer = BytesIO()
    try:
        dcmwrite(buffer, dataset, enforce_file_format=True)
    except UnicodeEncodeError as error:
        raise ConfigurationError(f"The report cannot be written in {encoding}") from error
    return buffer.getvalue()


def _references(instances: Iterable[ReportedInstance]) -> list[Dataset]:
    items = []
    for instance in instances:
        item = Dataset()
        _put(item, ReferencedSOPClassUID=instance.sop_class_uid, ReferencedSOPInstanceUID=instance.sop_instance_uid)
        items.append(item)
    return items


def encapsulate(
    pdf: bytes,
    study: StudyIdentity,
    content: ReportContent,
    *,
    character_set: str = "GB18030",
    instances: Sequence[ReportedInstance] = (),
) -> bytes:
    """The signed PDF as an Encapsulated PDF file (PS3.10). Cut EncapsulatedDocument by EncapsulatedDocumentLength.

    Raises ConfigurationError for a character set that is not in CHARACTER_SETS.
    """
    dataset = _common(study, content, kind="pdf", sop_class_uid=EncapsulatedPDFStorage, character_set=character_set)
    title = _TITLE_CODES.get(content.modality, _DIAGNOSTIC_IMAGING_REPORT)
    _put(
        dataset,
        AcquisitionDateTime="",
        Modality="DOC",  # PS3.3 C.7.3.1.1.1
        ConversionType="WSD",  # Workstation, C.8.6.1
        SeriesDescription="Report",
        SeriesNumber=_PDF_SERIES_NUMBER,
        BurnedInAnnotation="YES",  # the page names the patient
        ConceptNameCodeSequence=_code(title),
        VerificationFlag="VERIFIED",
        DocumentTitle=title[2],
        MIMETypeOfEncapsulatedDocument="application/pdf",
        EncapsulatedDocument=pdf + b"\0" * (len(pdf) % 2),
        EncapsulatedDocumentLength=len(pdf),
    )
    if instances:
        _put(dataset, SourceInstanceSequence=_references(instances))
    return _write(dataset)


def _item(relationship: str, value_type: str, concept: Code, **values: object) -> Dataset:
    item = Dataset()
    _put(item, RelationshipType=relationship, ValueType=value_type, ConceptNameCodeSequence=_code(concept), **values)
    return item


def _section(heading: Code, *items: Dataset) -> Dataset:
    return _item("CONTAINS", "CONTAINER", heading, ContinuityOfContent="SEPARATE", ContentSequence=list(items))


def _content_items(content: ReportContent) -> list[Dataset]:
    """TID 2000, rows 3 to 8: language, observer, then one section a text."""
    items = [
        _item(
            "HAS CONCEPT MOD",
            "CODE",
            ("121049", "DCM", "Language of Content Item and Descendants"),
            ConceptCodeSequence=_code(_LANGUAGES[content.language]),
        ),
        # TID 1002 Observer Context
        _item(
            "HAS OBS CONTEXT",
            "CODE",
            ("121005", "DCM", "Observer Type"),
            ConceptCodeSequence=_code(("121006", "DCM", "Person")),
        ),
        _item(
            "HAS OBS CONTEXT",
            "PNAME",
            ("121008", "DCM", "Person Observer Name"),
            PersonName=_short(content.author_name),
        ),
    ]
    texts = ((_REQUEST, content.clinical_question), (_FINDINGS, content.findings), (_IMPRESSIONS, content.impression))
    for (heading, element), text in texts:
        if text.strip():  # TextValue is type 1
            items.append(_section(heading, _item("CONTAINS", "TEXT", element, TextValue=_text(text))))
    conclusion = _item(
        "CONTAINS", "CODE", _CONCLUSION, ConceptCodeSequence=_code(_CONCLUSION_CODES[content.conclusion])
    )
    return [*items, _section(_CONCLUSIONS_SECTION, conclusion)]


def _evidence(study_instance_uid: str, instances: Sequence[ReportedInstance]) -> list[Dataset]:
    """PS3.3 Table C.17-3: study, series, instances."""
    series_items = []
    ordered = sorted(instances, key=lambda i: i.series_instance_uid)
    for series_instance_uid, group in groupby(ordered, key=lambda i: i.series_instance_uid):
        item = Dataset()
        _put(item, ReferencedSOPSequence=_references(group), SeriesInstanceUID=series_instance_uid)
        series_items.append(item)
    study = Dataset()
    _put(study, ReferencedSeriesSequence=series_items, StudyInstanceUID=study_instance_uid)
    return [study]


def structured_report(
    study: StudyIdentity,
    content: ReportContent,
    instances: Sequence[ReportedInstance],
    *,
    character_set: str = "GB18030",
    predecessor: ReportIdentity | None = None,
) -> bytes:
    """The report as a verified Basic Text SR file (PS3.10). `predecessor` is the version that this one replaces.

    Raises ConfigurationError for a character set that is not in CHARACTER_SETS.
    """
    dataset = _common(study, content, kind="sr", sop_class_uid=BasicTextSRStorage, character_set=character_set)
    organisation = _short(content.centre_name_zh or content.centre_name_en) or _MANUFACTURER
    local = _local(content.signed_at, content.time_zone)
    verifier = Dataset()
    _put(
        verifier,
        VerifyingOrganization=organisation,
        VerificationDateTime=f"{local:%Y%m%d%H%M%S%z}",
        VerifyingObserverName=_short(content.reviewer_name or content.author_name),
        VerifyingObserverIdentificationCodeSequence=[],
    )
    author = Dataset()
    _put(
        author,
        ObserverType="PSN",
        InstitutionName=organisation,
        InstitutionCodeSequence=[],
        PersonName=_short(content.author_name),
        PersonIdentificationCodeSequence=[],
    )
    request = Dataset()
    _put(
        request,
        AccessionNumber=study.accession_number,
        ReferencedStudySequence=[],
        StudyInstanceUID=study.study_instance_uid,
        RequestedProcedureDescription=study.study_description,
        RequestedProcedureCodeSequence=[],
        RequestedProcedureID="",
        PlacerOrderNumberImagingServiceRequest="",
        FillerOrderNumberImagingServiceRequest="",
    )
    template = Dataset()
    _put(template, MappingResource="DCMR", TemplateIdentifier="2000")
    _put(
        dataset,
        Modality="SR",
        SeriesDescription="Report",
        SeriesNumber=_SR_SERIES_NUMBER,
        ReferencedPerformedProcedureStepSequence=[],
        VerifyingObserverSequence=[verifier],
        AuthorObserverSequence=[author],
        ReferencedRequestSequence=[request],
        PerformedProcedureCodeSequence=[],
        CompletionFlag="COMPLETE",
        VerificationFlag="VERIFIED",
        ValueType="CONTAINER",
        ConceptNameCodeSequence=_code(_TITLE_CODES.get(content.modality, _DIAGNOSTIC_IMAGING_REPORT)),
        ContinuityOfContent="SEPARATE",
        ContentTemplateSequence=[template],
        ContentSequence=_content_items(content),
    )
    if instances:
        _put(dataset, CurrentRequestedProcedureEvidenceSequence=_evidence(study.study_instance_uid, instances))
    if predecessor is not None:
        replaced = ReportedInstance(predecessor.uid("sr-series"), BasicTextSRStorage, predecessor.uid("sr"))
        _put(dataset, PredecessorDocumentsSequence=_evidence(predecessor.study_instance_uid, [replaced]))
    if content.conclusion is Conclusion.CRITICAL:
        scheme = Dataset()
        _put(scheme, CodingSchemeDesignator="99YUANZHEN", CodingSchemeName="Yuanzhen conclusions")
        _put(dataset, CodingSchemeIdentificationSequence=[scheme])
    return _write(dataset)
