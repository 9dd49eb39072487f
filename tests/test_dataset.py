"""storage/dataset.py: offsets in encoded data sets, held against pydicom's own parsing on every file that pydicom and
pydicom-data ship, on written data sets that hypothesis makes up, and on mutated bytes, where any answer but an error of
another kind is fine. Not covered: decoding of pixels, which the module does not do."""

import contextlib
import mmap
import random
import warnings
import zlib
from io import BytesIO

import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, encapsulate_extended, generate_fragmented_frames
from pydicom.filereader import dcmread
from pydicom.sequence import Sequence

from storage.dataset import (
    MAX_NESTING,
    PIXEL_DATA,
    find_pixel_data,
    frame_extents,
    inflate,
    top_level_values,
    walk,
)
from storage.errors import MalformedDataSetError
from tests.gateway_kit import data_set_of, encode, pydicom_files, sample

IMPLICIT, EXPLICIT, BIG, DEFLATED = (
    "1.2.840.10008.1.2",
    "1.2.840.10008.1.2.1",
    "1.2.840.10008.1.2.2",
    "1.2.840.10008.1.2.1.99",
)
JPEG = "1.2.840.10008.1.2.4.50"
BROKEN = {  # these are broken on purpose: cut off, or with an item longer than its sequence
    "rtplan_truncated.dcm",
    "MR_truncated.dcm",
    "emri_small_jpeg_2k_lossless_too_short.dcm",
    "DICOMDIR-nooffset",
}


@pytest.mark.parametrize("path", pydicom_files(), ids=lambda path: path.name)
def test_pixel_data_lies_where_pydicom_reads_it(path):
    transfer_syntax_uid, data = data_set_of(path)
    if path.name in BROKEN:
        with pytest.raises(MalformedDataSetError, match="at byte"):
            find_pixel_data(data, transfer_syntax_uid)
        return
    layout = find_pixel_data(data, transfer_syntax_uid)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = dcmread(path, force=True)
        pixel_data = read.get_item("PixelData") if PIXEL_DATA in read else None
    if pixel_data is None or transfer_syntax_uid == DEFLATED:
        assert layout.element_offset is None and layout.end_offset == len(data)
        return
    assert layout.element_offset is not None and layout.value_offset is not None
    if layout.value_length is not None:
        assert data[layout.value_offset : layout.end_offset] == pixel_data.value
        assert layout.value_offset + layout.value_length == layout.end_offset
        return
    frames = int(read.get("NumberOfFrames", 1) or 1)
    expected = [list(pieces) for pieces in generate_fragmented_frames(read.PixelData, number_of_frames=frames)]
    found = frame_extents(
        data, layout, transfer_syntax_uid, frames=frames, rows=1, columns=1, samples=1, bits_allocated=8
    )
    assert [[data[start : start + length] for start, length in pieces] for pieces in found] == expected


@pytest.mark.parametrize("path", [path for path in pydicom_files() if path.name not in BROKEN], ids=lambda p: p.name)
def test_top_level_values_are_pydicoms(path):
    transfer_syntax_uid, data = data_set_of(path)
    if transfer_syntax_uid == DEFLATED:
        data, transfer_syntax_uid = inflate(data), EXPLICIT
    tags = {0x00080016, 0x00080018, 0x0020000D, 0x00100010, 0x00080005}
    values = top_level_values(data, transfer_syntax_uid, tags)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = dcmread(path, force=True)
        for tag in tags:
            assert (tag in values) == (tag in read)
            if tag in values and tag not in (0x00080005, 0x00100010):
                assert values[tag].strip(b"\0 ").decode() == str(read[tag].value or "").strip()


values = st.recursive(
    st.builds(lambda text: ("LO", text), st.text("ABC abc", max_size=20).map(str.strip)),
    lambda inner: st.builds(lambda items: ("SQ", items), st.lists(st.lists(inner, max_size=3), max_size=3)),
    max_leaves=12,
)
SEQUENCES = (0x00081110, 0x00081115, 0x00081140)  # public tags, so that implicit VR knows them for sequences
TEXTS = (0x00081030, 0x0008103E, 0x00081090)


def filled(content, undefined):
    data_set = Dataset()
    for number, (vr, value) in enumerate(content):
        if vr == "LO":
            data_set.add_new(TEXTS[number % 3], "LO", value)
        else:
            data_set.add_new(SEQUENCES[number % 3], "SQ", Sequence([filled(item, undefined) for item in value]))
            data_set[SEQUENCES[number % 3]].is_undefined_length = undefined
            for item in data_set[SEQUENCES[number % 3]].value:
                item.is_undefined_length_sequence_item = undefined
    return data_set


@given(st.lists(values, max_size=3), st.booleans(), st.sampled_from([IMPLICIT, EXPLICIT, BIG]), st.binary(max_size=64))
def test_whatever_is_written_before_pixel_data_it_is_found(content, undefined, transfer_syntax_uid, pixels):
    data_set = filled(content, undefined)
    header = encode(data_set, transfer_syntax_uid)
    data_set.add_new("PixelData", "OB", pixels + b"\0" * (len(pixels) % 2))
    data_set.add_new(0xFFFCFFFC, "OB", b"\0\0")
    data = encode(data_set, transfer_syntax_uid)
    layout = find_pixel_data(data, transfer_syntax_uid)
    assert layout.element_offset == len(header)
    assert layout.value_offset is not None
    assert data[layout.value_offset : layout.end_offset] == data_set.PixelData
    assert find_pixel_data(memoryview(data), transfer_syntax_uid) == layout


