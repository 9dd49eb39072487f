"""Where things lie in an encoded data set, without decoding or re-encoding it (PS3.5 chapter 7 and annex A).

Gateway and centre keep every data set byte for byte, so all they need is offsets: the pixel data, its frames, a few
elements of the header. `walk` goes through the elements once, iteratively, with bounded nesting and every length
checked against what is really there; nothing is allocated by a length that a file declares, except in `inflate`,
which has a ceiling. Any input gives an answer or MalformedDataSetError: never another error, never endless work.

All offsets are bytes from the start of the data set (no preamble, no file meta information).
"""

import mmap
import struct
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from pydicom._dicom_dict import DicomDictionary

from storage.errors import MalformedDataSetError

Data = bytes | bytearray | memoryview | mmap.mmap

MAX_NESTING = 64
"""Sequences inside sequences. Real objects nest below 10; parsers that recurse fall over at about 300."""
MAX_ELEMENTS = 4_000_000
"""About 6 s of walking: far above the largest enhanced multi-frame header, far below a denial of service."""
MAX_INFLATED_BYTES = 256 * 1024 * 1024
"""Ceiling for a deflated data set, which must be held in memory whole to be looked into."""
MAX_PADDING_BYTES = 64 * 1024
"""Zero bytes after the last element that are taken for padding: old writers fill up a disk block."""

IMPLICIT_VR_LITTLE_ENDIAN = "1.2.840.10008.1.2"
EXPLICIT_VR_BIG_ENDIAN = "1.2.840.10008.1.2.2"
PAPYRUS_IMPLICIT_VR = "1.2.840.10008.1.20"
IMPLICIT_SYNTAXES = frozenset({IMPLICIT_VR_LITTLE_ENDIAN, PAPYRUS_IMPLICIT_VR})
DEFLATED_SYNTAXES = frozenset(
    {"1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.4.95", "1.2.840.10008.1.2.4.205"}  # Deflated; JPIP deflate
)
VIDEO_SYNTAXES = frozenset(
    f"1.2.840.10008.1.2.4.{tail}"
    for tail in ("100", "100.1", "101", "101.1", "102", "102.1", "103", "103.1", "104", "104.1", "105", "105.1", "106",
                 "106.1", "107", "108")
)  # fmt: skip
"""MPEG2, H.264, H.265: one stream, whose frames are found only by decoding (PS3.5 8.2.5 to 8.2.8)."""

PIXEL_DATA = 0x7FE00010
EXTENDED_OFFSET_TABLE = 0x7FE00001
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_UNDEFINED = 0xFFFFFFFF

# PS3.5 Table 7.1-2: these have a 16-bit length; every other VR, known or not, has 32 bits after two reserved bytes.
_SHORT_LENGTH_VRS = frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())
_SEQUENCE_TAGS = frozenset(tag for tag, entry in DicomDictionary.items() if entry[0] == "SQ")


class Element(NamedTuple):
    """One element, or one item of a sequence (tag FFFE,E000), as it lies in the data set."""

    depth: int  # 0: top level; 1: an item of a top-level sequence or what is in it; …
    tag: int
    vr: bytes  # b"" where none is written (implicit VR, items)
    offset: int
    value_offset: int
    length: int | None  # None: undefined
    end: int  # for a sequence or an item of undefined length: where its content starts


@dataclass(frozen=True)
class DataSetLayout:
    """Where Pixel Data (7FE0,0010) lies at top level; all None where there is none (or it is inside a deflated stream).

    `end_offset` is the first byte after the element (after its Sequence Delimitation Item), or the end of the data set
    where there is no such element. `value_length` None: undefined length, encapsulated (PS3.5 A.4).
    """

    element_offset: int | None
    value_offset: int | None
    value_length: int | None
    end_offset: int


def _name(tag: int) -> str:
    return f"({tag >> 16:04X},{tag & 0xFFFF:04X})"


def _at(tag: int, offset: int, what: str) -> MalformedDataSetError:
    return MalformedDataSetError(f"{_name(tag)} at byte {offset}: {what}")


