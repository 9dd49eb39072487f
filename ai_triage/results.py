"""What a run found, as DICOM: a measurement report (TID 1500, as IHE AI Results has it) and a heat map to look at.

Both belong to the patient's study and name the model, its version and its digest. The text is UTF-8 whatever the
modality sent. Only positive findings are called present; nothing is ever called absent (design §6).
"""

import io
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np
import pydicom
from highdicom import sr
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, SecondaryCaptureImageStorage

from ai_triage.interface import Coded, Finding, ModelCard, TriageResult
from storage.archive import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME

MANUFACTURER = "Yuanzhen"

_IMAGING_MEASUREMENT_REPORT = Coded("126000", "DCM", "Imaging Measurement Report")  # CID 7021
_EKG_STUDY = Coded("11524-0", "LN", "EKG study")
_CERTAINTY = Coded("111012", "DCM", "Certainty of Finding")
_PERCENT = Coded("%", "UCUM", "Percent")
_PRESENCE = Coded("705057003", "SCT", "Presence")
_PRESENT = Coded("52101004", "SCT", "Present")
_SOURCE_OF_MEASUREMENT = Coded("121112", "DCM", "Source of Measurement")  # TID 300
_UNKNOWN_PROCEDURE = {"ECG": Coded("29303009", "SCT", "Electrocardiographic procedure")}
_RADIOGRAPHY = Coded("363680008", "SCT", "Radiographic imaging procedure")

_LONGEST_SIDE = 768  # pixels of a heat map image: it is looked at, not measured
_HEAT_SHARE = 0.45  # of the blend, where the map is at its highest
_RESULT_SERIES = 9100  # series number of AI results, far from those of a modality


@dataclass(frozen=True, slots=True)
class StudyIdentity:
    """Whose study it is; text in Unicode, as the archive's row has it."""

    study_instance_uid: str
    patient_id: str
    issuer_of_patient_id: str
    patient_name: str
    patient_birth_date: str
    patient_sex: str
    accession_number: str
    study_date: str
    study_time: str


@dataclass(frozen=True, slots=True)
class SourceInstance:
    """An input of the run."""

    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str
    modality: str


def _code(coded: Coded) -> sr.CodedConcept:
    return sr.CodedConcept(coded.value, coded.scheme, coded.meaning)


def _uid(*parts: str) -> str:
    # The same run gives the same UIDs (PS3.5 B.2), so a run done twice is stored once.
    return f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, '/'.join(parts)).int}"


def _stamp(dataset: Dataset, identity: StudyIdentity) -> None:
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.StudyInstanceUID = identity.study_instance_uid
    dataset.PatientID = identity.patient_id
    if identity.issuer_of_patient_id:
        dataset.IssuerOfPatientID = identity.issuer_of_patient_id
    dataset.PatientName = identity.patient_name
    dataset.PatientBirthDate = identity.patient_birth_date
    dataset.PatientSex = identity.patient_sex if identity.patient_sex in {"M", "F", "O"} else ""
    dataset.AccessionNumber = identity.accession_number
    dataset.StudyDate = identity.study_date
    dataset.StudyTime = identity.study_time
    dataset.StudyID = ""
    dataset.ReferringPhysicianName = ""


def _evidence(identity: StudyIdentity, source: SourceInstance) -> Dataset:
    dataset = Dataset()
    _stamp(dataset, replace(identity, patient_name=""))  # highdicom warns of odd names, quoting them into the log
    dataset.SOPClassUID = source.sop_class_uid
    dataset.SOPInstanceUID = source.sop_instance_uid
    dataset.SeriesInstanceUID = source.series_instance_uid
    dataset.Modality = source.modality
    return dataset