@given(st.lists(values, min_size=1, max_size=3), st.booleans(), st.sampled_from([IMPLICIT, EXPLICIT, BIG]), st.data())
def test_a_data_set_cut_inside_an_element_is_refused(content, undefined, transfer_syntax_uid, data):
    whole = encode(filled(content, undefined), transfer_syntax_uid)
    boundaries = {element.offset for element in walk(whole, transfer_syntax_uid) if element.depth == 0} | {len(whole)}
    cut = data.draw(st.integers(1, len(whole)).filter(lambda at: at not in boundaries))
    if any(whole[max(b for b in boundaries if b < cut) : cut]):  # what is only zeros may be padding
        with pytest.raises(MalformedDataSetError, match="byte"):
            find_pixel_data(whole[:cut], transfer_syntax_uid)


def some_data_sets():
    return [data_set_of(path) for path in pydicom_files() if path.stat().st_size < 40_000]


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**32))
def test_mutated_bytes_are_parsed_or_refused_and_nothing_else(seed):
    dice = random.Random(seed)
    transfer_syntax_uid, data = dice.choice(MUTABLE)
    mutant = bytearray(data)
    for _ in range(dice.choice([1, 3, 20])):
        if mutant:
            position = dice.randrange(min(len(mutant), dice.choice([300, 3000, 10**9])))
            mutant[position] = dice.choice([0, 255, dice.randrange(256)])
    if dice.random() < 0.3:
        del mutant[dice.randrange(len(mutant) + 1) :]
    try:
        layout = find_pixel_data(bytes(mutant), transfer_syntax_uid)
        top_level_values(bytes(mutant), transfer_syntax_uid, {0x00080005, 0x00100010})
        if layout.value_offset is not None:
            frame_extents(
                bytes(mutant), layout, transfer_syntax_uid, frames=dice.choice([0, 1, 7]),
                rows=dice.choice([0, 512]), columns=512, samples=1, bits_allocated=dice.choice([1, 8, 16]),
            )  # fmt: skip
    except MalformedDataSetError as error:
        assert len(error.reason) < 200


MUTABLE = some_data_sets()


@settings(max_examples=300)
@given(st.binary(max_size=400), st.sampled_from([IMPLICIT, EXPLICIT, BIG, DEFLATED, JPEG]))
def test_any_bytes_at_all_are_parsed_or_refused(data, transfer_syntax_uid):
    with contextlib.suppress(MalformedDataSetError):
        find_pixel_data(data, transfer_syntax_uid)


def nested(depth, transfer_syntax_uid):
    inner = Dataset()
    for _ in range(depth):
        outer = Dataset()
        outer.add_new(0x00081140, "SQ", Sequence([inner]))
        outer[0x00081140].is_undefined_length = True
        inner = outer
    return encode(inner, transfer_syntax_uid)


@pytest.mark.parametrize("transfer_syntax_uid", [IMPLICIT, EXPLICIT])
def test_nesting_beyond_the_limit_is_refused_and_up_to_it_is_read(transfer_syntax_uid):
    find_pixel_data(nested(MAX_NESTING, transfer_syntax_uid), transfer_syntax_uid)
    with pytest.raises(MalformedDataSetError, match="nested deeper than 64"):
        find_pixel_data(nested(MAX_NESTING + 1, transfer_syntax_uid), transfer_syntax_uid)


def test_ten_thousand_levels_do_not_end_the_parsers_stack():
    bomb = (bytes.fromhex("0800401153510000ffffffff") + bytes.fromhex("feff00e0ffffffff")) * 10_000
    with pytest.raises(MalformedDataSetError, match="nested deeper"):
        find_pixel_data(bomb, EXPLICIT)


def test_an_icon_image_is_not_the_pixel_data():
    icon = Dataset()
    icon.add_new("PixelData", "OW", b"\1\2\3\4")
    data_set = sample()
    data_set.add_new(0x00880200, "SQ", Sequence([icon]))
    data = encode(data_set)
    layout = find_pixel_data(data, EXPLICIT)
    assert layout.value_offset is not None
    assert data[layout.value_offset : layout.end_offset] == data_set.PixelData


def test_pixel_data_twice_is_refused():
    data_set = Dataset()
    data_set.add_new("PixelData", "OW", b"\1\2")
    with pytest.raises(MalformedDataSetError, match="a second time"):
        find_pixel_data(encode(data_set, EXPLICIT) * 2, EXPLICIT)


def test_a_deflate_bomb_is_refused_before_it_is_large():
    packer = zlib.compressobj(wbits=-15)
    bomb = b"".join([*(packer.compress(bytes(1024 * 1024)) for _ in range(300)), packer.flush()])
    assert len(bomb) < 1_000_000
    with pytest.raises(MalformedDataSetError, match="grows beyond"):
        find_pixel_data(bomb, DEFLATED)