def inflate(data: Data) -> bytes:
    """The Explicit VR Little Endian data set inside a deflated one (PS3.5 A.5, RFC 1951).

    Raises MalformedDataSetError if it is no such stream, ends early, or grows beyond MAX_INFLATED_BYTES.
    """
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        out = stream.decompress(bytes(data), MAX_INFLATED_BYTES + 1)
    except zlib.error as error:
        raise MalformedDataSetError(f"Deflated data set of {len(data)} bytes cannot be inflated") from error
    if len(out) > MAX_INFLATED_BYTES:
        raise MalformedDataSetError(f"Deflated data set grows beyond {MAX_INFLATED_BYTES} bytes")
    if not stream.eof:
        raise MalformedDataSetError(f"Deflated stream is truncated at byte {len(data)}")
    return out


class _Reader:
    """Element headers of one encoding, each length checked against its limit."""

    def __init__(self, data: Data, transfer_syntax_uid: str) -> None:
        order = ">" if transfer_syntax_uid == EXPLICIT_VR_BIG_ENDIAN else "<"
        self.data = data
        self.explicit = transfer_syntax_uid not in IMPLICIT_SYNTAXES
        self._tag = struct.Struct(order + "HH").unpack_from
        self._u16 = struct.Struct(order + "H").unpack_from
        self._u32 = struct.Struct(order + "L").unpack_from
        self._read = 0

    def header(self, offset: int, limit: int, explicit: bool) -> tuple[int, bytes, int | None, int]:
        """(tag, VR, length, value offset) of what starts at `offset`; a defined length ends at or before `limit`."""
        self._read += 1
        if self._read > MAX_ELEMENTS:
            raise MalformedDataSetError(f"More than {MAX_ELEMENTS} elements, counted up to byte {offset}")
        if limit - offset < 8:
            raise MalformedDataSetError(f"Truncated at byte {offset}: {limit - offset} bytes left, an element needs 8")
        group, number = self._tag(self.data, offset)
        tag = group << 16 | number
        vr, value = b"", offset + 8
        if explicit and group != 0xFFFE:
            vr = bytes(self.data[offset + 4 : offset + 6])
            if vr in _SHORT_LENGTH_VRS:
                length = self._u16(self.data, offset + 6)[0]
            elif vr.isalpha() and vr.isupper():
                value = offset + 12
                if value > limit:
                    raise _at(tag, offset, f"truncated, {limit - offset} bytes left")
                length = self._u32(self.data, offset + 8)[0]
            else:  # some writers fall back to implicit VR inside sequences; pydicom reads them the same way
                vr, length = b"", self._u32(self.data, offset + 4)[0]
        else:
            length = self._u32(self.data, offset + 4)[0]
        if length == _UNDEFINED and vr not in _SHORT_LENGTH_VRS:
            return tag, vr, None, value
        if length > limit - value:
            raise _at(tag, offset, f"{length} bytes announced, {limit - value} left")
        return tag, vr, length, value

    def fragments(self, offset: int, limit: int) -> Iterator[tuple[int, int]]:
        """(offset, length) of each item of an encapsulated value, then (end of the delimiter, -1) (PS3.5 A.4)."""
        while True:
            tag, _, length, value = self.header(offset, limit, False)
            if tag == _SEQUENCE_END:
                yield value, -1
                return
            if tag != _ITEM or length is None:
                raise _at(tag, offset, "stands where a fragment of encapsulated data was expected")
            yield value, length
            offset = value + length

    def is_padding(self, offset: int) -> bool:
        """Whether nothing but zero bytes is left, and not too many of them."""
        left = len(self.data) - offset
        return left <= MAX_PADDING_BYTES and not any(bytes(self.data[offset:]))


class _Open(NamedTuple):
    """A sequence or an item that the walk is inside of."""

    is_item: bool
    end: int | None  # None: ends with its delimiter
    limit: int
    explicit: bool


def _is_sequence(tag: int, vr: bytes, length: int | None) -> bool:
    if vr == b"SQ":
        return True
    if length is None:  # undefined length of anything but fragments is a sequence (PS3.5 6.2.2 for UN)
        return vr not in (b"OB", b"OW") and tag != PIXEL_DATA
    return vr in (b"", b"UN") and tag in _SEQUENCE_TAGS


