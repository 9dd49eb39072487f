"""The studies of the demonstration: real recordings that packages ship, each made a new study by fresh UIDs.

Only UIDs are changed, so that the demonstration can run again and again on one archive; every other byte of meaning
stays. Sources: pydicom and pydicom-data (MIT; NEMA, CQ500 and vendors' samples), an atrial fibrillation ECG from the
`ecgprocess` wheel (unpacked as data by set-up, not imported). See docs/demonstration.md.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import pydicom
from pydicom.data import get_testdata_file
from pydicom.uid import UID

from deploy.demo_reader import split_part10
from storage.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Source:
    """One study to send: what it is, and the file that holds it."""

    label: str
    title_zh: str
    file_name: str  # in pydicom or pydicom-data


SOURCES = (
    Source("chest CR", "胸部 CR", "RG1_UNCR.dcm"),
    Source("head CT", "头颅 CT", "693_UNCR.dcm"),
    Source("enhanced CT", "CT 灌注", "eCT_Supplemental.dcm"),
    Source("MR", "磁共振", "MR2_UNCR.dcm"),
    Source("echo loop", "超声心动图（120 帧）", "color3d_jpeg_baseline.dcm"),
    Source("ultrasound loop", "超声（30 帧）", "examples_ybr_color.dcm"),
    Source("12-lead ECG", "十二导联心电图", "waveform_ecg.dcm"),
)
# Brought by set-up from the ecgprocess wheel.
ATRIAL_FIBRILLATION = Source("12-lead ECG, AF", "十二导联心电图（房颤）", "example-DICOM2.dcm")


@dataclass(frozen=True, slots=True)
class Prepared:
    """One file ready to send, and what must come out at the other end."""

    label: str
    title_zh: str
    path: Path
    study_instance_uid: str
    sop_instance_uid: str
    sop_class_uid: str
    transfer_syntax_uid: str
    patient_id: str
    sha256: str  # of the data set in the file, after the file meta information


def fresh_uid(run: str, original: str) -> str:
    """A UID under 2.25 (PS3.5 B.2), the same for the same run and original."""
    return f"2.25.{int.from_bytes(hashlib.sha256(f'{run}/{original}'.encode()).digest()[:16], 'big')}"


def prepare(folder: Path, run: str, demo_folder: Path) -> list[Prepared]:
    """Write each source under fresh UIDs into `folder`. Raises ConfigurationError if a package's file is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    found: list[tuple[Source, Path]] = []
    for source in SOURCES:
        path = get_testdata_file(source.file_name, download=False)
        if not isinstance(path, str):
            raise ConfigurationError(f"{source.file_name} is not installed: pip install 'yuanzhen[demo]'")
        found.append((source, Path(path)))
    found.append((ATRIAL_FIBRILLATION, demo_folder / ATRIAL_FIBRILLATION.file_name))
    return [_renamed(source, path, folder / f"{number:02d}.dcm", run) for number, (source, path) in enumerate(found)]


def _renamed(source: Source, path: Path, target: Path, run: str) -> Prepared:
    data_set = pydicom.dcmread(path)
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
        setattr(data_set, keyword, UID(fresh_uid(run, f"{source.label}/{data_set[keyword].value}")))
    data_set.file_meta.MediaStorageSOPInstanceUID = data_set.SOPInstanceUID
    data_set.save_as(target, enforce_file_format=True)
    return Prepared(
        label=source.label,
        title_zh=source.title_zh,
        path=target,
        study_instance_uid=str(data_set.StudyInstanceUID),
        sop_instance_uid=str(data_set.SOPInstanceUID),
        sop_class_uid=str(data_set.SOPClassUID),
        transfer_syntax_uid=str(data_set.file_meta.TransferSyntaxUID),
        patient_id=str(data_set.get("PatientID", "")),
        sha256=hashlib.sha256(split_part10(target.read_bytes())[1]).hexdigest(),
    )
