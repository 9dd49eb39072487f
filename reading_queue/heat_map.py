"""A model's heat map, kept as DICOM Secondary Capture, as a PNG that a page can show (RFC 2083, ISO/IEC 15948)."""

import struct
import zlib
from io import BytesIO

import numpy as np
import pydicom
from numpy.typing import NDArray

from storage.errors import MalformedDataSetError

_MAX_PIXELS = 4096 * 4096
_COLOUR_TYPE = {2: 0, 3: 2}  # axes of the array: grey [h,w], RGB [h,w,3]


def png(file: bytes) -> bytes:
    """PNG of an 8-bit Secondary Capture file (PS3.10). Raises MalformedDataSetError for anything else."""
    data_set = pydicom.dcmread(BytesIO(file))
    if int(data_set.Rows) * int(data_set.Columns) > _MAX_PIXELS or data_set.BitsAllocated != 8:
        raise MalformedDataSetError("The heat map is no 8-bit picture of a size that is shown")
    return encode(np.ascontiguousarray(data_set.pixel_array))


def encode(pixels: NDArray[np.uint8]) -> bytes:
    """PNG of pixels, uint8 [h,w] or [h,w,3]."""
    if pixels.ndim not in _COLOUR_TYPE or pixels.dtype != np.uint8:
        raise MalformedDataSetError(f"No picture: {pixels.dtype} with {pixels.ndim} axes")
    height, width = pixels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOUR_TYPE[pixels.ndim], 0, 0, 0)
    lines = b"".join(b"\0" + line.tobytes() for line in pixels)  # filter 0: none
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