def walk(data: Data, transfer_syntax_uid: str) -> Iterator[Element]:
    """Every element in order, those inside sequences too. A deflated data set is inflated by the caller first.

    Raises MalformedDataSetError, with the byte, at the first thing that cannot be: truncation, a length beyond its
    container, nesting beyond MAX_NESTING, items where none belong.
    """
    reader = _Reader(data, transfer_syntax_uid)
    size, offset = len(data), 0
    stack: list[_Open] = [_Open(True, size, size, reader.explicit)]
    while stack:
        is_item, end, limit, explicit = stack[-1]
        if offset == end or (len(stack) == 1 and size - offset < 8 and reader.is_padding(offset)):
            stack.pop()
            continue
        start = offset
        tag, vr, length, value = reader.header(offset, limit, explicit)
        depth = len(stack) - 1
        if not is_item:
            if tag == _SEQUENCE_END and end is None:
                stack.pop()
                offset = value
            elif tag == _ITEM:
                yield Element(depth // 2 + 1, tag, vr, start, value, length, value)
                item_end = None if length is None else value + length
                stack.append(_Open(True, item_end, limit if item_end is None else item_end, explicit))
                offset = value
            else:
                raise _at(tag, start, "stands where an item of a sequence was expected")
        elif tag == _ITEM_END and end is None:
            stack.pop()
            offset = value
        elif tag >> 16 == 0xFFFE:
            raise _at(tag, start, "item or delimiter outside a sequence")
        elif tag == 0 and len(stack) == 1 and reader.is_padding(start):
            return
        elif _is_sequence(tag, vr, length):
            if depth // 2 >= MAX_NESTING:
                raise _at(tag, start, f"sequences are nested deeper than {MAX_NESTING}")
            yield Element(depth // 2, tag, vr, start, value, length, value)
            ends = None if length is None else value + length
            # PS3.5 6.2.2: what is inside a UN is Implicit VR Little Endian, whatever is around it.
            stack.append(_Open(False, ends, limit if ends is None else ends, explicit and vr != b"UN"))
            offset = value
        else:
            if length is None:
                for offset, _ in reader.fragments(value, limit):  # noqa: B007 - the last one is the delimiter's end
                    pass
            else:
                offset = value + length
            yield Element(depth // 2, tag, vr, start, value, length, offset)


def find_pixel_data(data: Data, transfer_syntax_uid: str) -> DataSetLayout:
    """Check the whole data set's structure and say where its top-level Pixel Data is (never an icon's).

    A deflated data set is inflated and checked, and is all header. Raises MalformedDataSetError.
    """
    if transfer_syntax_uid in DEFLATED_SYNTAXES:
        for _ in walk(inflate(data), transfer_syntax_uid):
            pass
        return DataSetLayout(None, None, None, len(data))
    found: Element | None = None
    for element in walk(data, transfer_syntax_uid):
        if element.tag == PIXEL_DATA and element.depth == 0:
            if found is not None:
                raise _at(PIXEL_DATA, element.offset, f"Pixel Data a second time, the first at byte {found.offset}")
            found = element
    if found is None:
        return DataSetLayout(None, None, None, len(data))
    return DataSetLayout(found.offset, found.value_offset, found.length, found.end)


def top_level_values(data: Data, transfer_syntax_uid: str, tags: Collection[int]) -> dict[int, bytes]:
    """Raw values of those top-level elements that are there and have a defined length, each at most 64 KiB.

    Stops after the highest tag asked for, so that a header's few facts do not cost a walk through the rest. Longer
    values are cut: no fact that is asked for this way is that long. Raises MalformedDataSetError.
    """
    values: dict[int, bytes] = {}
    last = max(tags, default=0)
    for element in walk(data, transfer_syntax_uid):
        if element.depth == 0:
            if element.tag > last:
                break
            if element.tag in tags and element.length is not None:
                stop = element.value_offset + min(element.length, 65536)
                values.setdefault(element.tag, bytes(data[element.value_offset : stop]))
    return values


def frame_extents(
    data: Data,
    layout: DataSetLayout,
    transfer_syntax_uid: str,
    *,
    frames: int,
    rows: int,
    columns: int,
    samples: int,
    bits_allocated: int,
) -> list[list[tuple[int, int]]]:
    """For each frame, the pieces (offset, length) that its bytes lie in, in order; native frames have one piece.

    Encapsulated: by the Extended Offset Table (PS3.3 C.7.6.3.1.8), the Basic Offset Table (PS3.5 A.4), one fragment a
    frame, or code stream ends, in that order. A video stream is given whole, as one entry. Raises MalformedDataSetError
    where there is no Pixel Data, it is shorter than its frames, frames of single bits do not start on bytes, or the
    fragments cannot be told apart.
    """
    if layout.value_offset is None:
        raise MalformedDataSetError("There is no Pixel Data to take frames from")
    if frames < 1:
        raise MalformedDataSetError(f"Number of Frames is {frames}")
    if layout.value_length is not None:
        frame_bits = rows * columns * samples * bits_allocated
        return _native_extents(layout.value_offset, layout.value_length, frames, frame_bits)
    reader = _Reader(data, transfer_syntax_uid)
    items = [piece for piece in reader.fragments(layout.value_offset, layout.end_offset) if piece[1] >= 0]
    if not items:
        raise _at(PIXEL_DATA, layout.value_offset, "encapsulated, without a Basic Offset Table item")
    table, pieces = items[0], items[1:]
    if not pieces:
        raise _at(PIXEL_DATA, layout.value_offset, "encapsulated, without fragments")
    if frames == 1 or transfer_syntax_uid in VIDEO_SYNTAXES:
        return [pieces]
    offsets = _extended_offsets(data, transfer_syntax_uid, frames)
    if not offsets and table[1]:
        offsets = list(struct.unpack(f"<{table[1] // 4}L", bytes(data[table[0] : table[0] + table[1] // 4 * 4])))
    if offsets:
        return _by_offsets(pieces, offsets, frames)
    if len(pieces) == frames:
        return [[piece] for piece in pieces]
    return _by_code_stream_ends(data, pieces, frames)


def _native_extents(offset: int, length: int, frames: int, frame_bits: int) -> list[list[tuple[int, int]]]:
    if frame_bits <= 0:
        raise MalformedDataSetError("A frame has no pixels")
    if frame_bits % 8 and frames > 1:
        raise MalformedDataSetError(f"Frames of {frame_bits} bits do not start on whole bytes")
    frame_bytes = (frame_bits + 7) // 8
    if frames * frame_bytes > length:
        raise _at(PIXEL_DATA, offset, f"{length} bytes, {frames} frames need {frames * frame_bytes}")
    return [[(offset + index * frame_bytes, frame_bytes)] for index in range(frames)]


def _extended_offsets(data: Data, transfer_syntax_uid: str, frames: int) -> list[int]:
    value = top_level_values(data, transfer_syntax_uid, {EXTENDED_OFFSET_TABLE}).get(EXTENDED_OFFSET_TABLE, b"")
    return list(struct.unpack(f"<{frames}Q", value)) if len(value) == 8 * frames else []


def _by_offsets(pieces: list[tuple[int, int]], offsets: list[int], frames: int) -> list[list[tuple[int, int]]]:
    """Offsets count from the first byte of the first fragment's item tag (PS3.5 A.4)."""
    first = pieces[0][0] - 8
    index_of = {value - 8 - first: index for index, (value, _) in enumerate(pieces)}
    starts = [index_of.get(offset) for offset in offsets]
    if len(offsets) != frames or starts[0] != 0:
        raise MalformedDataSetError(f"Offset table has {len(offsets)} entries for {frames} frames")
    bounds: list[int] = []
    for start in starts:
        if start is None or (bounds and start <= bounds[-1]):
            raise MalformedDataSetError("Offset table points beside the fragments")
        bounds.append(start)
    return [pieces[start:stop] for start, stop in zip(bounds, [*bounds[1:], len(pieces)], strict=True)]


def _by_code_stream_ends(data: Data, pieces: list[tuple[int, int]], frames: int) -> list[list[tuple[int, int]]]:
    """A JPEG, JPEG-LS or JPEG 2000 code stream ends with FFD9, and a frame starts a new fragment."""
    groups: list[list[tuple[int, int]]] = [[]]
    for offset, length in pieces:
        groups[-1].append((offset, length))
        if b"\xff\xd9" in bytes(data[max(offset, offset + length - 10) : offset + length]):
            groups.append([])
    if not groups[-1]:
        groups.pop()
    if len(groups) != frames:
        raise MalformedDataSetError(f"{len(pieces)} fragments cannot be shared among {frames} frames without offsets")
    return groups
