"""Sidecars: what the DICOMweb side needs of a pack without opening it: metadata and the places of frames and bulk data.

One sidecar lies beside each pack: zstd of JSON. Metadata is the DICOM JSON model (PS3.18 annex F) made straight from
the walk of `storage/dataset.py`, so nothing recurses, nothing is allocated by a declared length, and a value that
cannot be read costs that value only. What is not a data set raises MalformedDataSetError; the archive then keeps the
bytes with `minimal` metadata and the reason as a note.

All offsets are bytes from the instance's first byte; for the deflated transfer syntaxes, from the first byte of the
inflated data set. Bulk data and frames keep the byte order of the instance's transfer syntax.
"""

import json
from typing import Any

import zstandard
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from storage import character_sets, dataset, json_values
from storage.dataset import Data, DataSetLayout, Element
from storage.errors import MalformedDataSetError
from storage.wire import InstanceFacts

MAX_SIDECAR_BYTES = 512 * 1024 * 1024
MAX_METADATA_ELEMENTS = 300_000
"""About 150 MB of Python objects. A sequence that would go beyond becomes bulk data as a whole."""
MAX_METADATA_VALUE_BYTES = 32 * 1024 * 1024
"""Of all values of one instance together."""
MAX_INLINE_BINARY_BYTES = 1024
MAX_INLINE_TEXT_BYTES = 64 * 1024
MAX_FRAMES = 1_000_000
_NOT_METADATA = frozenset({dataset.PIXEL_DATA, dataset.EXTENDED_OFFSET_TABLE, 0x7FE00002})
_SPECIFIC_CHARACTER_SET, _PIXEL_REPRESENTATION = 0x00080005, 0x00280103
_MAX_NOTE = 500

Extent = tuple[int, int]


class InstanceSidecar(BaseModel):
    """One instance: its metadata, and where in it frames and bulk data lie."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    sop_instance_uid: str
    sha256: str
    sop_class_uid: str
    transfer_syntax_uid: str
    metadata: dict[str, Any]  # DICOM JSON model, without Pixel Data; text in Unicode
    frames: list[list[Extent]] = Field(default_factory=list)  # of each frame the pieces (offset, length), in order
    bulk: dict[str, Extent] = Field(default_factory=dict)  # tag path, as in BulkDataURI -> (offset, length)
    note: str = ""  # what could not be read, and why


class Sidecar(BaseModel):
    """All instances of one pack, in the pack's order."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: int = 1
    instances: list[InstanceSidecar]