def _group(
    finding: Finding, card: ModelCard, sources: Sequence[SourceInstance], run_uid: str
) -> sr.MeasurementsAndQualitativeEvaluations:
    threshold = next(point.threshold for point in card.operating_points if point.code == finding.code)
    algorithm = sr.AlgorithmIdentification(
        name=card.name,
        version=card.version,
        manufacturer=MANUFACTURER,
        parameters=[
            f"status={card.status}; not for diagnosis",
            f"sha256={card.sha256}",
            f"operating_point={threshold:g}",
        ],
    )
    images = [source for source in sources if source.modality != "ECG"]
    certainty = sr.Measurement(name=_code(_CERTAINTY), value=round(finding.probability * 100, 1), unit=_code(_PERCENT))
    return sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(uid=_uid(run_uid, finding.code), identifier=finding.code),
        finding_type=_code(finding.coded),
        algorithm_id=algorithm,
        measurements=[certainty],
        qualitative_evaluations=[sr.QualitativeEvaluation(_code(_PRESENCE), _code(_PRESENT))]
        if finding.positive
        else None,
        source_images=[
            sr.SourceImageForMeasurementGroup(source.sop_class_uid, source.sop_instance_uid) for source in images
        ]
        or None,
    )


def _reference_waveforms(report: Dataset, sources: Sequence[SourceInstance]) -> None:
    """Name the waveforms each measurement comes from (TID 300, TID 321): highdicom takes images only, and its reading
    of a content tree does not know WAVEFORM, so they are added to the finished report."""
    items = list(report.ContentSequence)
    while items:
        item = items.pop()
        items.extend(item.get("ContentSequence", []))
        if item.ValueType != "NUM":
            continue
        references = [
            sr.WaveformContentItem(
                _code(_SOURCE_OF_MEASUREMENT),
                source.sop_class_uid,
                source.sop_instance_uid,
                relationship_type=sr.RelationshipTypeValues.INFERRED_FROM,
            )
            for source in sources
        ]
        item.ContentSequence = [*item.get("ContentSequence", []), *references]
    if "PertinentOtherEvidenceSequence" in report:  # PS3.3 C.17.2: what the content refers to is current evidence
        report.CurrentRequestedProcedureEvidenceSequence = report.PertinentOtherEvidenceSequence
        del report.PertinentOtherEvidenceSequence


def structured_report(
    identity: StudyIdentity, card: ModelCard, result: TriageResult, sources: Sequence[SourceInstance], run_key: str
) -> bytes:
    """The result as a DICOM file: Comprehensive SR, TID 1500, one measurement group (TID 1501) per finding.

    `run_key` names the run: the same run gives the same UIDs.
    """
    run_uid = _uid("triage-run", run_key)
    modality = sources[0].modality
    device = sr.ObserverContext(
        observer_type=sr.CodedConcept("121007", "DCM", "Device"),
        observer_identifying_attributes=sr.DeviceObserverIdentifyingAttributes(
            uid=_uid("model", card.sha256),
            name=card.title_en,
            manufacturer_name=MANUFACTURER,
            model_name=f"{card.name} {card.version}",
        ),
    )
    content = sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_device_context=device),
        procedure_reported=_code(_UNKNOWN_PROCEDURE.get(modality, _RADIOGRAPHY)),
        imaging_measurements=[_group(finding, card, sources, run_uid) for finding in result.findings],
        title=_code(_EKG_STUDY if modality == "ECG" else _IMAGING_MEASUREMENT_REPORT),
    )
    report = sr.ComprehensiveSR(
        evidence=[_evidence(identity, source) for source in sources],
        content=content,
        series_instance_uid=_uid(run_uid, "sr-series"),
        series_number=_RESULT_SERIES,
        sop_instance_uid=_uid(run_uid, "sr"),
        instance_number=1,
        manufacturer=MANUFACTURER,
        is_complete=True,
        is_final=False,  # no person looked at it
    )
    _stamp(report, identity)
    waveforms = [source for source in sources if source.modality == "ECG"]
    if waveforms:
        _reference_waveforms(report, waveforms)
    report.SeriesDescription = f"AI: {card.title_en}"[:64]
    report.ManufacturerModelName = card.name
    report.SoftwareVersions = card.version
    return _file(report)


