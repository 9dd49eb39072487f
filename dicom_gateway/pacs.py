"""Hands a report to the hospital's own PACS: C-STORE as SCU (PS3.4 Annex B), in the character set that PACS reads.

One association a report. What the PACS says is sorted into three: stored, try again later, refused. It does not retry:
`returns.py` does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from io import BytesIO

import pydicom
from pydicom.dataset import FileDataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE
from pynetdicom.association import Association

from dicom_gateway.settings import GatewaySettings
from storage.errors import LinkError

_DUPLICATE_SOP_INSTANCE = 0x0111  # PS3.7 C.5.7: it has it already
_PROCESSING_FAILURE = 0x0110
_OUT_OF_RESOURCES = range(0xA700, 0xA800)
_WARNINGS = range(0xB000, 0xC000)
_TIMEOUT_S = 30.0


class Outcome(StrEnum):
    """What the PACS made of one object."""

    STORED = "stored"
    LATER = "later"  # out of resources, processing failure, or no answer
    REFUSED = "refused"  # it will say so again until a person changes something


@dataclass(frozen=True, slots=True)
class Answer:
    """The PACS's answer to one object, with the reason in words."""

    outcome: Outcome
    reason: str = ""


def in_character_set(data: bytes, character_set: str) -> FileDataset:
    """The DICOM file in `data`, its text written in `character_set` (PS3.3 C.12.1.1.2); UIDs and the PDF stay.

    Raises LinkError if `data` is not a DICOM file: it verified when it was received, so the disk lost it.
    """
    try:
        dataset = pydicom.dcmread(BytesIO(data))
    except (pydicom.errors.InvalidDicomError, EOFError) as error:
        raise LinkError("A stored report is no longer a DICOM file") from error
    if dataset.get("SpecificCharacterSet") != character_set:
        dataset.decode()
        dataset.SpecificCharacterSet = character_set
    return dataset


def send(settings: GatewaySettings, datasets: Sequence[FileDataset]) -> list[Answer]:
    """Store the data sets in one association; one answer each.

    Raises LinkError if the PACS cannot be reached or will not associate, saying which of the two.
    """
    if settings.pacs_host is None:
        raise LinkError("No PACS is configured (pacs_host)")
    ae = AE(ae_title=settings.ae_title)
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = ae.connection_timeout = _TIMEOUT_S
    for sop_class_uid in {dataset.SOPClassUID for dataset in datasets}:
        # A context each, so that a PACS may take one class and not another, in the encoding it likes.
        ae.add_requested_context(sop_class_uid, [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
    association = ae.associate(settings.pacs_host, settings.pacs_port, ae_title=settings.pacs_ae_title)
    if not association.is_established:
        raise LinkError(_why_not(association, settings))
    try:
        return [_store(association, dataset) for dataset in datasets]
    finally:
        if association.is_established:
            association.release()


def _why_not(association: Association, settings: GatewaySettings) -> str:
    place = f"{settings.pacs_ae_title} at {settings.pacs_host}:{settings.pacs_port}"
    if association.is_rejected:
        answer = association.acceptor.primitive  # A-ASSOCIATE-RJ, PS3.8 Table 9-21
        words = f"{answer.result_str}, {answer.reason_str}" if answer is not None else "no reason given"
        return f"The PACS {place} does not take an association from {settings.ae_title}: {words}"
    return f"The PACS {place} cannot be reached"


def _store(association: Association, dataset: FileDataset) -> Answer:
    if not association.is_established:
        return Answer(Outcome.LATER, "The PACS ended the association")
    try:
        status = association.send_c_store(dataset).get("Status")
    except ValueError:  # no accepted presentation context for this SOP class
        return Answer(Outcome.REFUSED, f"The PACS does not take {dataset.SOPClassUID.name}")
    except RuntimeError:  # the association ended between the check and the request
        return Answer(Outcome.LATER, "The PACS ended the association")
    if status is None:
        return Answer(Outcome.LATER, "The PACS did not answer")
    if status in (0x0000, _DUPLICATE_SOP_INSTANCE) or status in _WARNINGS:
        return Answer(Outcome.STORED)
    words = f"The PACS answered {status:04X} to {dataset.SOPClassUID.name}"
    later = status == _PROCESSING_FAILURE or status in _OUT_OF_RESOURCES
    return Answer(Outcome.LATER if later else Outcome.REFUSED, words)
