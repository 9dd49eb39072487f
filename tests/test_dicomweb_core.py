"""The DICOMweb core on real files, a real database and a real object store; no HTTP (tests/test_dicomweb_http.py)."""

import contextlib
import struct
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.encaps import get_frame
from pydicom.uid import DeflatedExplicitVRLittleEndian

from storage.database import Database
from storage.dicomweb import frames, media_types, metadata, multipart, queries
from storage.dicomweb.errors import BadRequestError, NotAcceptableError
from storage.dicomweb.extents import Extents
from storage.dicomweb.library import Library, Scope, StoredInstance, find_instances
from storage.dicomweb.media_types import Representation, negotiate
from storage.dicomweb.multipart import Part
from storage.dicomweb.queries import Level
from storage.errors import MalformedDataSetError, NotFoundError
from storage.objects import Objects
from tests.archive_material import archive_files, data_set_bytes, real_file, saved
from tests.centre import Sites

ROOT = "/cases/1/dicomweb"


class Archived:
    """One study in the archive, and what reads it."""

    def __init__(self, database: Database, objects: Objects, site_id: int, files: list[Path]) -> None:
        with database.centre() as session:
            study_id = archive_files(session, objects, site_id, files)
        self.database = database
        self.scope = Scope((study_id,), ROOT)
        self.library = Library(objects)
        self.study = str(pydicom.dcmread(files[0], stop_before_pixels=True).StudyInstanceUID)

    def instances(self, *uids: str) -> list[StoredInstance]:
        with self.database.centre() as session:
            return find_instances(session, self.scope, self.study, *uids)

    def frames(self, *numbers: int) -> list[bytes]:
        (stored,) = self.instances()
        return list(frames.read_frames(self.library, stored, self.library.sidecar(stored), numbers))

    def metadata(self) -> dict:
        (stored,) = self.instances()
        return metadata.shown(self.library.sidecar(stored), stored, ROOT)

    def query(self, level: Level, text: str, *uids: str) -> list[dict]:
        pairs = [tuple(pair.split("=", 1)) for pair in text.split("&") if pair]
        with self.database.centre() as session:
            return [a.content for a in queries.run(session, self.scope, level, queries.parse(level, pairs), *uids)]


@pytest.mark.parametrize(
    "name",
    [
        "CT_small.dcm",
        "MR_small_implicit.dcm",
        "RG1_UNCR.dcm",
        "examples_rgb_color.dcm",
        "OBXXXX1A_2frame.dcm",
        "SC_rgb_16bit_2frame.dcm",
        "emri_small.dcm",
        "rtdose.dcm",
        "SC_rgb_small_odd.dcm",
        "gdcm-US-ALOKA-16.dcm",
    ],
)
def test_native_frames_are_the_pixels_that_pydicom_reads(
    name: str, database: Database, objects: Objects, sites: Sites
) -> None:
    path = real_file(name)
    data_set = pydicom.dcmread(path)
    count = int(data_set.get("NumberOfFrames", 1))
    served = Archived(database, objects, sites.county, [path]).frames(*range(1, count + 1))
    assert b"".join(served) == data_set.PixelData[: sum(map(len, served))]
    assert len(b"".join(served)) >= len(data_set.PixelData) - 1  # but for the byte of padding
    assert len({len(frame) for frame in served}) == 1


@pytest.mark.parametrize(
    "name",
    [
        "examples_ybr_color.dcm",
        "emri_small_jpeg_2k_lossless.dcm",
        "emri_small_RLE.dcm",
        "color3d_jpeg_baseline.dcm",
        "MR_small_jpeg_ls_lossless.dcm",
        "693_J2KR.dcm",
    ],
)
def test_compressed_frames_are_the_code_streams_as_received(
    name: str, database: Database, objects: Objects, sites: Sites
) -> None:
    path = real_file(name)
    data_set = pydicom.dcmread(path)
    count = int(data_set.get("NumberOfFrames", 1))
    served = Archived(database, objects, sites.county, [path]).frames(*range(1, count + 1))
    expected = [get_frame(data_set.PixelData, index, number_of_frames=count) for index in range(count)]
    assert served == expected


