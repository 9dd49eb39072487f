"""storage/packs.py: what goes into a pack comes out of it byte for byte, and a pack that is hurt in its tail or cut
short is refused. Not covered: verification of each instance at the centre (ingest tests)."""

import hashlib
from datetime import UTC, datetime
from io import BytesIO

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.errors import MalformedDataSetError
from storage.packs import TRAILER_BYTES, index_extent, index_of, read_index, write_pack
from storage.wire import InstanceFacts, StudyFacts

NOW = datetime(2026, 11, 1, 8, 0, tzinfo=UTC)
STUDY = StudyFacts(study_instance_uid="1.2.3", patient_name="王^小明", first_received_at=NOW)


def files_of(folder, contents):
    made = []
    for number, content in enumerate(contents):
        path = folder / f"{number}"
        path.write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        facts = InstanceFacts(
            sop_instance_uid=f"1.2.3.{number}", sop_class_uid="1.2", series_instance_uid="1.2.3.9",
            transfer_syntax_uid="1.2.840.10008.1.2.1", sha256=sha256, size_bytes=len(content), header_sha256=sha256,
            pixel_sha256=hashlib.sha256(b"").hexdigest(), received_at=NOW,
        )  # fmt: skip
        made.append((facts, path))
    return made


def packed(folder, contents):
    out = BytesIO()
    size, sha256 = write_pack(out, STUDY, files_of(folder, contents))
    pack = out.getvalue()
    assert (len(pack), hashlib.sha256(pack).hexdigest()) == (size, sha256)
    return pack


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=300), min_size=1, max_size=8))
def test_instances_come_out_as_they_went_in(tmp_path, contents):
    pack = packed(tmp_path, contents)
    index = index_of(pack)
    assert index.study == STUDY
    assert [pack[entry.offset : entry.offset + entry.length] for entry in index.entries] == contents
    assert [hashlib.sha256(content).hexdigest() for content in contents] == [e.facts.sha256 for e in index.entries]


def test_the_index_is_read_with_two_ranges_only(tmp_path):
    pack = packed(tmp_path, [b"one", b"three"])
    trailer = pack[-TRAILER_BYTES:]
    start, length = index_extent(trailer, len(pack))
    assert read_index(pack[start : start + length], trailer) == index_of(pack)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_flipped_byte_in_index_or_trailer_is_refused(tmp_path, data):
    pack = bytearray(packed(tmp_path, [b"one", b"three"]))
    pack[data.draw(st.integers(8, len(pack) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(MalformedDataSetError):
        index_of(bytes(pack))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_pack_cut_short_is_refused(tmp_path, data):
    pack = packed(tmp_path, [b"one", b"three"])
    with pytest.raises(MalformedDataSetError):
        index_of(pack[: data.draw(st.integers(0, len(pack) - 1))])


def test_a_spool_file_that_changed_is_not_packed(tmp_path):
    files = files_of(tmp_path, [b"one", b"two"])
    files[1][1].write_bytes(b"TWO")
    with pytest.raises(MalformedDataSetError, match="no longer has the digest"):
        write_pack(BytesIO(), STUDY, files)
