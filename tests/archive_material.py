"""Real DICOM files put into the archive the way a commit does it: pack, sidecar, rows. For reading tests."""

import hashlib
import io
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import pydicom
from pydicom.data import get_testdata_file
from sqlalchemy.orm import Session

from storage import archive, packs, sidecar
from storage.objects import Objects
from storage.rows import Study
from storage.sidecar import Sidecar
from storage.wire import InstanceFacts, StudyFacts


def real_file(name: str) -> Path:
    """A file of pydicom or pydicom-data."""
    path = get_testdata_file(name, download=False)
    assert isinstance(path, str), f"{name} is not installed: pip install pydicom-data"
    return Path(path)


def data_set_bytes(path: Path) -> bytes:
    """The data set of a file as it travels in C-STORE: without preamble and file meta information (PS3.10 7.1)."""
    length = pydicom.filereader.read_file_meta_info(path).FileMetaInformationGroupLength
    return path.read_bytes()[128 + 4 + 12 + length :]


def saved(data_set: pydicom.Dataset, path: Path) -> Path:
    """A changed data set as a file."""
    data_set.save_as(path, enforce_file_format=True)
    return path


def archive_files(
    session: Session, objects: Objects, site_id: int, files: Sequence[Path], *, character_set: str = ""
) -> int:
    """One study from these files, in one pack. Returns the study's id."""
    now = datetime.now(UTC)
    first = pydicom.dcmread(files[0], stop_before_pixels=True)
    facts = StudyFacts(
        study_instance_uid=str(first.StudyInstanceUID),
        patient_id=str(first.get("PatientID", "")),
        patient_name=str(first.get("PatientName", "")),
        patient_birth_date=str(first.get("PatientBirthDate", "")),
        patient_sex=str(first.get("PatientSex", "")),
        accession_number=str(first.get("AccessionNumber", "")),
        study_date=str(first.get("StudyDate", "")),
        study_time=str(first.get("StudyTime", "")),
        study_description=str(first.get("StudyDescription", "")),
        first_received_at=now,
    )
    study = archive.open_study(session, site_id, facts, actor="system")
    pairs = []
    for path in files:
        header = pydicom.dcmread(path, stop_before_pixels=True)
        data = data_set_bytes(path)
        digest = hashlib.sha256(data).hexdigest()
        one = InstanceFacts(
            sop_instance_uid=str(header.SOPInstanceUID),
            sop_class_uid=str(header.SOPClassUID),
            series_instance_uid=str(header.SeriesInstanceUID),
            transfer_syntax_uid=str(header.file_meta.TransferSyntaxUID),
            sha256=digest,
            size_bytes=len(data),
            header_sha256=digest,
            pixel_sha256=digest,
            received_at=now,
        )
        pairs.append((one, data))
    out = io.BytesIO()
    entries = []
    for one, data in pairs:
        entries.append(packs.PackEntry(facts=one, offset=out.tell(), length=len(data)))
        out.write(data)
    sidecars = [sidecar.build(data, one, character_set) for one, data in pairs]
    key = f"packs/test/{facts.study_instance_uid}/{uuid4().hex}"
    objects.put(f"{key}.pack", out.getvalue())
    objects.put(f"{key}.sidecar", sidecar.pack_sidecar(Sidecar(instances=sidecars)))
    whole = hashlib.sha256(out.getvalue()).hexdigest()
    stored = archive.StoredPack(f"{key}.pack", f"{key}.sidecar", len(out.getvalue()), whole)
    archive.add_pack(
        session,
        session.get_one(Study, study.id),
        stored,
        [
            archive.NewInstance(entry, built, entry.facts.header_sha256, entry.facts.pixel_sha256, False)
            for entry, built in zip(entries, sidecars, strict=True)
        ],
    )
    return study.id
