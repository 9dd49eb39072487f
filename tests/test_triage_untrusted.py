"""Data sets as somebody sent them: damaged, lying, deflated, nested; and nothing of them in the log."""

import subprocess
import sys
import zlib

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from ai_triage.images import grey_image
from ai_triage.untrusted import EXPLICIT_VR_LITTLE_ENDIAN, parse_data_set
from storage.errors import MalformedDataSetError
from tests.triage_material import computed_radiograph

DEFLATED = "1.2.840.10008.1.2.1.99"


def _encoded(dataset: Dataset) -> bytes:
    buffer = pydicom.filebase.DicomBytesIO()
    buffer.is_little_endian, buffer.is_implicit_VR = True, False
    pydicom.filewriter.write_dataset(buffer, dataset)
    return buffer.getvalue()


def _parse(data: bytes, transfer_syntax_uid: str = EXPLICIT_VR_LITTLE_ENDIAN) -> Dataset:
    return parse_data_set(
        data,
        sop_class_uid="1.2.840.10008.5.1.4.1.1.1",
        sop_instance_uid="1.2.3",
        transfer_syntax_uid=transfer_syntax_uid,
    )


@pytest.fixture(autouse=True)
def _as_in_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pydicom.config.settings, "reading_validation_mode", pydicom.config.IGNORE)


@pytest.fixture
def encoded() -> bytes:
    dataset = computed_radiograph(np.arange(256, dtype=np.uint8).reshape(16, 16))
    del dataset.file_meta
    return _encoded(dataset)


def test_a_data_set_is_read_as_it_was_received(encoded: bytes) -> None:
    parsed = _parse(encoded)
    assert parsed.Rows == 16
    assert parsed.file_meta.TransferSyntaxUID == EXPLICIT_VR_LITTLE_ENDIAN
    assert parsed.PixelData == bytes(range(256))


def test_a_deflated_data_set_is_inflated_within_bounds(encoded: bytes) -> None:
    deflate = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    assert _parse(deflate.compress(encoded) + deflate.flush(), DEFLATED).PixelData == bytes(range(256))
    with pytest.raises(MalformedDataSetError):
        _parse(b"\xff" * 100, DEFLATED)


def test_a_data_set_cut_anywhere_gives_no_image_but_a_named_error(encoded: bytes) -> None:
    for end in range(0, len(encoded), 7):  # pydicom reads many of the pieces without a word
        with pytest.raises(MalformedDataSetError):
            grey_image(_parse(encoded[:end]))


def test_a_value_that_cannot_be_read_counts_as_absent(encoded: bytes) -> None:
    whole = _parse(encoded)
    samples = b"\x28\x00\x02\x00US\x02\x00\x01\x00"
    assert encoded.count(samples) == 1
    damaged = _parse(encoded.replace(samples, b"\x28\x00\x02\x00US\x01\x00\x01"))
    assert "SamplesPerPixel" in whole
    assert "SamplesPerPixel" not in damaged
    assert damaged.Rows == 16


def test_sequences_nested_beyond_the_stack_are_refused_by_name() -> None:
    depth = 5000
    opening = b"\x08\x00\x40\x11SQ\x00\x00\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
    with pytest.raises(MalformedDataSetError):
        _parse(opening * depth)


def test_a_worker_says_nothing_of_the_values_it_reads() -> None:
    program = """
import io, pydicom, warnings
from ai_triage.images import grey_image
from ai_triage.untrusted import parse_data_set, prepare_worker
prepare_worker()
data = b"\\x10\\x00\\x30\\x00DA\\x0c\\x00secret-birth" + b"\\x10\\x00\\x10\\x10AS\\x06\\x00secret"
parsed = parse_data_set(data, sop_class_uid="1.2", sop_instance_uid="1.2.3", transfer_syntax_uid="1.2.840.10008.1.2.1")
str(parsed.get("PatientBirthDate")), str(parsed.get("PatientAge"))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "secret" not in done.stdout + done.stderr
