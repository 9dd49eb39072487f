"""What a run leaves behind as DICOM: the structured report and the heat map, read back by other programs."""

import io
import re
import subprocess
from pathlib import Path

import numpy as np
import pydicom
import pytest
from highdicom.sr import srread
from pydicom.dataset import Dataset

from ai_triage.images import grey_image
from ai_triage.interface import TriageResult
from ai_triage.results import SourceInstance, StudyIdentity, heat_map_image, structured_report
from tests.peers import peer
from tests.triage_material import CXR, ECG, packaged

IDENTITY = StudyIdentity("1.2.3.4", "P1", "", "Zhang^San=张^三", "20220101", "M", "A1", "20260101", "101010")


def _source(dataset: Dataset) -> SourceInstance:
    return SourceInstance(dataset.SOPClassUID, dataset.SOPInstanceUID, dataset.SeriesInstanceUID, str(dataset.Modality))


def _result(dataset: Dataset, probability: float, heat: np.ndarray | None = None) -> TriageResult:
    model = ECG if dataset.Modality == "ECG" else CXR
    findings = tuple(point.finding(probability) for point in model.card.operating_points)
    return TriageResult(findings, (dataset.SOPInstanceUID,), 0.1, heat)


def _items(dataset: Dataset) -> list[Dataset]:
    found = [dataset]
    for item in dataset.get("ContentSequence", []):
        found.extend(_items(item))
    return found


def _meanings(report: Dataset, value_type: str) -> dict[str, list[Dataset]]:
    found: dict[str, list[Dataset]] = {}
    for item in _items(report):
        if item.get("ValueType") == value_type:
            found.setdefault(item.ConceptNameCodeSequence[0].CodeMeaning, []).append(item)
    return found


def test_the_report_names_model_version_digest_inputs_and_probability() -> None:
    dataset = packaged("RG1_UNCR.dcm")
    data = structured_report(IDENTITY, CXR.card, _result(dataset, 0.75), [_source(dataset)], "county-a/7")
    report = pydicom.dcmread(io.BytesIO(data))
    assert report.SOPClassUID == "1.2.840.10008.5.1.4.1.1.88.33"
    assert report.ContentTemplateSequence[0].TemplateIdentifier == "1500"
    assert report.StudyInstanceUID == "1.2.3.4"
    assert report.SpecificCharacterSet == "ISO_IR 192"
    assert str(report.PatientName) == "Zhang^San=张^三"
    assert report.VerificationFlag == "UNVERIFIED"
    texts = _meanings(report, "TEXT")
    assert texts["Algorithm Name"][0].TextValue == CXR.card.name
    assert texts["Algorithm Version"][0].TextValue == CXR.card.version
    parameters = {item.TextValue for item in texts["Algorithm Parameters"]}
    assert f"sha256={CXR.card.sha256}" in parameters
    assert "status=research only; not for diagnosis" in parameters
    (number,) = _meanings(report, "NUM")["Certainty of Finding"]
    assert number.MeasuredValueSequence[0].NumericValue == 75
    codes = _meanings(report, "CODE")
    assert codes["Finding"][0].ConceptCodeSequence[0].CodeValue == "233604007"
    assert codes["Presence"][0].ConceptCodeSequence[0].CodeMeaning == "Present"
    referenced = report.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0]
    assert referenced.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == dataset.SOPInstanceUID


def test_nothing_is_ever_called_absent() -> None:
    dataset = packaged("RG1_UNCR.dcm")
    data = structured_report(IDENTITY, CXR.card, _result(dataset, 0.01), [_source(dataset)], "county-a/7")
    assert "Presence" not in _meanings(pydicom.dcmread(io.BytesIO(data)), "CODE")
    assert b"bsent" not in data
    assert not re.search(rb"[Nn]ormal", data)


def test_an_ecg_report_refers_to_the_waveform_it_comes_from() -> None:
    dataset = packaged("waveform_ecg.dcm")
    data = structured_report(IDENTITY, ECG.card, _result(dataset, 0.75), [_source(dataset)], "county-a/8")
    report = pydicom.dcmread(io.BytesIO(data))
    waveforms = _meanings(report, "WAVEFORM")["Source of Measurement"]
    assert len(waveforms) == len(ECG.card.operating_points)
    assert {w.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for w in waveforms} == {dataset.SOPInstanceUID}
    assert "PertinentOtherEvidenceSequence" not in report
    assert report.ConceptNameCodeSequence[0].CodeValue == "11524-0"


def test_the_same_run_gives_the_same_uids_and_another_run_others() -> None:
    dataset = packaged("RG1_UNCR.dcm")
    uids = [
        pydicom.dcmread(
            io.BytesIO(structured_report(IDENTITY, CXR.card, _result(dataset, 0.7), [_source(dataset)], key))
        ).SOPInstanceUID
        for key in ("county-a/7", "county-a/7", "county-b/7")
    ]
    assert uids[0] == uids[1] != uids[2]


def test_highdicom_reads_the_report_back_as_a_measurement_report(tmp_path: Path) -> None:
    dataset = packaged("RG1_UNCR.dcm")
    path = tmp_path / "sr.dcm"
    path.write_bytes(structured_report(IDENTITY, CXR.card, _result(dataset, 0.75), [_source(dataset)], "county-a/7"))
    groups = srread(path).content.get_image_measurement_groups()
    assert len(groups) == 1
    assert groups[0].finding_type.meaning == "Pneumonia"


@pytest.mark.peer("dcmtk")
@pytest.mark.parametrize("name", ["RG1_UNCR.dcm", "waveform_ecg.dcm"])
def test_dcmtk_reads_the_report(tmp_path: Path, name: str) -> None:
    program = Path(peer("dcmtk")).with_name("dsrdump")
    dataset = packaged(name)
    model = ECG if dataset.Modality == "ECG" else CXR
    path = tmp_path / "sr.dcm"
    path.write_bytes(structured_report(IDENTITY, model.card, _result(dataset, 0.75), [_source(dataset)], "county-a/7"))
    done = subprocess.run([program, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "E:" not in done.stderr
    assert "Certainty of Finding" in done.stdout
    assert "张^三" in done.stdout


def test_the_heat_map_is_an_image_of_the_study_that_names_its_source_and_its_model() -> None:
    dataset = packaged("RG1_UNCR.dcm")
    heat = np.zeros((8, 8), np.float32)
    heat[6, 2] = 1.0
    data = heat_map_image(IDENTITY, CXR.card, grey_image(dataset), heat, _source(dataset), "county-a/7")
    image = pydicom.dcmread(io.BytesIO(data))
    pixels = image.pixel_array.astype(int)
    assert max(pixels.shape[:2]) <= 768
    assert pixels.shape[0] / pixels.shape[1] == pytest.approx(dataset.Rows / dataset.Columns, rel=0.01)
    assert image.StudyInstanceUID == "1.2.3.4"
    assert str(image.PatientName) == "Zhang^San=张^三"
    assert image.SourceImageSequence[0].ReferencedSOPInstanceUID == dataset.SOPInstanceUID
    assert CXR.card.sha256 in image.DerivationDescription
    assert "research only" in image.DerivationDescription
    # the colour is where the map is, and nowhere else
    height, width = pixels.shape[:2]
    redness = pixels[..., 0] - pixels[..., 2]
    assert redness[int(height * 6.5 / 8), int(width * 2.5 / 8)] > 40
    assert np.abs(redness[height // 4 : height // 2, width // 2 :]).max() <= 12
