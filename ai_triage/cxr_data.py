"""The chest radiographs of Kermany et al. 2018 (CC BY 4.0) as arrays, split by patient, and their augmentation.

The two classes of this collection differ in ways that have nothing to do with lungs: the size of the JPEG file alone
separates them with an AUC of about 0.9, the standard deviation of the pixels with about 0.7. So every training image
is cropped, resampled, blurred, recompressed, given another contrast and another border before the model sees it.
"""

import hashlib
import io
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Split = Literal["train", "validation", "test"]

_PNEUMONIA = re.compile(r"person(\d+)_")
_NORMAL = re.compile(r"IM-(\d+)-")

# Twentieths of the patients: 14 learn, 3 choose temperature and operating point, 3 are only ever measured on.
_TRAIN_TWENTIETHS, _VALIDATION_TWENTIETHS = 14, 3


@dataclass(frozen=True)
class Radiograph:
    """One image: `pixels` uint8 [H,W], `label` 1 for pneumonia, `file_bytes` the size of the JPEG it came as."""

    name: str
    patient: str
    label: int
    pixels: NDArray[np.uint8]
    file_bytes: int


def patient_of(name: str) -> str:
    """The patient an archive member belongs to.

    `IM-0115-…` and `NORMAL2-IM-0115-…` may be two children or one: counted as one, so that no child is on two sides.

    Raises:
        ValueError: the name follows neither of the collection's patterns.
    """
    if match := _PNEUMONIA.search(name):
        return f"person{int(match[1])}"
    if match := _NORMAL.search(name):
        return f"normal{int(match[1])}"
    raise ValueError(f"no patient in the file name {name!r}")


def split_of(patient: str) -> Split:
    """The side a patient is on: by a digest of the name, so it needs no seed and never changes with the order."""
    twentieth = int(hashlib.sha256(f"cxr-split-1:{patient}".encode()).hexdigest()[:8], 16) % 20
    if twentieth < _TRAIN_TWENTIETHS:
        return "train"
    return "validation" if twentieth < _TRAIN_TWENTIETHS + _VALIDATION_TWENTIETHS else "test"


def read_radiographs(archive: Path) -> list[Radiograph]:
    """Every image of the tar archive (members `NORMAL/*.jpeg`, `PNEUMONIA/*.jpeg`), in name order."""
    found: list[Radiograph] = []
    with tarfile.open(archive) as tar:
        for member in tar:
            stream = tar.extractfile(member) if member.isfile() else None
            if stream is None:
                continue
            data = stream.read()
            with Image.open(io.BytesIO(data)) as image:
                pixels = np.asarray(image.convert("L"))
            label = int(member.name.startswith("PNEUMONIA/"))
            found.append(Radiograph(member.name, patient_of(member.name), label, pixels, len(data)))
    return sorted(found, key=lambda radiograph: radiograph.name)


def of_split(radiographs: Sequence[Radiograph], split: Split) -> list[Radiograph]:
    """Those of one side."""
    return [radiograph for radiograph in radiographs if split_of(radiograph.patient) == split]


def recompressed(image: Image.Image, quality: int) -> Image.Image:
    """The image after a JPEG round trip at that quality (1 to 95)."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    buffer.seek(0)
    return Image.open(buffer).convert("L")


def blurred(image: Image.Image, sigma_pixels: float) -> Image.Image:
    """The image after a Gaussian blur."""
    return image.filter(ImageFilter.GaussianBlur(sigma_pixels))


def augmented(pixels: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.float32]:
    """A changed copy of an image, float32 [H,W] in 0..255; what is changed is what tells the classes apart unfairly."""
    image = Image.fromarray(pixels)
    width, height = image.size
    # Turn a little, then cut a window whose sides are drawn apart: position, size and aspect ratio say nothing.
    image = image.rotate(float(rng.uniform(-8, 8)), Image.Resampling.BILINEAR)
    cut_w, cut_h = (float(rng.uniform(0.78, 1.0)) for _ in range(2))
    left, top = float(rng.uniform(0, 1 - cut_w)) * width, float(rng.uniform(0, 1 - cut_h)) * height
    box = (left, top, left + cut_w * width, top + cut_h * height)
    # Resolution: some images lose detail, so that sharpness says nothing.
    side = int(rng.integers(80, width)) if rng.random() < 0.5 else width
    image = image.resize((side, side), Image.Resampling.BILINEAR, box=box)
    if rng.random() < 0.4:
        image = blurred(image, float(rng.uniform(0.3, 1.6)) * side / width)
    values = np.asarray(image, dtype=np.float32) / 255.0
    values = values ** float(rng.uniform(0.6, 1.6))
    if rng.random() < 0.4:
        values = values + rng.normal(0, rng.uniform(0.005, 0.04), values.shape).astype(np.float32)
    # Brightness and contrast, with clipping as films have it.
    values = (values - 0.5) * float(rng.uniform(0.6, 1.5)) + 0.5 + float(rng.uniform(-0.15, 0.15))
    values = np.clip(values, 0, 1)
    image = Image.fromarray((values * 255).astype(np.uint8)).resize((width, height), Image.Resampling.BILINEAR)
    if rng.random() < 0.7:
        image = recompressed(image, int(rng.integers(12, 92)))
    changed: NDArray[Any] = np.array(image, dtype=np.float32)
    if rng.random() < 0.3:  # collimation: a border of one grey level on any of the sides
        level = float(rng.choice([0.0, 0.0, 255.0, rng.uniform(0, 255)]))
        top_px, bottom_px, left_px, right_px = (int(rng.integers(0, width // 9)) for _ in range(4))
        changed[:top_px] = level
        changed[height - bottom_px :] = level
        changed[:, :left_px] = level
        changed[:, width - right_px :] = level
    for _ in range(int(rng.integers(0, 3))):  # side markers and leads: patches that go away
        y, x = int(rng.integers(0, height)), int(rng.integers(0, width))
        changed[y : y + int(rng.integers(8, 40)), x : x + int(rng.integers(8, 40))] = float(rng.uniform(0, 255))
    return changed