@pytest.mark.parametrize(
    ("name", "little"),
    [
        ("MR_small_bigendian.dcm", "MR_small.dcm"),
        ("SC_rgb_expb_16bit_2frame.dcm", "SC_rgb_16bit_2frame.dcm"),
        ("SC_rgb_expb_32bit.dcm", "SC_rgb_32bit.dcm"),
        ("SC_rgb_expb.dcm", "SC_rgb.dcm"),
        ("OBXXXX1A_expb_2frame.dcm", "OBXXXX1A_2frame.dcm"),
        ("SC_rgb_small_odd_big_endian.dcm", "SC_rgb_small_odd.dcm"),
        ("rtdose_expb.dcm", "rtdose.dcm"),
    ],
)
def test_big_endian_pixels_are_served_little_endian(
    name: str, little: str, database: Database, objects: Objects, sites: Sites
) -> None:
    same = pydicom.dcmread(real_file(little))
    count = int(same.get("NumberOfFrames", 1))
    archived = Archived(database, objects, sites.county, [real_file(name)])
    served = b"".join(archived.frames(*range(1, count + 1)))
    assert served == same.PixelData[: len(served)]
    assert archived.metadata()["00083002"]["Value"] == ["1.2.840.10008.1.2.1"]


def test_frames_of_a_deflated_data_set_are_inflated(database: Database, objects: Objects, sites: Sites) -> None:
    data_set = pydicom.dcmread(real_file("image_dfl.dcm"))
    assert data_set.file_meta.TransferSyntaxUID == DeflatedExplicitVRLittleEndian
    assert Archived(database, objects, sites.county, [real_file("image_dfl.dcm")]).frames(1) == [data_set.PixelData]


def test_frames_of_a_loop_come_in_few_reads(database: Database, objects: Objects, sites: Sites) -> None:
    archived = Archived(database, objects, sites.county, [real_file("color3d_jpeg_baseline.dcm")])
    (stored,) = archived.instances()
    sidecar = archived.library.sidecar(stored)
    reads: list[tuple[int, int]] = []
    data = data_set_bytes(real_file("color3d_jpeg_baseline.dcm"))

    def read(offset: int, length: int) -> bytes:
        reads.append((offset, length))
        return data[offset : offset + length]

    pieces = [piece for frame in sidecar.frames for piece in frame]
    source = Extents(read, pieces, len(data))
    assert [source.next() for _ in pieces] == [data[o : o + n] for o, n in pieces]
    assert len(pieces) == 120
    assert len(reads) == 1


@given(st.lists(st.tuples(st.integers(0, 60_000), st.integers(0, 9_000)), max_size=30))
def test_extents_give_the_same_bytes_in_any_order(extents: list[tuple[int, int]]) -> None:
    data = np.random.default_rng(1).bytes(70_000)
    source = Extents(lambda offset, length: data[offset : offset + length], extents, len(data))
    assert [source.next() for _ in extents] == [data[o : o + n] for o, n in extents]


def test_an_extent_outside_its_instance_is_refused() -> None:
    for extent in [(90, 11), (-1, 5), (0, 101)]:
        with pytest.raises(MalformedDataSetError):
            Extents(lambda offset, length: b"", [extent], 100)


def test_waveform_bulk_data_is_the_value_as_stored(database: Database, objects: Objects, sites: Sites) -> None:
    path = real_file("waveform_ecg.dcm")
    data_set = pydicom.dcmread(path)
    archived = Archived(database, objects, sites.county, [path])
    element = archived.metadata()["54000100"]["Value"][0]["54001010"]
    (stored,) = archived.instances()
    assert element["BulkDataURI"] == f"{stored.path(ROOT)}/bulkdata/54000100/0/54001010"
    sidecar = archived.library.sidecar(stored)
    value = frames.read_bulk(archived.library, stored, sidecar, "54000100/0/54001010")
    assert value == data_set.WaveformSequence[0].WaveformData
    with pytest.raises(NotFoundError):
        frames.read_bulk(archived.library, stored, sidecar, "7FE00010")


def test_big_endian_waveforms_are_served_little_endian(
    database: Database, objects: Objects, sites: Sites, tmp_path: Path
) -> None:
    data_set = pydicom.dcmread(real_file("MR_small_bigendian.dcm"))
    samples = np.arange(2000, dtype=">i2").tobytes()
    item = pydicom.Dataset()
    item.add_new("WaveformData", "OW", samples)
    data_set.WaveformSequence = [item]
    archived = Archived(database, objects, sites.county, [saved(data_set, tmp_path / "be.dcm")])
    (stored,) = archived.instances()
    value = frames.read_bulk(archived.library, stored, archived.library.sidecar(stored), "54000100/0/54001010")
    assert value == np.arange(2000, dtype="<i2").tobytes()


