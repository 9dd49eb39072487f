"""Chest radiographs: untrusted pixels, what the model refuses, and what it says of children it never saw.

Left out: training (hours of it); its split, augmentation and resumption are covered with a few images. Held-out
children need the shared data.
"""

import hashlib
import io
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom.uid import JPEG2000Lossless

from ai_triage.cxr_data import Radiograph, augmented, of_split, patient_of, read_radiographs, split_of
from ai_triage.images import MAX_PIXELS, coded_size, grey_image
from ai_triage.interface import StudyFacts
from storage.errors import MalformedDataSetError
from tests.triage_material import CHILD, CXR, computed_radiograph, held_out, packaged, shared


@pytest.fixture(scope="module")
def gradient() -> np.ndarray:
    return np.tile(np.arange(256, dtype=np.uint8), (256, 1))


def test_an_adult_chest_is_outside_the_evidence() -> None:
    dataset = packaged("RG1_UNCR.dcm")
    facts = StudyFacts("county-a", ("CR",), "CHEST", 64.5)
    assert CXR.card.accepts.asks_for(facts)
    suitability = CXR.suits(facts, [dataset])
    assert not suitability.accepted
    assert "age outside the evidence: 1 to 5 years" in suitability.reason
    assert "64" not in suitability.reason  # no patient data in a reason


@pytest.mark.parametrize(
    ("age", "view", "part", "said"),
    [
        (None, "AP", "CHEST", "age not known"),
        (3.0, "LL", "CHEST", "not a frontal"),
        (3.0, "", "CHEST", "not a frontal"),
        (3.0, "AP", "ABDOMEN", "not the chest"),
        (3.0, "AP", "", "not the chest"),
    ],
)
def test_what_is_not_a_frontal_chest_of_a_young_child_is_not_for_this_model(
    gradient: np.ndarray, age: float | None, view: str, part: str, said: str
) -> None:
    dataset = computed_radiograph(gradient, view=view)
    dataset.BodyPartExamined = part
    suitability = CXR.suits(StudyFacts("county-a", ("CR",), part, age), [dataset])
    assert not suitability.accepted
    assert said in suitability.reason


def test_the_frontal_image_is_read_where_a_lateral_comes_with_it(gradient: np.ndarray) -> None:
    lateral, frontal = computed_radiograph(gradient, view="LL"), computed_radiograph(gradient, view="PA")
    assert CXR.suits(CHILD, [lateral, frontal]).accepted
    assert CXR.run([lateral, frontal]).input_uids == (frontal.SOPInstanceUID,)


def test_children_it_never_saw_are_told_apart() -> None:
    sick, well = held_out(1, 12), held_out(0, 12)
    findings = [CXR.run([computed_radiograph(r.pixels)]).findings[0] for r in (*sick, *well)]
    called = [finding.positive for finding in findings]
    assert sum(called[:12]) >= 11
    assert sum(called[12:]) <= 2
    assert {finding.minutes_earlier for finding in findings} == {0, 60}


def test_monochrome1_and_sixteen_bits_change_nothing() -> None:
    radiograph = held_out(1, 1)[0]
    plain = CXR.run([computed_radiograph(radiograph.pixels)]).findings[0].probability
    deep = computed_radiograph(radiograph.pixels.astype(np.uint16) * 16)
    deep.RescaleSlope, deep.RescaleIntercept = "2", "-100"
    inverted = computed_radiograph(255 - radiograph.pixels)
    inverted.PhotometricInterpretation = "MONOCHROME1"
    for dataset in (deep, inverted):
        assert CXR.run([dataset]).findings[0].probability == pytest.approx(plain, abs=0.01)


def test_the_heat_map_is_a_map_over_the_image_and_repeats(gradient: np.ndarray) -> None:
    dataset = computed_radiograph(held_out(1, 1)[0].pixels)
    first, second = CXR.run([dataset]), CXR.run([dataset])
    assert first.heat_map is not None
    assert second.heat_map is not None
    assert first.heat_map.dtype == np.float32
    assert first.heat_map.shape == (8, 8)
    assert first.heat_map.max() == pytest.approx(1)
    assert first.heat_map.min() >= 0
    assert np.array_equal(first.heat_map, second.heat_map)
    assert first.findings == second.findings


def test_a_compressed_image_is_the_same_image() -> None:
    assert np.array_equal(grey_image(packaged("RG1_UNCR.dcm")), grey_image(packaged("RG1_J2KR.dcm")))


def test_monochrome1_is_inverted_and_padding_becomes_black() -> None:
    dataset = packaged("RG1_UNCR.dcm")
    assert dataset.PhotometricInterpretation == "MONOCHROME1"
    image = grey_image(dataset)
    stored = dataset.pixel_array.astype(np.float32)
    assert np.corrcoef(image.ravel(), stored.ravel())[0, 1] < -0.99
    dataset.PixelPaddingValue = int(stored.min())  # shown white in MONOCHROME1, so inverted it would be bright
    padded = grey_image(dataset)
    assert padded[stored == stored.min()].max() == padded.min()


def test_a_declared_size_beyond_the_bound_is_refused_before_decoding(gradient: np.ndarray) -> None:
    dataset = computed_radiograph(gradient)
    dataset.Rows = dataset.Columns = 46341
    with pytest.raises(MalformedDataSetError, match=f"more than {MAX_PIXELS:,}"):
        grey_image(dataset)


