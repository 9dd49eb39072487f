"""Sidecars: DICOM JSON metadata, frame and bulk extents of real files and of hostile ones; and DICOM files given back.

pydicom is the second opinion on what a file says. Frames are compared with what pydicom cuts out of the pixel data.
"""

import io
import struct
import warnings
from datetime import UTC, datetime
from pathlib import Path

import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.encaps import generate_frames
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from storage import archive, sidecar
from storage.dataset import DEFLATED_SYNTAXES, inflate
from storage.errors import MalformedDataSetError
from storage.sidecar import InstanceSidecar, Sidecar
from storage.wire import InstanceFacts
from tests.ingest_peer import encode

LITTLE = "1.2.840.10008.1.2.1"


def facts(transfer_syntax_uid: str = LITTLE, size_bytes: int = 0) -> InstanceFacts:
    return InstanceFacts(
        sop_instance_uid="1.2",
        sop_class_uid="1.3",
        series_instance_uid="1.4",
        transfer_syntax_uid=transfer_syntax_uid,
        sha256="0" * 64,
        size_bytes=size_bytes,
        header_sha256="0" * 64,
        pixel_sha256="0" * 64,
        received_at=datetime.now(UTC),
    )


def data_set(path: Path) -> tuple[bytes, str]:
    """A file's data set and transfer syntax, without preamble and file meta information."""
    file = io.BytesIO(path.read_bytes())
    meta = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=[]).file_meta
    raw = file.getvalue()
    start = 128 + 4 + 12 + meta.FileMetaInformationGroupLength
    return raw[start:], str(meta.TransferSyntaxUID)


def build(ds: Dataset, syntax: str = LITTLE, character_set: str = "") -> InstanceSidecar:
    return sidecar.build(encode(ds, syntax), facts(syntax), character_set)


def real_files() -> list[Path]:
    """Files in pydicom's own package that have file meta information and are whole data sets.

    Not by `get_testdata_files`, which would try to download the others.
    """
    damaged = {"rtplan_truncated.dcm", "MR_truncated.dcm", "emri_small_jpeg_2k_lossless_too_short.dcm"}
    folder = Path(pydicom.__file__).parent / "data"
    found = []
    for path in [*folder.glob("test_files/*.dcm"), *folder.glob("charset_files/*.dcm")]:
        raw = path.read_bytes()
        has_group_length = raw[128:132] == b"DICM" and raw[132:138] == b"\x02\0\0\0UL"
        has_syntax = b"\x02\0\x10\0UI" in raw[:1024]
        if has_group_length and has_syntax and path.name not in damaged and b"1.2.840.10008.1.3.10" not in raw[:400]:
            found.append(path)
    return sorted(found)


def test_real_files_say_what_pydicom_says_and_their_frames_are_where_the_extents_point() -> None:
    seen = 0
    for name in real_files():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom's, about the values of its own test files
            ds = pydicom.dcmread(name)
            data, syntax = data_set(name)
            built = sidecar.build(data, facts(syntax), "")
            for tag in ("Modality", "StudyInstanceUID", "Rows", "PatientID", "SeriesDescription", "InstanceNumber"):
                expected = ds.get(tag)
                if expected not in (None, ""):
                    found = sidecar.value(built.metadata, f"{pydicom.datadict.tag_for_keyword(tag):08X}")
                    assert str(found).strip() == str(expected).strip(), (name, tag)
            if "PatientName" in ds and str(ds.PatientName):
                groups = built.metadata["00100010"]["Value"][0]
                theirs = [part.strip() for part in str(ds.PatientName).split("=")]
                ours = [groups.get(group, "") for group in ("Alphabetic", "Ideographic", "Phonetic")]
                assert ours[: len(theirs)] == theirs, name
            compare_frames(name, ds, inflate(data) if syntax in DEFLATED_SYNTAXES else data, built)
        packed = sidecar.pack_sidecar(Sidecar(instances=[built]))
        assert sidecar.read_sidecar(packed).instances[0] == built
        seen += 1
    assert seen > 80


def compare_frames(name: Path, ds: Dataset, data: bytes, built: InstanceSidecar) -> None:
    if not built.frames or "PixelData" not in ds:
        return
    cut = [b"".join(data[offset : offset + length] for offset, length in frame) for frame in built.frames]
    if ds.file_meta.TransferSyntaxUID.is_encapsulated:
        frames = list(generate_frames(ds.PixelData, number_of_frames=int(ds.get("NumberOfFrames") or 1)))
        assert cut == frames, name
    else:
        assert b"".join(cut) == ds.PixelData[: sum(map(len, cut))], name