@pytest.mark.parametrize(
    ("mime_type", "served"), [("application/pdf", "application/pdf"), ("text/html", "application/octet-stream")]
)
def test_an_encapsulated_document_is_cut_to_its_true_length_and_is_only_ever_pdf(
    mime_type: str, served: str, database: Database, objects: Objects, sites: Sites, tmp_path: Path
) -> None:
    data_set = pydicom.dcmread(real_file("reportsi.dcm"))
    document = b"%PDF-1.7" + b"x" * 1993
    data_set.EncapsulatedDocument = document + b"\0"
    data_set.EncapsulatedDocumentLength = len(document)
    data_set.MIMETypeOfEncapsulatedDocument = mime_type
    archived = Archived(database, objects, sites.county, [saved(data_set, tmp_path / "pdf.dcm")])
    (stored,) = archived.instances()
    sidecar = archived.library.sidecar(stored)
    assert frames.read_bulk(archived.library, stored, sidecar, "00420011") == document
    assert frames.bulk_media_type(sidecar, "00420011") == served


def test_metadata_has_a_patient_id_unique_among_hospitals_and_no_impossible_spacing(
    database: Database, objects: Objects, sites: Sites
) -> None:
    path = real_file("RG1_UNCR.dcm")
    assert list(pydicom.dcmread(path, stop_before_pixels=True).PixelSpacing) == [0, 0]
    archived = Archived(database, objects, sites.county, [path])
    shown = archived.metadata()
    assert shown["00100020"]["Value"] == [f"county-a:{pydicom.dcmread(path).PatientID}"]
    assert "00280030" not in shown
    assert shown["00280010"] == {"vr": "US", "Value": [1955]}
    assert "7FE00010" not in shown
    (stored,) = archived.instances()
    assert archived.library.whole(stored) == data_set_bytes(path)


def test_the_viewer_is_given_no_text_that_reorders_and_every_uid_as_it_is(
    database: Database, objects: Objects, sites: Sites, tmp_path: Path
) -> None:
    data_set = pydicom.dcmread(real_file("CT_small.dcm"))
    data_set.SpecificCharacterSet = "ISO_IR 192"
    data_set.PatientName = "Zhang^\u2066X\u2069=张三\u202e四李"
    data_set.PatientID = "B\u202e321"
    data_set.StudyDescription = data_set.SeriesDescription = "胸部\u202e位正"
    data_set.ImageComments = "line\r\nline\u2067"
    data_set.RequestAttributesSequence = [pydicom.Dataset()]
    data_set.RequestAttributesSequence[0].RequestedProcedureDescription = "\u202ex"
    archived = Archived(database, objects, sites.county, [saved(data_set, tmp_path / "evil.dcm")])
    shown = archived.metadata()
    assert shown["00100010"]["Value"] == [{"Alphabetic": "Zhang^[U+2066]X[U+2069]", "Ideographic": "张三[U+202E]四李"}]
    assert shown["00100020"]["Value"] == ["county-a:B[U+202E]321"]
    assert shown["00081030"]["Value"] == shown["0008103E"]["Value"] == ["胸部[U+202E]位正"]
    assert shown["00204000"]["Value"] == ["line\nline[U+2067]"]
    assert shown["00400275"]["Value"][0]["00321060"]["Value"] == ["[U+202E]x"]
    assert shown["0020000D"]["Value"] == [data_set.StudyInstanceUID]
    (study,) = archived.query(Level.STUDY, "")
    assert study["00100010"] == shown["00100010"] and study["00100020"] == shown["00100020"]
    assert study["00081030"]["Value"] == ["胸部[U+202E]位正"]
    (found,) = archived.query(Level.STUDY, "PatientID=*\u202e321")  # a search is for what was sent
    assert found == study


def test_real_spacing_stays(database: Database, objects: Objects, sites: Sites) -> None:
    archived = Archived(database, objects, sites.county, [real_file("CT_small.dcm")])
    assert archived.metadata()["00280030"]["Value"] == pytest.approx([0.661468, 0.661468])