def test_a_compressed_frame_larger_than_declared_is_refused_before_decoding() -> None:
    dataset = packaged("RG1_J2KR.dcm")
    siz = dataset.PixelData.index(b"\xff\x4f\xff\x51")
    size = struct.pack(">2I", 46341, 46341)
    dataset.PixelData = dataset.PixelData[: siz + 8] + size + dataset.PixelData[siz + 16 :]
    with pytest.raises(MalformedDataSetError, match="The compressed frame is 46341 x 46341"):
        grey_image(dataset)


def test_the_size_of_jpeg_frames_is_read_from_their_headers(gradient: np.ndarray) -> None:
    for progressive in (False, True):
        buffer = io.BytesIO()
        Image.fromarray(gradient[:100]).save(buffer, "JPEG", progressive=progressive)
        assert coded_size(buffer.getvalue()) == (100, 256)
    assert coded_size(b"\xff\xd8\xff") is None
    assert coded_size(b"") is None


def test_damaged_pixels_are_a_named_error(gradient: np.ndarray) -> None:
    short = computed_radiograph(gradient)
    short.PixelData = short.PixelData[:1000]
    many = computed_radiograph(gradient)
    many.NumberOfFrames = 5
    colour = computed_radiograph(gradient)
    colour.SamplesPerPixel = 3
    steep = computed_radiograph(gradient)
    steep.RescaleSlope, steep.RescaleIntercept = "1e308", "0"
    none = computed_radiograph(gradient)
    del none.PixelData
    garbage = packaged("RG1_J2KR.dcm")
    garbage.PixelData = garbage.PixelData[:200] + b"\0" * (len(garbage.PixelData) - 200)
    truncated = packaged("RG1_J2KR.dcm")
    truncated.PixelData = truncated.PixelData[:40]
    for dataset in (short, many, colour, none, steep, garbage, truncated):
        with pytest.raises(MalformedDataSetError):
            grey_image(dataset)
    assert garbage.file_meta.TransferSyntaxUID == JPEG2000Lossless


def test_an_image_that_needs_more_memory_than_the_worker_may_have_is_a_named_error(tmp_path: Path) -> None:
    pixels = np.zeros((9000, 9000), np.uint16)  # within the bound of pixels: 324 MB as float32
    path = tmp_path / "large.dcm"
    computed_radiograph(pixels).save_as(path, enforce_file_format=True)
    program = f"""
import pydicom
from ai_triage.images import grey_image
from ai_triage.untrusted import prepare_worker
from storage.errors import MalformedDataSetError
prepare_worker(500 * 1024 * 1024)
try:
    grey_image(pydicom.dcmread({str(path)!r}))
except MalformedDataSetError as error:
    print(error.reason)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "MemoryError" in done.stdout


def test_no_child_is_on_two_sides_of_the_split() -> None:
    radiographs = read_radiographs(shared("cxr/kermany-train-224.tar"))
    sides = {side: {r.patient for r in of_split(radiographs, side)} for side in ("train", "validation", "test")}
    assert len(radiographs) == 5216
    assert sum(len(side) for side in sides.values()) == len({r.patient for r in radiographs})
    assert len(sides["train"]) > 3 * len(sides["test"]) > 900


def test_the_patient_is_in_the_file_name_and_decides_the_side() -> None:
    assert patient_of("PNEUMONIA/person12_virus_3.jpeg") == patient_of("PNEUMONIA/person12_bacteria_47.jpeg")
    assert patient_of("NORMAL/IM-0115-0001.jpeg") == patient_of("NORMAL/NORMAL2-IM-0115-0001-0001.jpeg")
    assert split_of("person12") == split_of("person12")
    with pytest.raises(ValueError, match="no patient"):
        patient_of("PNEUMONIA/scan.jpeg")


def test_the_archive_is_read_with_labels_and_file_sizes(tmp_path: Path, gradient: np.ndarray) -> None:
    buffer = io.BytesIO()
    Image.fromarray(gradient).save(buffer, "JPEG")
    with tarfile.open(tmp_path / "few.tar", "w") as tar:
        for name in ("PNEUMONIA/person1_virus_1.jpeg", "NORMAL/IM-0001-0001.jpeg"):
            member = tarfile.TarInfo(name)
            member.size = buffer.tell()
            tar.addfile(member, io.BytesIO(buffer.getvalue()))
    assert [(r.patient, r.label, r.pixels.shape, r.file_bytes) for r in read_radiographs(tmp_path / "few.tar")] == [
        ("normal1", 0, (256, 256), buffer.tell()),
        ("person1", 1, (256, 256), buffer.tell()),
    ]


def test_augmentation_is_decided_by_its_seed_and_blurs_what_the_classes_differ_in(gradient: np.ndarray) -> None:
    def digest(seed: int) -> str:
        return hashlib.sha256(augmented(gradient, np.random.default_rng(seed)).tobytes()).hexdigest()

    assert digest(1) == digest(1)
    assert len({digest(seed) for seed in range(8)}) == 8
    deviations = [augmented(gradient, np.random.default_rng(seed)).std() for seed in range(40)]
    assert max(deviations) > 1.8 * min(deviations)


def test_training_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ai_triage.train_cxr as training

    rng = np.random.default_rng(0)
    radiographs = [
        Radiograph(f"{i}", f"person{i}", i % 2, rng.integers(0, 255, (128, 128), np.uint8), 1000) for i in range(200)
    ]
    monkeypatch.setattr(training, "read_radiographs", lambda archive: radiographs)
    monkeypatch.setattr(training, "BATCH", 64)
    archive, out = tmp_path / "none.tar", tmp_path / "out"
    training.train(archive, out, epochs=1, seed=1, threads=1)
    training.train(archive, out, epochs=2, seed=1, threads=1)
    training.train(archive, out, epochs=2, seed=1, threads=1)
    assert len((out / "log.jsonl").read_text().splitlines()) == 2
