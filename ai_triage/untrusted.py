"""Reading data sets that somebody sent us: what may go wrong is a named error, and memory has a limit.

Decoding happens in the worker process, which may die of it; the job's start was counted before (storage/jobs.py).
"""

import io
import resource
import struct

import pydicom
from pydicom import config as pydicom_config
from pydicom.dataset import Dataset
from pydicom.errors import BytesLengthException, InvalidDicomError

from storage import archive, dataset
from storage.errors import MalformedDataSetError

EXPLICIT_VR_LITTLE_ENDIAN = "1.2.840.10008.1.2.1"

# What pydicom raises on damaged, lying or unsupported data sets.
DAMAGED = (
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    RuntimeError,  # RecursionError too
    NotImplementedError,
    OverflowError,
    OSError,
    EOFError,
    MemoryError,
    struct.error,
    InvalidDicomError,
    BytesLengthException,
)


def prepare_worker(memory_limit_bytes: int | None = None) -> None:
    """For the start of a worker process: pydicom quiet, memory bounded.

    pydicom's warnings quote values that break the standard, so patient data, into the log; reading then takes values
    as they are. `memory_limit_bytes` bounds private memory (RLIMIT_DATA): a file that wants more gets a MemoryError,
    which is an answer, where the kernel's would be a kill.
    """
    pydicom_config.settings.reading_validation_mode = pydicom_config.IGNORE
    if memory_limit_bytes is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (memory_limit_bytes, hard))


def parse_data_set(data: bytes, *, sop_class_uid: str, sop_instance_uid: str, transfer_syntax_uid: str) -> Dataset:
    """A data set as received (no file meta information) as pydicom has it; pixel data is not decoded.

    An element whose value cannot be read counts as absent.

    Raises:
        MalformedDataSetError: it cannot be read, or inflates beyond bounds.
    """
    if transfer_syntax_uid in dataset.DEFLATED_SYNTAXES:
        data, transfer_syntax_uid = bytes(dataset.inflate(data)), EXPLICIT_VR_LITTLE_ENDIAN
    try:
        parsed = pydicom.dcmread(
            io.BytesIO(
                archive.part10(
                    data,
                    sop_class_uid=sop_class_uid,
                    sop_instance_uid=sop_instance_uid,
                    transfer_syntax_uid=transfer_syntax_uid,
                )
            )
        )
        _drop_unreadable(parsed)
    except DAMAGED as error:
        raise MalformedDataSetError(f"The data set cannot be read: {type(error).__name__}") from error
    return parsed


def _drop_unreadable(parsed: Dataset) -> None:
    """Read every value once: pydicom reads them when asked, and would raise in the middle of a model."""
    for tag in list(parsed.keys()):
        try:
            element = parsed[tag]
        except DAMAGED:
            del parsed[tag]
            continue
        if element.VR == "SQ":
            for item in element.value:
                _drop_unreadable(item)