def test_sidecars_are_forgotten_least_recently_used_first(database: Database, objects: Objects, sites: Sites) -> None:
    with database.centre() as session:
        ids = [archive_files(session, objects, sites.county, [real_file(n)]) for n in ("CT_small.dcm", "MR_small.dcm")]
        stored = [
            find_instances(session, Scope((i,), ROOT), str(pydicom.dcmread(real_file(n)).StudyInstanceUID))[0]
            for i, n in zip(ids, ("CT_small.dcm", "MR_small.dcm"), strict=True)
        ]
    library = Library(objects, max_cached_instances=1)
    first = library.sidecar(stored[0])
    assert library.sidecar(stored[0]) is first
    library.sidecar(stored[1])
    assert library.sidecar(stored[0]) is not first


def test_a_query_matches_as_the_viewer_and_its_study_list_ask(
    database: Database, objects: Objects, sites: Sites
) -> None:
    archived = Archived(database, objects, sites.county, [real_file("CT_small.dcm")])
    study = archived.study
    fits = [
        "",
        f"StudyInstanceUID={study}&limit=101&offset=0&fuzzymatching=false&includefield=00081030,00080060",
        "00100020=county-a:1CT1",
        "PatientID=*1ct*",
        "PatientName=*compressed*",
        "PatientName=CompressedSamples^CT1",
        "PatientName=compressed?amples*",
        "ModalitiesInStudy=CT",
        "ModalitiesInStudy=MR,CT",
        "StudyDate=20040101-20041231",
        "StudyDate=20040119",
        "StudyDate=-20050101",
        "StudyDate=20040101-",
        f"0020000D=1.2.3,{study}",
        f"0020000D=1.2.3\\{study}",
        "StudyDescription=*",
        "AccessionNumber=",
        "PatientSex=O",
    ]
    differs = [
        "StudyInstanceUID=1.2.3",
        "00100020=1CT1",
        "00100020=county-b:1CT1",
        "PatientName=Compressed",
        "PatientName=%",
        "PatientName=Compressed_amples^CT1",
        "ModalitiesInStudy=MR",
        "StudyDate=20040120-",
        "StudyDescription=*knee*",
        "PatientID='; DROP TABLE study; --",
        "offset=1",
        "limit=0",
    ]
    for text in fits:
        assert len(archived.query(Level.STUDY, text)) == 1, text
    for text in differs:
        assert archived.query(Level.STUDY, text) == [], text


def test_a_query_at_each_level_answers_its_attributes(database: Database, objects: Objects, sites: Sites) -> None:
    archived = Archived(database, objects, sites.county, [real_file("CT_small.dcm")])
    data_set = pydicom.dcmread(real_file("CT_small.dcm"))
    (study,) = archived.query(Level.STUDY, "")
    assert study["00100010"] == {"vr": "PN", "Value": [{"Alphabetic": "CompressedSamples^CT1"}]}
    assert study["00080061"]["Value"] == ["CT"]
    assert study["00201208"]["Value"] == [1]
    (series,) = archived.query(Level.SERIES, "Modality=CT&SeriesNumber=1", archived.study)
    assert series["0020000E"]["Value"] == [data_set.SeriesInstanceUID]
    assert series["00081190"]["Value"][0].endswith(f"/series/{data_set.SeriesInstanceUID}")
    assert "00100010" not in series
    (instance,) = archived.query(Level.INSTANCE, "", archived.study, str(data_set.SeriesInstanceUID))
    assert instance["00080018"]["Value"] == [data_set.SOPInstanceUID]
    (anywhere,) = archived.query(Level.INSTANCE, f"SOPInstanceUID={data_set.SOPInstanceUID}&PatientName=*CT1")
    assert anywhere["00100010"]["Value"]
    assert archived.query(Level.INSTANCE, "Modality=MR") == []


def test_no_query_reaches_beyond_its_scope(database: Database, objects: Objects, sites: Sites) -> None:
    mine = Archived(database, objects, sites.county, [real_file("CT_small.dcm")])
    other = Archived(database, objects, sites.other_county, [real_file("CT_small.dcm")])
    assert len(mine.query(Level.STUDY, "")) == 1
    assert mine.query(Level.STUDY, "")[0]["00100020"] != other.query(Level.STUDY, "")[0]["00100020"]
    for level in Level:
        assert len(mine.query(level, "")) == 1
    nowhere = Scope((), ROOT)
    with database.centre() as session, pytest.raises(NotFoundError):
        find_instances(session, nowhere, mine.study)


def test_a_query_that_cannot_be_read_is_refused_and_an_unknown_one_passed_over() -> None:
    for pairs in [("limit", "-1")], [("offset", "x")], [("PatientName", "a\0b")], [("PatientName", "a" * 1025)]:
        with pytest.raises(BadRequestError):
            queries.parse(Level.STUDY, pairs)
    parsed = queries.parse(Level.STUDY, [("StudyID", "7"), ("<script>", "1"), ("fuzzymatching", "true")])
    assert parsed.not_supported == ("StudyID", "unknown", "fuzzymatching")
    assert parsed.matches == ()


