"""Reports as DICOM: identity, character sets, the PDF's bytes, and the standard's own tables of attributes.

Type 1 and 2 attributes are checked against the tables of the standard that highdicom carries, the SR by DCMTK's
`dsrdump`, which enforces relationships and value types. dicom-validator is not used: it downloads the standard's
sources, which a closed network has not.
"""

import json
import subprocess
from collections.abc import Iterator
from datetime import timedelta
from importlib import resources
from io import BytesIO
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.dataset import Dataset, FileDataset

from reading_queue.report_dicom import (
    ReportedInstance,
    ReportIdentity,
    StudyIdentity,
    encapsulate,
    identity_of,
    structured_report,
)
from storage.errors import ConfigurationError
from storage.vocabulary import Conclusion
from tests.peers import peer
from tests.report_material import CONTENT, content

STUDY = StudyIdentity(
    study_instance_uid=CONTENT.study_instance_uid,
    patient_name="Wang^Xiao=王^小𠮷㛃誠區",  # 誠 and 區 hold the bytes of \ and ^ in GB18030
    patient_id="县-001",
    patient_birth_date="19811123",
    patient_sex="F",
    patient_age="045Y",
    accession_number="A20261123-0007",
    study_date="20261123",
    study_time="091233",
    study_description="誠區医院 胸部平扫",
)
CT = "1.2.840.10008.5.1.4.1.1.2"
INSTANCES = [
    ReportedInstance("1.2.1", CT, "1.2.1.1"),
    ReportedInstance("1.2.2", CT, "1.2.2.1"),
    ReportedInstance("1.2.1", CT, "1.2.1.2"),
]
PDF = b"%PDF-1.7\n\x00\xff odd length\r\n%%EOF!"
CHARACTER_SETS = ["GB18030", "ISO_IR 192"]


def read(data: bytes) -> FileDataset:
    return pydicom.dcmread(BytesIO(data))


def both(character_set: str) -> Iterator[FileDataset]:
    yield read(encapsulate(PDF, STUDY, content(), character_set=character_set, instances=INSTANCES))
    yield read(structured_report(STUDY, content(), INSTANCES, character_set=character_set))


@pytest.mark.parametrize("character_set", CHARACTER_SETS)
def test_reports_carry_the_countys_own_identity_in_its_character_set(character_set: str) -> None:
    for dataset in both(character_set):
        assert dataset.SpecificCharacterSet == character_set
        assert str(dataset.PatientName) == STUDY.patient_name
        assert dataset.PatientID == STUDY.patient_id
        assert dataset.AccessionNumber == STUDY.accession_number
        assert dataset.StudyInstanceUID == STUDY.study_instance_uid
        assert dataset.StudyDescription == STUDY.study_description
        assert (dataset.StudyDate, dataset.StudyTime) == (STUDY.study_date, STUDY.study_time)


def test_the_patients_name_is_in_the_bytes_of_the_character_set() -> None:
    raw = encapsulate(PDF, STUDY, content(), character_set="GB18030")
    assert STUDY.patient_name.encode("gb18030") in raw
    assert STUDY.patient_name.encode() not in raw


@pytest.mark.parametrize("pdf", [PDF, PDF + b"!"], ids=["odd", "even"])
def test_the_encapsulated_document_is_the_pdf_byte_for_byte(pdf: bytes) -> None:
    dataset = read(encapsulate(pdf, STUDY, content()))
    assert dataset.EncapsulatedDocument[: dataset.EncapsulatedDocumentLength] == pdf
    assert len(dataset.EncapsulatedDocument) % 2 == 0
    assert dataset.MIMETypeOfEncapsulatedDocument == "application/pdf"


def test_identity_that_breaks_the_rules_goes_home_as_it_came() -> None:
    odd = StudyIdentity(
        study_instance_uid="1.2.3",
        patient_name="x" * 100,
        patient_id="9" * 90,
        accession_number="A" * 40,
        study_date="2026",
        study_time="soon",
        patient_sex="女",
        patient_age="45",
    )
    raw = encapsulate(PDF, odd, content())
    for value in (odd.patient_name, odd.patient_id, odd.accession_number, odd.study_date, odd.study_time):
        assert value.encode("gb18030") in raw
    assert read(raw).PatientSex == ""  # CS is ASCII


def test_a_job_that_runs_twice_makes_the_same_objects() -> None:
    assert structured_report(STUDY, content(), INSTANCES) == structured_report(STUDY, content(), INSTANCES)
    assert encapsulate(PDF, STUDY, content()) == encapsulate(PDF, STUDY, content())


def test_each_object_of_each_version_has_its_own_uid() -> None:
    later = CONTENT.signed_at + timedelta(seconds=1)
    identities = [
        identity_of(content()),
        identity_of(content(version=2)),
        identity_of(content(report_id=43)),
        identity_of(content(study_instance_uid="1.2.3")),
        identity_of(content(signed_at=later)),
    ]
    uids = [identity.uid(kind) for identity in identities for kind in ("pdf", "sr", "pdf-series", "sr-series")]
    assert len(set(uids)) == len(uids)
    assert all(uid.startswith("2.25.") and len(uid) <= 64 for uid in uids)


def test_another_character_set_is_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match="ISO_IR 100"):
        encapsulate(PDF, STUDY, content(), character_set="ISO_IR 100")


def test_the_structured_report_is_complete_and_verified_by_the_reviewer() -> None:
    dataset = read(structured_report(STUDY, content(reviewer_name="陈雨"), INSTANCES))
    assert (dataset.CompletionFlag, dataset.VerificationFlag) == ("COMPLETE", "VERIFIED")
    assert [str(v.VerifyingObserverName) for v in dataset.VerifyingObserverSequence] == ["陈雨"]
    assert dataset.VerifyingObserverSequence[0].VerifyingOrganization == CONTENT.centre_name_zh
    assert [str(a.PersonName) for a in dataset.AuthorObserverSequence] == [CONTENT.author_name]