def heat_map_image(
    identity: StudyIdentity,
    card: ModelCard,
    grey: NDArray[np.float32],
    heat: NDArray[np.float32],
    source: SourceInstance,
    run_key: str,
) -> bytes:
    """The heat map over the image, as a DICOM file: Secondary Capture (PS3.3 A.8.1), RGB, at most 768 pixels a side.

    Args:
        identity: Whose study.
        card: Whose heat map.
        grey: The image as the model got it, float32 [H,W].
        heat: float32 [h,w] in 0..1 over the whole image.
        source: The image's instance.
        run_key: Names the run.
    """
    pixels = _blend(grey, heat)
    now = datetime.now(UTC)
    image = Dataset()
    _stamp(image, identity)
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image.SOPClassUID = SecondaryCaptureImageStorage
    image.SOPInstanceUID = _uid("triage-run", run_key, "heat-map")
    image.SeriesInstanceUID = _uid("triage-run", run_key, "heat-map-series")
    image.Modality = source.modality
    image.Manufacturer = MANUFACTURER
    image.ManufacturerModelName = card.name
    image.SoftwareVersions = card.version
    image.SeriesNumber = _RESULT_SERIES + 1
    image.SeriesDescription = f"AI heat map: {card.title_en}"[:64]
    image.InstanceNumber = 1
    image.ContentDate, image.ContentTime = now.strftime("%Y%m%d"), now.strftime("%H%M%S")
    image.ConversionType = "WSD"  # PS3.3 C.8.6.1: workstation
    image.ImageType = ["DERIVED", "SECONDARY"]
    image.PatientOrientation = ""
    image.BurnedInAnnotation = "NO"  # the words in it identify nobody
    image.DerivationDescription = (
        f"Class activation map of {card.name} {card.version}, sha256 {card.sha256}; {card.status}; "
        f"{heat.shape[0]} x {heat.shape[1]} cells, interpolated"
    )[:1024]
    referenced = Dataset()
    referenced.ReferencedSOPClassUID = source.sop_class_uid
    referenced.ReferencedSOPInstanceUID = source.sop_instance_uid
    image.SourceImageSequence = [referenced]
    image.SamplesPerPixel, image.PhotometricInterpretation, image.PlanarConfiguration = 3, "RGB", 0
    image.Rows, image.Columns = pixels.shape[:2]
    image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 8, 8, 7, 0
    image.PixelData = pixels.tobytes()
    return _file(image)


def _blend(grey: NDArray[np.float32], heat: NDArray[np.float32]) -> NDArray[np.uint8]:
    scale = min(1.0, _LONGEST_SIDE / max(grey.shape))
    size = max(2, round(grey.shape[1] * scale / 2) * 2), max(2, round(grey.shape[0] * scale / 2) * 2)  # even: PS3.5 8.1
    low, high = np.percentile(grey, [1, 99])
    shown = np.clip((grey - low) / max(float(high - low), 1e-6), 0, 1).astype(np.float32)
    base = np.asarray(Image.fromarray(shown).resize(size, Image.Resampling.BOX))[..., None]
    warmth = np.asarray(Image.fromarray(heat.astype(np.float32)).resize(size, Image.Resampling.BICUBIC))
    warmth = np.clip(warmth, 0, 1)[..., None]
    colour = np.concatenate([np.ones_like(warmth), 1 - 0.8 * warmth, np.zeros_like(warmth)], axis=2)  # yellow to red
    share = _HEAT_SHARE * warmth
    blended = Image.fromarray(np.clip((base * (1 - share) + colour * share) * 255, 0, 255).astype(np.uint8))
    ImageDraw.Draw(blended).text((8, 8), "AI heat map - research only", fill=(255, 220, 120))
    return np.asarray(blended)


def _file(dataset: Dataset) -> bytes:
    syntax = dataset.file_meta.TransferSyntaxUID
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.file_meta.ImplementationClassUID = UID(IMPLEMENTATION_CLASS_UID)
    dataset.file_meta.ImplementationVersionName = IMPLEMENTATION_VERSION_NAME
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()