def test_frame_lists() -> None:
    assert frames.frame_numbers("1,3,2", 3) == [1, 3, 2]
    for text in ("0", "4", "1,4"):
        with pytest.raises(NotFoundError, match="1 to 3"):
            frames.frame_numbers(text, 3)
    for text in ("", "x", "1,,2", "-1", "1-3", "٣", "1" * 10):
        with pytest.raises(BadRequestError):
            frames.frame_numbers(text, 3)


JPEG = "1.2.840.10008.1.2.4.50"
NATIVE = media_types.frame_offers("1.2.840.10008.1.2.1", native=True, single=True)
COMPRESSED = media_types.frame_offers(JPEG, native=False, single=True)
OCTETS = "application/octet-stream"


@pytest.mark.parametrize(
    ("accept", "offers", "chosen"),
    [
        ("multipart/related; type=application/octet-stream; transfer-syntax=*", NATIVE, (OCTETS, True)),
        ("multipart/related; type=application/octet-stream; transfer-syntax=*", COMPRESSED, (OCTETS, True)),
        ('multipart/related; type="application/octet-stream"', NATIVE, (OCTETS, True)),
        ('multipart/related;type="image/jpeg"', COMPRESSED, ("image/jpeg", True)),
        (f'multipart/related; type="{OCTETS}"; transfer-syntax={JPEG}', COMPRESSED, (OCTETS, True)),
        ("*/*", COMPRESSED, (OCTETS, True)),
        ("", NATIVE, (OCTETS, True)),
        ("image/*", COMPRESSED, ("image/jpeg", False)),
        ("application/octet-stream", NATIVE, (OCTETS, False)),
        ("image/png, application/octet-stream;q=0.5", NATIVE, (OCTETS, False)),
        ('multipart/related; type="image/jpeg";q=0.2, image/jpeg;q=0.9', COMPRESSED, ("image/jpeg", False)),
        (
            'multipart/related; type="application/pdf", multipart/related; type="application/octet-stream"',
            media_types.bulk_offers("application/pdf"),
            ("application/pdf", True),
        ),
        ("*/*", media_types.bulk_offers(OCTETS), (OCTETS, False)),
        ("application/octet-stream", media_types.bulk_offers("application/pdf"), (OCTETS, False)),
    ],
)
def test_the_representation_suits_the_accept_header(
    accept: str, offers: tuple[Representation, ...], chosen: tuple[str, bool]
) -> None:
    found = negotiate(accept, offers)
    assert (found.media_type, found.multipart) == chosen


@pytest.mark.parametrize(
    ("accept", "offers"),
    [
        ("image/png", NATIVE),
        (f'multipart/related; type="{OCTETS}"; transfer-syntax={JPEG}', NATIVE),
        (f'multipart/related; type="{OCTETS}"', COMPRESSED),  # by default uncompressed (PS3.18 8.7.3.3)
        ("*/*;q=0", NATIVE),
        ("application/dicom+xml", media_types.json_offers()),
    ],
)
def test_what_cannot_be_sent_is_refused_with_what_could(accept: str, offers: tuple[Representation, ...]) -> None:
    with pytest.raises(NotAcceptableError) as refused:
        negotiate(accept, offers)
    assert str(offers[0]) in refused.value.reason


@given(st.text(max_size=200))
def test_no_accept_header_makes_it_fail(accept: str) -> None:
    with contextlib.suppress(NotAcceptableError):
        negotiate(accept, NATIVE)


def test_the_boundary_occurs_in_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter(["a" * 32, "b" * 32])
    monkeypatch.setattr(multipart.secrets, "token_hex", lambda _: next(drawn))
    parts = [Part("x/y", b"..yuanzhen-" + b"a" * 32 + b".."), Part("x/y", struct.pack("<H", 7))]
    boundary = multipart.boundary_outside(parts)
    assert boundary == "yuanzhen-" + "b" * 32
    body = multipart.body(parts, boundary)
    assert body.count(boundary.encode()) == 3
    assert body.startswith(f"--{boundary}\r\nContent-Type: x/y\r\n".encode())
    assert body.endswith(f"--{boundary}--\r\n".encode())