def test_chinese_names_are_read_in_the_repaired_character_set_before_they_are_split() -> None:
    name = "誠^區=誠^區"  # GBK bytes with 0x5C and 0x5E in them
    ds = Dataset()
    raw = name.encode("gb18030")
    data = struct.pack("<HH2sH", 8, 5, b"CS", 10) + b"ISO_IR 100"
    data += struct.pack("<HH2sH", 0x10, 0x10, b"PN", len(raw)) + raw
    built = sidecar.build(data, facts(), "GB18030")
    assert built.metadata["00100010"]["Value"] == [{"Alphabetic": "誠^區", "Ideographic": "誠^區"}]
    assert built.metadata["00080005"]["Value"] == ["ISO_IR 192"]
    ds.SpecificCharacterSet, ds.PatientName = "GB18030", name
    assert build(ds).metadata["00100010"] == built.metadata["00100010"]


def test_text_that_fits_no_character_set_is_shown_with_replacements_and_never_fails() -> None:
    data = struct.pack("<HH2sH", 8, 5, b"CS", 10) + b"ISO_IR 192"
    data += struct.pack("<HH2sH", 0x10, 0x10, b"PN", 4) + b"A\xff\0B"
    assert sidecar.build(data, facts(), "").metadata["00100010"]["Value"] == [{"Alphabetic": "A\ufffdB"}]


def test_long_binary_values_are_bulk_data_with_their_place_and_short_ones_are_inline() -> None:
    wave = Dataset()
    wave.WaveformBitsAllocated = 16
    wave.add_new("WaveformData", "OW", bytes(range(256)) * 8)
    short = Dataset()
    short.add_new("WaveformData", "OW", b"\1\2")
    ds = Dataset()
    ds.WaveformSequence = [wave, short]
    data = encode(ds, LITTLE)
    built = sidecar.build(data, facts(), "")
    items = built.metadata["54000100"]["Value"]
    assert items[0]["54001010"] == {"vr": "OW", "BulkDataURI": "54000100/0/54001010"}
    offset, length = built.bulk["54000100/0/54001010"]
    assert data[offset : offset + length] == bytes(range(256)) * 8
    assert items[1]["54001010"] == {"vr": "OW", "InlineBinary": "AQI="}


def test_pixel_data_is_left_out_and_an_icon_image_is_not_taken_for_it() -> None:
    icon = Dataset()
    icon.Rows = icon.Columns = 64
    icon.add_new("PixelData", "OW", bytes(64 * 64))
    ds = Dataset()
    ds.IconImageSequence = [icon]
    ds.Rows = ds.Columns = 4
    ds.SamplesPerPixel, ds.BitsAllocated, ds.NumberOfFrames = 1, 8, 2
    ds.add_new("PixelData", "OW", b"A" * 16 + b"B" * 16)
    data = encode(ds, LITTLE)
    built = sidecar.build(data, facts(), "")
    assert "7FE00010" not in built.metadata and "00880200/0/7FE00010" in built.bulk
    assert [data[o : o + n] for ((o, n),) in built.frames] == [b"A" * 16, b"B" * 16]


def test_frames_of_subsampled_native_colour_take_two_bytes_a_pixel() -> None:
    ds = Dataset()
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 3, "YBR_FULL_422"
    ds.Rows = ds.Columns = 4
    ds.BitsAllocated, ds.NumberOfFrames = 8, 2
    ds.add_new("PixelData", "OB", bytes(64))
    assert [length for ((_, length),) in build(ds).frames] == [32, 32]


@pytest.mark.parametrize(
    ("frames", "rows", "says"),
    [("2000000000", 1, "Number of Frames"), ("5", 46341, "frames need"), ("1", 0, "no pixels")],
)
def test_a_header_that_declares_more_than_is_there_costs_its_frames_and_nothing_else(
    frames: str, rows: int, says: str
) -> None:
    ds = Dataset()
    ds.SamplesPerPixel, ds.BitsAllocated, ds.NumberOfFrames = 1, 8, frames
    ds.Rows = ds.Columns = rows
    ds.PatientID = "P1"
    ds.add_new("PixelData", "OB", bytes(16))
    built = build(ds)
    assert built.frames == [] and says in built.note
    assert sidecar.text(built.metadata, "00100020") == "P1"


def test_nesting_beyond_the_bound_is_malformed_and_not_a_crash() -> None:
    deep = b""
    for _ in range(2000):
        item = struct.pack("<HHL", 0xFFFE, 0xE000, len(deep)) + deep
        deep = struct.pack("<HH2sHL", 0x0040, 0xA730, b"SQ", 0, len(item)) + item
    with pytest.raises(MalformedDataSetError, match="deeper"):
        sidecar.build(deep, facts(), "")


def test_a_sequence_too_large_for_metadata_becomes_bulk_data_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sidecar, "MAX_METADATA_ELEMENTS", 50)
    small = Dataset()
    small.PatientID = "P1"
    ds = Dataset()
    ds.PatientID = "P1"
    ds.ReferencedStudySequence = [small]
    ds.PerFrameFunctionalGroupsSequence = [small] * 100
    ds.add_new(0x7FE10010, "LO", "after it")
    for undefined in (False, True):
        ds["PerFrameFunctionalGroupsSequence"].is_undefined_length = undefined
        data = encode(ds, LITTLE)
        built = sidecar.build(data, facts(), "")
        assert built.metadata["52009230"] == {"vr": "SQ", "BulkDataURI": "52009230"}
        assert built.metadata["7FE10010"]["Value"] == ["after it"]
        assert len(built.metadata["00081110"]["Value"]) == 1 and "52009230" in built.note
        offset, length = built.bulk["52009230"]
        assert data[offset : offset + length].count(b"P1") == 100