def test_a_mapped_file_is_read_without_copying(tmp_path):
    path = tmp_path / "data-set"
    path.write_bytes(encode(sample()))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert find_pixel_data(mapped, EXPLICIT) == find_pixel_data(path.read_bytes(), EXPLICIT)


def encapsulated(value, *before):
    data_set = Dataset()
    for tag, vr, content in before:
        data_set.add_new(tag, vr, content)
    data_set.add_new("PixelData", "OB", value)
    data_set["PixelData"].is_undefined_length = True
    return encode(data_set, EXPLICIT)


def frames_of(data, frames):
    layout = find_pixel_data(data, JPEG)
    found = frame_extents(data, layout, JPEG, frames=frames, rows=1, columns=1, samples=1, bits_allocated=8)
    return [b"".join(data[start : start + length] for start, length in pieces) for pieces in found]


@given(
    st.lists(st.binary(min_size=8, max_size=40).map(lambda b: b + b"\0" * (len(b) % 2)), min_size=1, max_size=6),
    st.integers(1, 3),
)
def test_frames_are_found_by_the_basic_offset_table(frames, fragments):
    assert (
        frames_of(encapsulated(encapsulate(frames, fragments_per_frame=fragments, has_bot=True)), len(frames)) == frames
    )


def test_frames_are_found_by_the_extended_offset_table():
    frames = [b"abcd", b"efghij", b"kl"]
    value, offsets, lengths = encapsulate_extended(frames)
    data = encapsulated(value, (0x7FE00001, "OV", offsets), (0x7FE00002, "OV", lengths))
    assert frames_of(data, 3) == frames


def test_frames_without_a_table_are_found_one_a_fragment_or_by_code_stream_ends():
    assert frames_of(encapsulated(encapsulate([b"ab", b"cd"], has_bot=False)), 2) == [b"ab", b"cd"]
    streams = [b"\xff\xd8" + b"abcdefgh" * 4 + b"\xff\xd9", b"\xff\xd8" + b"ijklmnop" * 4 + b"\xff\xd9"]
    assert frames_of(encapsulated(encapsulate(streams, fragments_per_frame=2, has_bot=False)), 2) == streams


def test_fragments_that_cannot_be_told_apart_are_refused():
    with pytest.raises(MalformedDataSetError, match="cannot be shared"):
        frames_of(encapsulated(encapsulate([b"abcdefgh"] * 2, fragments_per_frame=2, has_bot=False)), 2)


def test_a_video_is_one_entry_whatever_its_number_of_frames():
    data = encapsulated(encapsulate([b"abcdefgh"], has_bot=False))
    layout = find_pixel_data(data, "1.2.840.10008.1.2.4.102")
    found = frame_extents(
        data, layout, "1.2.840.10008.1.2.4.102", frames=300, rows=1, columns=1, samples=1, bits_allocated=8
    )
    assert len(found) == 1


def test_native_frames_are_computed_and_must_fit():
    data_set = Dataset()
    data_set.add_new("PixelData", "OW", bytes(range(16)))
    data = encode(data_set, EXPLICIT)
    layout = find_pixel_data(data, EXPLICIT)
    shape = {"rows": 2, "columns": 2, "samples": 1}
    found = frame_extents(data, layout, EXPLICIT, frames=2, bits_allocated=16, **shape)
    assert [data[start : start + length] for ((start, length),) in found] == [bytes(range(8)), bytes(range(8, 16))]
    with pytest.raises(MalformedDataSetError, match="16 bytes, 3 frames need 24"):
        frame_extents(data, layout, EXPLICIT, frames=3, bits_allocated=16, **shape)
    with pytest.raises(MalformedDataSetError, match="whole bytes"):
        frame_extents(data, layout, EXPLICIT, frames=2, bits_allocated=1, **shape)
    assert len(frame_extents(data, layout, EXPLICIT, frames=1, bits_allocated=1, **shape)) == 1
    with pytest.raises(MalformedDataSetError, match="no pixels"):
        frame_extents(data, layout, EXPLICIT, frames=1, rows=0, columns=2, samples=1, bits_allocated=8)


def test_a_data_set_without_pixel_data_has_no_frames():
    data = encode(Dataset(), EXPLICIT)
    with pytest.raises(MalformedDataSetError, match="no Pixel Data"):
        frame_extents(
            data, find_pixel_data(data, EXPLICIT), EXPLICIT, frames=1, rows=1, columns=1, samples=1, bits_allocated=8
        )


def test_pydicom_reads_on_from_every_walked_offset():
    transfer_syntax_uid, data = data_set_of(next(p for p in pydicom_files() if p.name == "CT_small.dcm"))
    for element in walk(data, transfer_syntax_uid):
        if element.depth == 0:
            read = pydicom.filereader.read_dataset(
                BytesIO(data[element.offset :]), False, True, stop_when=lambda tag, vr, length, t=element.tag: tag != t
            )
            assert element.tag in read
