"""Pixels of an untrusted data set: one grey image, its declared size bounded before anything is decoded.

A file may declare 46341 x 46341 pixels in 10 KB, or carry a compressed frame that is larger than the data set says.
Both are looked at first: the data set's attributes, then the size in the frame's own header. What gets past that is
decoded in the worker process, which may die of it: the job's start was counted before (storage/jobs.py).
"""

import struct

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.encaps import generate_frames
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import UID

from ai_triage.untrusted import DAMAGED
from storage.errors import MalformedDataSetError

MAX_PIXELS = 100_000_000

_J2K_CODE_STREAM = b"\xff\x4f\xff\x51"  # SOC, SIZ: ISO/IEC 15444-1 A.5.1
_JPEG_FRAMES = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # SOFn (ISO/IEC 10918-1 B.2.2), SOF55 (JPEG-LS)
_STAND_ALONE = {0x01, *range(0xD0, 0xDA)}


def coded_size(frame: bytes) -> tuple[int, int] | None:
    """(rows, columns) in a compressed frame's own header (JPEG 2000, HTJ2K, JPEG, JPEG-LS). None: not stated there."""
    siz = frame.find(_J2K_CODE_STREAM, 0, 4096)  # within 4 KiB: a JP2 box may stand before the code stream
    if siz >= 0 and len(frame) >= siz + 24:
        right, bottom, left, top = struct.unpack_from(">4I", frame, siz + 8)
        return bottom - top, right - left
    if not frame.startswith(b"\xff\xd8"):
        return None
    at = 2
    while at + 9 <= len(frame) and frame[at] == 0xFF:
        marker = frame[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker in _STAND_ALONE:
            at += 2
        elif marker in _JPEG_FRAMES:
            rows, columns = struct.unpack_from(">2H", frame, at + 5)
            return rows, columns
        else:
            at += 2 + int(struct.unpack_from(">H", frame, at + 2)[0])
    return None


def _checked(dataset: Dataset) -> tuple[int, int]:
    try:
        rows, columns = int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0)
        frames, samples = int(dataset.get("NumberOfFrames") or 1), int(dataset.get("SamplesPerPixel") or 1)
        bits = int(dataset.get("BitsAllocated") or 0)
    except (TypeError, ValueError) as error:
        raise MalformedDataSetError("The image's size is not stated in whole numbers") from error
    if rows < 1 or columns < 1 or "PixelData" not in dataset:
        raise MalformedDataSetError("The data set has no image")
    if rows * columns > MAX_PIXELS:
        raise MalformedDataSetError(f"The image declares {rows} x {columns} pixels, more than {MAX_PIXELS:,}")
    if frames != 1 or samples != 1 or bits not in {8, 16}:
        raise MalformedDataSetError(
            f"Not one grey image of 8 or 16 bit: {frames} frames, {samples} samples, {bits} bit"
        )
    syntax = UID(str(dataset.file_meta.TransferSyntaxUID))
    if syntax.is_encapsulated:
        frame = next(generate_frames(dataset.PixelData, number_of_frames=1), b"")
        size = coded_size(frame)
        if size is not None and size != (rows, columns):
            raise MalformedDataSetError(f"The compressed frame is {size[0]} x {size[1]}, not {rows} x {columns}")
    elif len(dataset.PixelData) < rows * columns * bits // 8:
        raise MalformedDataSetError(f"The pixel data is shorter than {rows} x {columns} pixels of {bits} bit")
    return rows, columns


def grey_image(dataset: Dataset) -> NDArray[np.float32]:
    """The image, float32 [H,W], in the modality's units (PS3.3 C.11.1), larger is brighter on a film.

    MONOCHROME1 is inverted here; MONAI's reader would not. Pixel padding (PS3.3 C.7.5.1.1.2) becomes black.

    Raises:
        MalformedDataSetError: no single grey image, larger than MAX_PIXELS, or not decodable.
    """
    try:
        return _grey(dataset, *_checked(dataset))
    except DAMAGED as error:
        raise MalformedDataSetError(f"The image cannot be decoded: {type(error).__name__}") from error


def _grey(dataset: Dataset, rows: int, columns: int) -> NDArray[np.float32]:
    stored, _ = get_decoder(UID(str(dataset.file_meta.TransferSyntaxUID))).as_array(dataset, index=0, raw=True)
    if stored.shape != (rows, columns):
        raise MalformedDataSetError(f"The image decodes to {stored.shape}, not {rows} x {columns}")
    slope, intercept = (float(dataset.get(f"Rescale{part}") or 0) for part in ("Slope", "Intercept"))
    # In place and in single precision: the largest image allowed takes 400 MB here, and not three times as much.
    values: NDArray[np.float32] = stored.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # an impossible slope is found out below
        values *= np.float32(slope or 1.0)
        values += np.float32(intercept)
    if not np.isfinite(values).all():
        raise MalformedDataSetError("The image's rescale slope or intercept is impossible")
    if str(dataset.get("PhotometricInterpretation")) == "MONOCHROME1":
        np.negative(values, out=values)
    if "PixelPaddingValue" in dataset:
        padding = stored == dataset.PixelPaddingValue
        if padding.any() and not padding.all():
            values[padding] = values[~padding].min()
    return values