def test_the_author_verifies_where_there_is_no_reviewer() -> None:
    dataset = read(structured_report(STUDY, content(), INSTANCES))
    assert str(dataset.VerifyingObserverSequence[0].VerifyingObserverName) == CONTENT.author_name


def sections(dataset: Dataset) -> dict[str, Any]:
    return {
        item.ConceptNameCodeSequence[0].CodeValue: item.ContentSequence[0]
        for item in dataset.ContentSequence
        if item.ValueType == "CONTAINER"
    }


def test_findings_and_impression_stand_in_their_sections_of_tid_2000() -> None:
    dataset = read(structured_report(STUDY, content(), INSTANCES))
    assert dataset.ConceptNameCodeSequence[0].CodeValue == "25045-6"
    assert dataset.ContentTemplateSequence[0].TemplateIdentifier == "2000"
    found = sections(dataset)
    assert found["59776-5"].TextValue == CONTENT.findings.replace("\n", "\r\n")
    assert found["19005-8"].TextValue == CONTENT.impression


@pytest.mark.parametrize(
    ("conclusion", "scheme"), [("negative", "SCT"), ("positive", "SCT"), ("critical", "99YUANZHEN")]
)
def test_the_conclusion_is_coded(conclusion: str, scheme: str) -> None:
    dataset = read(structured_report(STUDY, content(conclusion=Conclusion(conclusion)), INSTANCES))
    assert sections(dataset)["55110-1"].ConceptCodeSequence[0].CodingSchemeDesignator == scheme
    assert ("CodingSchemeIdentificationSequence" in dataset) is (scheme == "99YUANZHEN")


def test_the_evidence_names_every_instance_that_was_read() -> None:
    dataset = read(structured_report(STUDY, content(), INSTANCES))
    (evidence,) = dataset.CurrentRequestedProcedureEvidenceSequence
    assert evidence.StudyInstanceUID == STUDY.study_instance_uid
    named = {
        (series.SeriesInstanceUID, item.ReferencedSOPInstanceUID)
        for series in evidence.ReferencedSeriesSequence
        for item in series.ReferencedSOPSequence
    }
    assert named == {(i.series_instance_uid, i.sop_instance_uid) for i in INSTANCES}
    assert len(evidence.ReferencedSeriesSequence) == 2


def test_a_later_version_names_the_one_it_replaces() -> None:
    first = read(structured_report(STUDY, content(), INSTANCES))
    before = ReportIdentity(CONTENT.report_id, 1, CONTENT.study_instance_uid, CONTENT.signed_at)
    second = read(structured_report(STUDY, content(version=2), INSTANCES, predecessor=before))
    series = second.PredecessorDocumentsSequence[0].ReferencedSeriesSequence[0]
    assert series.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == first.SOPInstanceUID
    assert series.SeriesInstanceUID == first.SeriesInstanceUID


def test_escape_and_other_controls_cannot_switch_the_character_set() -> None:
    raw = structured_report(STUDY, content(findings="a\x1b$)Cb\x00c", author_name="a\\b^c=d\x1b"), INSTANCES)
    assert b"\x1b" not in raw
    assert sections(read(raw))["59776-5"].TextValue == "a[U+001B]$)Cb[U+0000]c"


@pytest.mark.parametrize("character_set", CHARACTER_SETS)
def test_dcmtk_reads_the_structured_report(character_set: str, tmp_path: Path) -> None:
    path = tmp_path / "report.dcm"
    path.write_bytes(structured_report(STUDY, content(), INSTANCES, character_set=character_set))
    said = subprocess.run([Path(peer("dcmtk")).with_name("dsrdump"), path], check=False, capture_output=True)
    assert said.returncode == 0, said.stderr
    assert b"E: " not in said.stderr
    assert b"Basic Text SR" in said.stdout


def module_tables() -> tuple[Any, Any, Any]:
    """The standard's tables as highdicom carries them: SOP class to IOD, IOD to modules, module to attributes."""
    folder = resources.files("highdicom") / "_standard"
    names = ("sop_class_iod_map.json", "iod_module_map.json", "module_attribute_map.json")
    classes, iods, modules = (json.loads((folder / name).read_text()) for name in names)
    return classes, iods, modules


def check_required(dataset: Dataset, attributes: list[dict[str, Any]], path: list[str]) -> None:
    """Type 1 present with a value, type 2 present, at this level and in every sequence below that is there."""
    for attribute in attributes:
        if attribute["path"] != path:
            continue
        keyword, kind = attribute["keyword"], attribute["type"]
        where = "/".join([*path, keyword])
        if kind in ("1", "2"):
            assert keyword in dataset, f"{where} is type {kind}"
        if kind == "1":
            assert not dataset[keyword].is_empty, f"{where} is type 1"
        if keyword in dataset and dataset[keyword].VR == "SQ" and keyword != "ContentSequence":
            for item in dataset[keyword].value:
                check_required(item, attributes, [*path, keyword])


@pytest.mark.parametrize("character_set", CHARACTER_SETS)
def test_every_required_attribute_of_the_standard_is_there(character_set: str) -> None:
    classes, iods, modules = module_tables()
    for dataset in both(character_set):
        for module in iods[classes[dataset.SOPClassUID]]:
            # The SR content's requirements depend on each item's value type: `dsrdump` checks those.
            if module["usage"] == "M" and module["key"] != "sr-document-content":
                check_required(dataset, modules[module["key"]], [])
