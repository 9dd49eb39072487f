"""Frames and bulk data of an instance as bytes for the web (PS3.18 10.4.1.1.6 and 10.4.1.1.5).

Always little endian: Explicit VR Big Endian is retired and not allowed on the web (PS3.18 8.7.3.1), so its words are
turned round here. Compressed frames go as they lie in the archive.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from storage import dataset, sidecar
from storage.dicomweb.errors import BadRequestError
from storage.dicomweb.extents import Extent
from storage.dicomweb.library import Library, StoredInstance
from storage.dicomweb.media_types import OCTET_STREAM, PDF
from storage.errors import NotFoundError
from storage.sidecar import InstanceSidecar

MAX_FRAMES_ASKED = 10_000
_WORD_BYTES = {"OW": 2, "US": 2, "SS": 2, "OF": 4, "OL": 4, "FL": 4, "UL": 4, "SL": 4, "OD": 8, "OV": 8, "FD": 8}
_NATIVE_HEADER_BYTES = 12  # of (7FE0,0010) in explicit VR: tag, VR, two reserved bytes, 32-bit length
_ENCAPSULATED_DOCUMENT, _ENCAPSULATED_DOCUMENT_LENGTH, _MIME_TYPE = "00420011", "00420015", "00420012"


def frame_numbers(text: str, available: int) -> list[int]:
    """Numbers of a frame list, `1,2,5`. Raises BadRequestError, or NotFoundError beyond 1 … `available`."""
    fields = text.split(",")
    if len(fields) > MAX_FRAMES_ASKED:
        raise BadRequestError(f"More than {MAX_FRAMES_ASKED} frames in one request")
    numbers: list[int] = []
    for item in fields:
        if not (item.isascii() and item.isdigit()) or len(item) > 9:
            raise BadRequestError("A frame list is whole numbers with commas between them")
        numbers.append(int(item))
    if any(not 1 <= number <= available for number in numbers):
        raise NotFoundError(f"Frames 1 to {available} are here" if available else "This instance has no frames")
    return numbers


def read_frames(
    library: Library, stored: StoredInstance, instance: InstanceSidecar, numbers: Sequence[int]
) -> Iterator[bytes]:
    """Bytes of those frames, one after another; the first read happens when the first is asked for."""
    if stored.transfer_syntax_uid == dataset.EXPLICIT_VR_BIG_ENDIAN:
        word = _pixel_word_bytes(library, stored, instance)
        for number in numbers:
            (extent,) = instance.frames[number - 1]
            yield _read_swapped(library, stored, extent, word)
        return
    wanted = [instance.frames[number - 1] for number in numbers]
    source = library.extents(stored, [piece for pieces in wanted for piece in pieces])
    for pieces in wanted:
        yield b"".join(source.next() for _ in pieces)


def size_of_frames(instance: InstanceSidecar, numbers: Sequence[int]) -> int:
    """Bytes of those frames together."""
    return sum(length for number in numbers for _, length in instance.frames[number - 1])


def _pixel_word_bytes(library: Library, stored: StoredInstance, instance: InstanceSidecar) -> int:
    """Bytes that stand the other way round in big endian pixels (PS3.5 annex D): 8-bit ones only where VR is OW."""
    bits = sidecar.integer(instance.metadata, "00280100") or 8
    if bits > 8:
        return bits // 8
    start = instance.frames[0][0][0] - _NATIVE_HEADER_BYTES
    header = library.extents(stored, [(start, _NATIVE_HEADER_BYTES)]).next()
    return 2 if header[4:6] == b"OW" else 1


def _read_swapped(library: Library, stored: StoredInstance, extent: Extent, word: int) -> bytes:
    """An extent of a big endian value, little endian. A frame of odd length shares a word with its neighbour."""
    offset, length = extent
    if word == 1:
        return library.extents(stored, [extent]).next()
    before = offset % 2 if word == 2 else 0  # elements start at even offsets (PS3.5 7.1)
    after = -(before + length) % word
    raw = library.extents(stored, [(offset - before, before + length + after)]).next()
    swapped = bytearray(len(raw))
    for index in range(word):
        swapped[index::word] = raw[word - 1 - index :: word]
    return bytes(swapped[before : before + length])


def read_bulk(library: Library, stored: StoredInstance, instance: InstanceSidecar, path: str) -> bytes:
    """The value at a tag path (`54000100/0/54001010`). Raises NotFoundError if there is no such bulk value."""
    extent = instance.bulk.get(path)
    if extent is None:
        raise NotFoundError("No such bulk data in this instance")
    offset, length = extent
    if path == _ENCAPSULATED_DOCUMENT:
        # PS3.3 C.24.2: the true length, for the element's is padded to even.
        true_length = sidecar.integer(instance.metadata, _ENCAPSULATED_DOCUMENT_LENGTH)
        if true_length is not None and length - 1 <= true_length <= length:
            length = true_length
    word = 1
    if stored.transfer_syntax_uid == dataset.EXPLICIT_VR_BIG_ENDIAN:
        word = _WORD_BYTES.get(_vr_at(instance.metadata, path), 1)
    return _read_swapped(library, stored, (offset, length), word if length % word == 0 else 1)


def bulk_media_type(instance: InstanceSidecar, path: str) -> str:
    """Media type of a bulk value. Of documents only PDF is named as itself: anything else a file claims to be (HTML,
    SVG) stays opaque bytes, lest a browser runs it with our cookies."""
    mime_type = sidecar.text(instance.metadata, _MIME_TYPE).strip().lower()
    return PDF if path == _ENCAPSULATED_DOCUMENT and mime_type == PDF else OCTET_STREAM


def _vr_at(metadata: dict[str, Any], path: str) -> str:
    *steps, last = path.split("/")
    level = metadata
    for tag, index in zip(steps[::2], steps[1::2], strict=True):
        level = level[tag]["Value"][int(index)]
    return str(level[last]["vr"])