def test_a_header_too_large_at_top_level_is_malformed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sidecar, "MAX_METADATA_ELEMENTS", 2)
    ds = Dataset()
    ds.PatientID, ds.PatientName, ds.Modality = "P1", "A", "CT"
    with pytest.raises(MalformedDataSetError, match="too large"):
        build(ds)


def test_numbers_are_numbers_where_json_can_hold_them_and_text_where_it_cannot() -> None:
    data = struct.pack("<HH2sH3d", 0x0008, 0x0040, b"FD", 24, float("nan"), float("inf"), 1.5)
    data += struct.pack("<HH2sH", 0x0010, 0x1030, b"DS", 14) + b"1.5\\abc\\ 7\\1e9"
    data += struct.pack("<HH2sH", 0x0020, 0x0013, b"IS", 4) + b"1_0 "
    built = sidecar.build(data, facts(), "").metadata
    assert built["00080040"]["Value"] == ["NaN", "Infinity", 1.5]
    assert built["00101030"]["Value"] == [1.5, "abc", 7.0, 1e9]
    assert built["00200013"]["Value"] == ["1_0"] and sidecar.integer(built, "00200013") is None


def test_implicit_vr_takes_vrs_from_the_dictionary_and_private_elements_are_unknown() -> None:
    ds = Dataset()
    ds.PixelRepresentation = 1
    ds.add_new("SmallestImagePixelValue", "SS", -5)
    ds.add_new(0x00090010, "LO", "VENDOR")
    ds.add_new(0x00091001, "UN", b"\1\2\3\4")
    built = build(ds, ImplicitVRLittleEndian).metadata
    assert built["00280106"] == {"vr": "SS", "Value": [-5]}
    assert built["00090010"] == {"vr": "LO", "Value": ["VENDOR"]}
    assert built["00091001"] == {"vr": "UN", "InlineBinary": "AQIDBA=="}


def test_big_endian_words_are_inline_in_little_endian_as_json_has_them() -> None:
    data = struct.pack(">HH2sHLHH", 0x0028, 0x1201, b"OW", 0, 4, 1, 2)
    built = sidecar.build(data, facts("1.2.840.10008.1.2.2"), "")
    assert built.metadata["00281201"] == {"vr": "OW", "InlineBinary": "AQACAA=="}


def test_an_element_that_stands_twice_is_shown_once_with_a_note() -> None:
    one = struct.pack("<HH2sH", 0x10, 0x20, b"LO", 2) + b"P1"
    built = sidecar.build(one + one.replace(b"P1", b"P2"), facts(), "")
    assert sidecar.text(built.metadata, "00100020") == "P1" and "twice" in built.note


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_damaged_data_sets_are_read_or_malformed_and_nothing_else(data: st.DataObject) -> None:
    name = data.draw(
        st.sampled_from(["nested_priv_SQ.dcm", "reportsi.dcm", "examples_palette.dcm", "SC_rgb_rle_2frame.dcm"])
    )
    raw, syntax = data_set(Path(pydicom.__file__).parent / "data" / "test_files" / name)
    damaged = bytearray(raw[:20_000])
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    syntax = data.draw(st.sampled_from([syntax, ImplicitVRLittleEndian, ExplicitVRLittleEndian, "1.2.840.10008.1.2.2"]))
    try:
        built = sidecar.build(bytes(damaged), facts(syntax), data.draw(st.sampled_from(["", "GB18030", "ISO_IR 192"])))
    except MalformedDataSetError:
        return
    sidecar.read_sidecar(sidecar.pack_sidecar(Sidecar(instances=[built])))


def test_what_is_no_sidecar_is_malformed() -> None:
    import zstandard

    for junk in (b"", b"junk", zstandard.compress(b"[]"), zstandard.compress(b"{}")):
        with pytest.raises(MalformedDataSetError):
            sidecar.read_sidecar(junk)


def test_an_instance_is_given_back_as_a_dicom_file_that_pydicom_reads() -> None:
    ds = Dataset()
    ds.PatientID = "P1"
    data = encode(ds, ImplicitVRLittleEndian)
    file = archive.part10(
        data, sop_class_uid="1.2.3", sop_instance_uid="1.2.3.44", transfer_syntax_uid=ImplicitVRLittleEndian
    )
    read = pydicom.dcmread(io.BytesIO(file))
    assert read.PatientID == "P1" and read.file_meta.MediaStorageSOPInstanceUID == "1.2.3.44"
    assert file.endswith(data) and read.file_meta.TransferSyntaxUID == ImplicitVRLittleEndian