def pack_sidecar(sidecar: Sidecar) -> bytes:
    """Encode: zstd of UTF-8 JSON."""
    text = json.dumps(sidecar.model_dump(), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return zstandard.ZstdCompressor(level=6).compress(text.encode())


def read_sidecar(packed: bytes) -> Sidecar:
    """Decode what `pack_sidecar` made. Raises MalformedDataSetError."""
    try:
        if zstandard.get_frame_parameters(packed).content_size > MAX_SIDECAR_BYTES:
            raise MalformedDataSetError(f"Sidecar is larger than {MAX_SIDECAR_BYTES} bytes")
        text = zstandard.ZstdDecompressor().decompress(packed, max_output_size=MAX_SIDECAR_BYTES)
        return Sidecar.model_validate_json(text)
    except (zstandard.ZstdError, ValidationError) as error:
        raise MalformedDataSetError(f"Sidecar cannot be read: {type(error).__name__}") from error


def minimal(facts: InstanceFacts, study_instance_uid: str, note: str) -> InstanceSidecar:
    """Sidecar of an instance that is kept but cannot be read: the UIDs the gateway gave, and why."""
    uids = {
        "00080005": ("CS", "ISO_IR 192"),
        "00080016": ("UI", facts.sop_class_uid),
        "00080018": ("UI", facts.sop_instance_uid),
        "0020000D": ("UI", study_instance_uid),
        "0020000E": ("UI", facts.series_instance_uid),
    }
    metadata = {tag: {"vr": vr, "Value": [value]} for tag, (vr, value) in uids.items()}
    return _sidecar(facts, metadata, [], {}, note)


def build(data: Data, facts: InstanceFacts, character_set: str) -> InstanceSidecar:
    """Sidecar of a data set as received. `character_set`: the repaired term, or "" for what the data set says.

    Bounded in time and memory by the size of `data`. Raises MalformedDataSetError where `data` is no data set. Pixel
    Data whose frames cannot be told apart only gives a note.
    """
    syntax = facts.transfer_syntax_uid
    source = memoryview(dataset.inflate(data) if syntax in dataset.DEFLATED_SYNTAXES else data)
    builder = _Builder(source, syntax, character_set)
    for element in dataset.walk(source, syntax):
        builder.add(element)
    frames: list[list[Extent]] = []
    notes = builder.notes
    if builder.layout is not None:
        try:
            frames = _frames(source, builder.layout, syntax, builder.root)
        except MalformedDataSetError as error:
            notes.append(f"No frames: {error.reason}")
    return _sidecar(facts, builder.root, frames, builder.bulk, "; ".join(notes))


def value(metadata: dict[str, Any], tag: str) -> Any:
    """First value of a top-level element of DICOM JSON metadata, or None. A PN gives its Alphabetic group."""
    values = metadata.get(tag, {}).get("Value") or [None]
    first = values[0]
    return first.get("Alphabetic", "") if isinstance(first, dict) and "vr" not in first else first


def integer(metadata: dict[str, Any], tag: str) -> int | None:
    """First value of a top-level element as an integer of 32 bits, or None where it is not one."""
    found = value(metadata, tag)
    if isinstance(found, float) and not found.is_integer():
        return None
    return int(found) if isinstance(found, int | float) and abs(found) < 2**31 else None


def text(metadata: dict[str, Any], tag: str, limit: int = 1024) -> str:
    """First value of a top-level element as text of at most `limit` characters; "" where there is none."""
    found = value(metadata, tag)
    return "" if found is None else str(found)[:limit]


def _codec_of(terms: list[str]) -> str:
    return character_sets.declared_codec(terms) or character_sets.DEFAULT


def _sidecar(
    facts: InstanceFacts, metadata: dict[str, Any], frames: list[list[Extent]], bulk: dict[str, Extent], note: str
) -> InstanceSidecar:
    return InstanceSidecar(
        sop_instance_uid=facts.sop_instance_uid,
        sha256=facts.sha256,
        sop_class_uid=facts.sop_class_uid,
        transfer_syntax_uid=facts.transfer_syntax_uid,
        metadata=metadata,
        frames=frames,
        bulk=bulk,
        note=note[:_MAX_NOTE],
    )


def _frames(
    data: memoryview, layout: DataSetLayout, transfer_syntax_uid: str, metadata: dict[str, Any]
) -> list[list[Extent]]:
    """Places of the frames, by the Image Pixel module (PS3.3 C.7.6.3)."""

    def number(tag: str, default: int) -> int:
        found = integer(metadata, tag)
        return default if found is None else found

    samples = number("00280002", 1)
    if layout.value_length is not None and value(metadata, "00280004") in ("YBR_FULL_422", "YBR_PARTIAL_422"):
        samples = 2  # PS3.3 C.7.6.3.1.2: two pixels share one CB and one CR
    frames = number("00280008", 1)
    if frames > MAX_FRAMES:
        raise MalformedDataSetError(f"Number of Frames is {frames}")
    return dataset.frame_extents(
        data,
        layout,
        transfer_syntax_uid,
        frames=frames,
        rows=number("00280010", 0),
        columns=number("00280011", 0),
        samples=samples,
        bits_allocated=number("00280100", 0),
    )


class _Level:
    """One data set (the root or an item) that elements are being added to."""

    def __init__(self, content: dict[str, Any], path: str, codec: str) -> None:
        self.content = content
        self.path = path  # of the data set itself: "" or "00081140/0/"
        self.codec = codec
        self.sequence: list[Any] = []  # Value of the sequence element last added here
        self.sequence_tag = ""


class _Builder:
    """Makes the DICOM JSON model from elements as the walk yields them."""

    def __init__(self, data: memoryview, transfer_syntax_uid: str, character_set: str) -> None:
        self._data = data
        self._big_endian = transfer_syntax_uid == dataset.EXPLICIT_VR_BIG_ENDIAN
        self._repaired = _codec_of([character_set]) if character_set else None
        self.root: dict[str, Any] = {}
        self.bulk: dict[str, Extent] = {}
        self.notes: list[str] = []
        self.layout: DataSetLayout | None = None
        self._levels = [_Level(self.root, "", self._repaired or character_sets.DEFAULT)]
        self._signed = False
        self._count = 0
        self._bytes = 0
        self._dropping = False  # inside a top-level sequence that is too large for metadata
        self._open: tuple[str, Element] | None = None  # the top-level sequence being read
        self._before_open = (0, 0)  # element count and bytes when it began

    def add(self, element: Element) -> None:
        """Take the next element of the walk."""
        if element.depth == 0:
            self._dropping = False
            self._open = None
        elif self._dropping:
            self._extend_dropped(element)
            return
        self._count += 1
        if self._count > MAX_METADATA_ELEMENTS or self._bytes > MAX_METADATA_VALUE_BYTES:
            if self._open is None:
                raise MalformedDataSetError(f"The header is too large: {self._count} elements, {self._bytes} bytes")
            self._drop(*self._open)
            self._extend_dropped(element)
            return
        if element.tag == json_values.ITEM:
            self._item(element)
        elif element.depth == 0 and element.tag == dataset.PIXEL_DATA:
            self._pixel_data(element)
        elif element.tag & 0xFFFF and not (element.depth == 0 and element.tag in _NOT_METADATA):
            self._element(element)

    def _pixel_data(self, element: Element) -> None:
        if self.layout is not None:
            raise MalformedDataSetError(f"Pixel Data a second time at byte {element.offset}")
        self.layout = DataSetLayout(element.offset, element.value_offset, element.length, element.end)

    def _item(self, element: Element) -> None:
        del self._levels[element.depth :]
        parent = self._levels[-1]
        path = f"{parent.path}{parent.sequence_tag}/{len(parent.sequence)}/"
        content: dict[str, Any] = {}
        parent.sequence.append(content)
        self._levels.append(_Level(content, path, parent.codec))

    def _element(self, element: Element) -> None:
        del self._levels[element.depth + 1 :]
        level = self._levels[-1]
        tag = f"{element.tag:08X}"
        if tag in level.content:
            self.notes.append(f"({tag}) stands twice; the first is shown")
            level.sequence, level.sequence_tag = [], f"{tag}+"  # items of the second go nowhere
            return
        vr = json_values.vr_of(element.tag, element.vr, signed=self._signed)
        entered = element.end == element.value_offset and element.length != 0
        if entered or vr == "SQ":
            level.sequence, level.sequence_tag = [], tag
            level.content[tag] = {"vr": "SQ", "Value": level.sequence}
            if element.depth == 0:
                self._open = (tag, element)
                self._before_open = (self._count, self._bytes)
            return
        level.content[tag] = self._value(level, tag, vr, element)
        if element.tag == _PIXEL_REPRESENTATION:
            self._signed = value(level.content, tag) == 1

    def _value(self, level: _Level, tag: str, vr: str, element: Element) -> dict[str, Any]:
        stop = element.end if element.length is None else element.value_offset + element.length
        length = stop - element.value_offset
        is_text = vr in json_values.TEXT_VRS
        if element.length is None or length > (MAX_INLINE_TEXT_BYTES if is_text else MAX_INLINE_BINARY_BYTES):
            uri = f"{level.path}{tag}"
            self.bulk[uri] = (element.value_offset, length)
            return {"vr": vr, "BulkDataURI": uri}
        self._bytes += length
        raw = bytes(self._data[element.value_offset : stop])
        if element.tag == _SPECIFIC_CHARACTER_SET:
            if self._repaired is None:
                level.codec = _codec_of(raw.decode("latin_1").strip(" \0").split("\\"))
            return {"vr": "CS", "Value": ["ISO_IR 192"]}  # JSON is UTF-8, whatever the data set was
        big_endian = self._big_endian and element.vr != b"UN"
        return json_values.element(vr, raw, level.codec, big_endian=big_endian)

    def _drop(self, tag: str, opened: Element) -> None:
        """Put the top-level sequence that is being read out of the metadata: it is too large to be shown."""
        prefix = f"{tag}/"
        self.bulk = {path: extent for path, extent in self.bulk.items() if not path.startswith(prefix)}
        self.root[tag] = {"vr": "SQ", "BulkDataURI": tag}
        self.bulk[tag] = (opened.value_offset, opened.length or 0)
        self.notes.append(f"({tag}) is too large to be shown")
        self._count, self._bytes = self._before_open
        self._dropping = True

    def _extend_dropped(self, element: Element) -> None:
        """A sequence of undefined length ends where its last element does (its delimiter is not yielded)."""
        if self._open is not None and self._open[1].length is None:
            tag, opened = self._open
            self.bulk[tag] = (opened.value_offset, max(self.bulk[tag][1], element.end - opened.value_offset))
