"""The spool without a network: outcomes of a store, full disks, sweeping after a crash, freeing after a receipt.

SIGKILL in the middle of intake is in test_gateway_crash.py, because it needs a process to kill."""

import hashlib
import os
import resource
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from pydantic import ValidationError

from dicom_gateway.enrol import StoreOutcome
from dicom_gateway.intake import Arrival, DataSetMismatchError, receive
from dicom_gateway.ledger import Ledger, LedgerClosedError
from dicom_gateway.spool import Spool
from dicom_gateway.sweep import sweep
from storage import wire
from storage.errors import ConfigurationError, MalformedDataSetError, OutOfSpaceError
from storage.wire import StudyFacts
from tests.gateway_kit import ROOT, encode, renamed, sample, settings_for

IMPLICIT, EXPLICIT, BIG = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"


@pytest.fixture
def spool(tmp_path):
    opened = Spool(settings_for(tmp_path / "spool"))
    sweep(opened)
    yield opened
    opened.close()


def arrival(data_set, transfer_syntax_uid=None):
    uid = transfer_syntax_uid or str(data_set.file_meta.TransferSyntaxUID)
    return Arrival(
        data=encode(data_set, uid), transfer_syntax_uid=uid, sop_class_uid=str(data_set.SOPClassUID),
        sop_instance_uid=str(data_set.SOPInstanceUID), calling_ae_title="CT1", called_ae_title="YUANZHEN",
        received_at=datetime.now(UTC),
    )  # fmt: skip


def kept(spool):
    """Digests of all files under objects/, each checked against its name."""
    found = set()
    for path in spool.objects.glob("*/*"):
        if path.suffix == ".json":
            assert path.with_suffix("").exists()
            continue
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
        found.add(path.name)
    return found


def test_a_stored_instance_is_a_file_named_by_its_digest_and_a_row_with_its_facts(spool):
    one = arrival(sample())
    assert receive(spool, one) is StoreOutcome.STORED
    digest = hashlib.sha256(one.data).hexdigest()
    assert spool.object_path(digest).read_bytes() == one.data
    row = spool.ledger.row("SELECT * FROM instance")
    assert (row["sop_instance_uid"], row["sha256"], row["size_bytes"]) == (one.sop_instance_uid, digest, len(one.data))
    assert not list(spool.incoming.iterdir())
    assert spool.backlog().instances == 1


def test_the_same_bytes_again_are_already_stored(spool):
    one = arrival(sample())
    receive(spool, one)
    assert receive(spool, one) is StoreOutcome.ALREADY_STORED
    assert len(kept(spool)) == 1


@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small.dcm", "rtplan.dcm", "examples_rgb_color.dcm"])
def test_the_same_content_in_another_encoding_is_already_stored(spool, name):
    data_set = sample(name)
    outcomes = [receive(spool, arrival(data_set, uid)) for uid in (EXPLICIT, IMPLICIT)]
    if "PixelData" in data_set and data_set["PixelData"].VR == "OW":  # pydicom leaves the swapping of OW to its caller
        swapped = bytearray(data_set.PixelData)
        swapped[::2], swapped[1::2] = swapped[1::2], swapped[::2]
        data_set["PixelData"].value = bytes(swapped)
    outcomes.append(receive(spool, arrival(data_set, BIG)))
    assert outcomes[0] is StoreOutcome.STORED
    assert outcomes[1:] == [StoreOutcome.ALREADY_STORED] * 2
    assert len(kept(spool)) == 1
    assert spool.ledger.rows("SELECT * FROM quarantine") == []


def test_other_content_under_the_same_uid_is_kept_beside_the_first_and_a_person_is_told(spool):
    data_set = sample()
    receive(spool, arrival(data_set))
    data_set.PatientName = "Changed"
    assert receive(spool, arrival(data_set)) is StoreOutcome.VARIANT
    data_set.PixelData = bytes([1, *data_set.PixelData[1:]])
    assert receive(spool, arrival(data_set, IMPLICIT)) is StoreOutcome.VARIANT
    assert len(kept(spool)) == 3
    assert [row["kind"] for row in spool.ledger.rows("SELECT kind FROM quarantine")] == ["variant"]
    assert spool.ledger.row("SELECT times FROM quarantine")["times"] == 2


def test_two_patients_under_one_study_uid_are_two_studies(spool):
    first, second = renamed(sample(), study="1.2.3"), renamed(sample(), study="1.2.3")
    second.PatientID = "ANOTHER"
    receive(spool, arrival(first))
    receive(spool, arrival(second))
    rows = spool.ledger.rows("SELECT facts FROM study WHERE study_instance_uid = '1.2.3'")
    assert {StudyFacts.model_validate_json(row["facts"]).patient_id for row in rows} == {first.PatientID, "ANOTHER"}


@pytest.mark.parametrize(
    ("first", "other", "studies"),
    [
        ({"PatientID": "", "PatientName": "Wang^Wu"}, {"PatientID": "", "PatientName": "Li^Si"}, 2),
        ({"PatientID": "", "PatientName": "Wang^Wu"}, {"PatientID": "", "PatientName": "WANG Wu"}, 1),
        ({"PatientID": "000000", "PatientName": "Wang^Wu"}, {"PatientID": "000000", "PatientName": "Li^Si"}, 2),
        ({"PatientID": "P1", "PatientName": "Wang^Wu"}, {"PatientID": "P1", "PatientName": "王^五"}, 1),
        ({"PatientID": "P1", "PatientBirthDate": "19700101"}, {"PatientID": "P1", "PatientBirthDate": "19700102"}, 2),
        ({"PatientID": "P1", "PatientBirthDate": "19700101"}, {"PatientID": "P1", "PatientBirthDate": ""}, 1),
        ({"PatientID": "P1", "PatientSex": "M"}, {"PatientID": "P1", "PatientSex": "F"}, 2),
        ({"PatientID": "P1", "PatientSex": "M"}, {"PatientID": "P1", "PatientSex": "O"}, 1),
    ],
)
def test_a_study_is_one_patients_by_more_than_the_patient_id(spool, first, other, studies):
    one = renamed(sample())
    for number, values in enumerate((first, other)):
        data_set = one if not number else renamed(sample(), study=str(one.StudyInstanceUID))
        data_set.SpecificCharacterSet = "ISO_IR 192"
        for keyword, value in values.items():
            setattr(data_set, keyword, value)
        receive(spool, arrival(data_set))
    assert len(spool.ledger.rows("SELECT id FROM study")) == studies


@pytest.mark.parametrize("uid", [b"..", b".", b"1.2.", b".1", b"1..2"])
def test_a_uid_that_is_none_is_refused(spool, uid):
    data_set = renamed(sample())
    good = arrival(data_set)
    study = str(data_set.StudyInstanceUID).encode()
    data = good.data.replace(study, uid + b"\0" * (len(study) - len(uid)))
    with pytest.raises(MalformedDataSetError, match="StudyInstanceUID is empty or is no UID"):
        receive(spool, replace(good, data=data))
    with pytest.raises(ValidationError):
        wire.Commit(study_instance_uid=uid.decode(), pack_id="0")


def test_a_data_set_of_another_instance_than_announced_is_refused(spool):
    one = arrival(sample())
    with pytest.raises(DataSetMismatchError, match="SOPInstanceUID is not the one announced"):
        receive(spool, replace(one, sop_instance_uid="1.2.3"))
    with pytest.raises(DataSetMismatchError, match="SOPClassUID is not the one announced"):
        receive(spool, replace(one, sop_class_uid="1.2.3"))


def test_many_at_once_are_all_kept_and_none_twice(spool):
    arrivals = [arrival(renamed(sample())) for _ in range(40)]
    with ThreadPoolExecutor(8) as threads:
        outcomes = list(threads.map(lambda one: receive(spool, one), arrivals * 2))
    assert outcomes.count(StoreOutcome.STORED) == 40
    assert outcomes.count(StoreOutcome.ALREADY_STORED) == 40
    assert kept(spool) == {hashlib.sha256(one.data).hexdigest() for one in arrivals}


def test_at_the_watermark_nothing_is_kept_and_the_reason_is_out_of_space(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    spool = Spool(settings_for(tmp_path / "spool", free_disk_watermark_bytes=free * 2))
    try:
        with pytest.raises(OutOfSpaceError, match="watermark"):
            receive(spool, arrival(sample()))
        assert spool.out_of_space
        assert not kept(spool) and not list(spool.incoming.iterdir())
        assert spool.ledger.rows("SELECT * FROM instance") == []
    finally:
        spool.close()


@pytest.fixture
def small_disk(tmp_path):
    """8 MiB of tmpfs, where root may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)], check=False, capture_output=True
        ).returncode
    ):
        pytest.skip("a small disk needs root and the right to mount tmpfs")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_on_a_full_disk_every_success_is_kept_whole_and_the_rest_leaves_nothing(small_disk):
    spool = Spool(settings_for(small_disk / "spool"))
    stored, refused = set(), 0
    try:
        for _ in range(300):
            one = arrival(renamed(sample()))
            try:
                receive(spool, one)
                stored.add(hashlib.sha256(one.data).hexdigest())
            except OutOfSpaceError:
                refused += 1
        assert refused > 100 and len(stored) > 50
        assert not list(spool.incoming.iterdir())
        assert kept(spool) == stored
        assert {row["sha256"] for row in spool.ledger.rows("SELECT sha256 FROM instance")} == stored
        # Room comes back: the spool goes on without a restart.
        for digest in sorted(stored)[:20]:
            spool.object_path(digest).unlink()
        assert receive(spool, arrival(renamed(sample()))) is StoreOutcome.STORED
    finally:
        spool.close()


LIMITED = """
import resource, sys
from datetime import UTC, datetime
from pathlib import Path
from dicom_gateway.ledger import Ledger
from storage.errors import OutOfSpaceError
ledger = Ledger(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
written = 0
try:
    while True:
        ledger.execute("INSERT INTO setting VALUES (?, ?)", f"key-{written}", "x" * 5000)
        written += 1
except OutOfSpaceError:
    pass
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
ledger.execute("INSERT INTO setting VALUES ('after', 'x')")
assert ledger.row("SELECT count(*) AS n FROM setting")["n"] == written + 1, written
ledger.close()
print(written)
"""


def test_a_database_that_cannot_grow_is_out_of_space_and_recovers(tmp_path):
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    ran = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "spool.db")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) > 2


def test_a_sweep_sets_aside_what_has_no_facts_and_tells_what_is_lost(tmp_path):
    settings = settings_for(tmp_path / "spool")
    spool = Spool(settings)
    first, second = arrival(sample()), arrival(renamed(sample()))
    receive(spool, first)
    receive(spool, second)
    orphan = spool.object_path(hashlib.sha256(b"orphan").hexdigest())
    orphan.write_bytes(b"orphan")
    (spool.incoming / "half").write_bytes(b"half")
    lost = spool.object_path(hashlib.sha256(second.data).hexdigest())
    lost.unlink()
    spool.close()
    spool = Spool(settings)
    sweep(spool)
    try:
        assert not orphan.exists() and not list(spool.incoming.iterdir())
        assert kept(spool) == {hashlib.sha256(first.data).hexdigest()}
        rows = spool.ledger.rows("SELECT * FROM quarantine WHERE resolved_at IS NULL")
        assert [(row["kind"], row["subject"]) for row in rows] == [
            ("orphan", orphan.name),
            ("damaged", second.sop_instance_uid),
        ]
        assert (spool.orphans / orphan.name).read_bytes() == b"orphan"
        # The sender sends it again: whole, and nobody has to look any more.
        assert receive(spool, second) is StoreOutcome.ALREADY_STORED
        assert lost.read_bytes() == second.data
        assert not spool.ledger.rows("SELECT * FROM quarantine WHERE resolved_at IS NULL AND kind = 'damaged'")
    finally:
        spool.close()


def test_of_refused_bytes_the_oldest_go_and_their_rows_stay(tmp_path):
    spool = Spool(settings_for(tmp_path / "spool", refused_keep_bytes=250))
    try:
        for number in range(4):
            data = bytes([number]) * 100
            digest = hashlib.sha256(data).hexdigest()
            assert spool.keep_refused(data, digest, subject=str(number), reason="why", calling_ae_title="CT1")
        assert not spool.keep_refused(bytes(300), "0" * 64, subject="large", reason="why", calling_ae_title="CT1")
        rows = spool.ledger.rows("SELECT subject, sha256 FROM quarantine ORDER BY id")
        assert [(row["subject"], row["sha256"] is not None) for row in rows] == [
            ("0", False), ("1", False), ("2", True), ("3", True), ("large", False),
        ]  # fmt: skip
        here = {path.name for path in spool.refused.iterdir() if path.is_file()}
        assert here == {row["sha256"] for row in rows if row["sha256"]}
    finally:
        spool.close()


def test_a_second_gateway_on_the_same_spool_is_refused(spool):
    with pytest.raises(ConfigurationError, match="another gateway is working"):
        Spool(settings_for(spool.directory))


def acknowledged(settings, count):
    """Arrivals answered with Success, in a spool that is closed again."""
    spool = Spool(settings)
    sweep(spool)
    arrivals = [arrival(renamed(sample())) for _ in range(count)]
    for one in arrivals:
        receive(spool, one)
    spool.close()
    return arrivals


def lose_rows(spool_dir):
    for path in spool_dir.glob("spool.db*"):
        path.unlink()


def empty_rows(spool_dir):
    (spool_dir / "spool.db").write_bytes(b"")


def damage_the_log(spool_dir):
    """A copy of the files as a crash leaves them, with a write-ahead log that is not readable."""
    lose_rows(spool_dir)
    Ledger(spool_dir / "spool.db").close()
    (spool_dir / "spool.db-wal").write_bytes(b"not a log" * 500)


@pytest.mark.parametrize("lose", [lose_rows, empty_rows, damage_the_log])
def test_a_lost_database_is_built_again_from_the_files(tmp_path, lose):
    settings = settings_for(tmp_path / "spool")
    arrivals = acknowledged(settings, 3)
    before = Spool(settings)
    everything = (
        "SELECT sop_instance_uid, sha256, series_instance_uid, size_bytes, facts, variant, received_at_s FROM instance"
        " ORDER BY id"
    )
    instances = [tuple(row) for row in before.ledger.rows(everything)]
    studies = [tuple(row) for row in before.ledger.rows("SELECT * FROM study ORDER BY id")]
    before.close()
    lose(settings.spool_dir)
    spool = Spool(settings)
    sweep(spool)
    try:
        assert kept(spool) == {hashlib.sha256(one.data).hexdigest() for one in arrivals}
        assert [tuple(row) for row in spool.ledger.rows(everything)] == instances
        assert [tuple(row) for row in spool.ledger.rows("SELECT * FROM study ORDER BY id")] == studies
        assert spool.backlog().instances == 3 and spool.arrived.is_set() is False
        assert receive(spool, arrivals[0]) is StoreOutcome.ALREADY_STORED
    finally:
        spool.close()


def test_what_an_older_database_does_not_know_is_enrolled_again(tmp_path):
    settings = settings_for(tmp_path / "spool")
    first = acknowledged(settings, 2)
    shutil.copy(settings.spool_dir / "spool.db", tmp_path / "copy.db")
    second = acknowledged(settings, 2)
    shutil.copy(tmp_path / "copy.db", settings.spool_dir / "spool.db")
    spool = Spool(settings)
    sweep(spool)
    try:
        expected = {hashlib.sha256(one.data).hexdigest() for one in first + second}
        assert kept(spool) == expected
        assert {row["sha256"] for row in spool.ledger.rows("SELECT sha256 FROM instance")} == expected
    finally:
        spool.close()


def test_facts_that_are_missing_beside_an_object_are_written_from_its_row(tmp_path):
    settings = settings_for(tmp_path / "spool")
    (one,) = acknowledged(settings, 1)
    (facts,) = (settings.spool_dir / "objects").glob("*/*.json")
    content = facts.read_bytes()
    facts.unlink()
    (facts.parent / ("f" * 64 + ".json")).write_bytes(content)  # facts without an object mean nothing
    spool = Spool(settings)
    sweep(spool)
    spool.close()
    assert [path.read_bytes() for path in (settings.spool_dir / "objects").glob("*/*.json")] == [content]
    lose_rows(settings.spool_dir)
    spool = Spool(settings)
    sweep(spool)
    try:
        assert spool.ledger.row("SELECT sop_instance_uid FROM instance")[0] == one.sop_instance_uid
    finally:
        spool.close()


def test_what_was_freed_does_not_come_back(tmp_path):
    settings = settings_for(tmp_path / "spool", keep_days=0)
    (one,) = acknowledged(settings, 1)
    path = next(path for path in (settings.spool_dir / "objects").glob("*/*") if not path.suffix)
    spool = Spool(settings)
    at = datetime.now(UTC) - timedelta(days=1)
    spool.ledger.execute("UPDATE instance SET archived_at = ?, archived_at_s = ?", at.isoformat(), at.timestamp())
    assert spool.free_kept() == 1
    assert not path.exists() and not list(path.parent.iterdir())
    path.write_bytes(one.data)  # a crash between the row and the file
    spool.close()
    spool = Spool(settings)
    sweep(spool)
    try:
        assert not path.exists() and spool.ledger.row("SELECT count(*) FROM instance")[0] == 1
        assert not spool.ledger.rows("SELECT * FROM quarantine")
    finally:
        spool.close()


def test_a_damaged_database_stops_the_start_and_says_so(tmp_path):
    path = tmp_path / "spool.db"
    Ledger(path).close()
    path.write_bytes(b"not a database at all" * 400)
    with pytest.raises(ConfigurationError, match="damaged"):
        Ledger(path)


def test_only_receipted_instances_are_freed_and_only_after_keep_days(tmp_path):
    spool = Spool(settings_for(tmp_path / "spool", keep_days=7))
    try:
        arrivals = [arrival(renamed(sample())) for _ in range(3)]
        for one in arrivals:
            receive(spool, one)
        old, young, unsent = (hashlib.sha256(one.data).hexdigest() for one in arrivals)
        for digest, days in ((old, 8), (young, 6)):
            at = datetime.now(UTC) - timedelta(days=days)
            spool.ledger.execute(
                "UPDATE instance SET archived_at = ?, archived_at_s = ? WHERE sha256 = ?",
                at.isoformat(), at.timestamp(), digest,
            )  # fmt: skip
        assert spool.free_kept() == 1
        assert kept(spool) == {young, unsent}
        assert receive(spool, arrivals[0]) is StoreOutcome.ALREADY_STORED  # the centre has it
        assert kept(spool) == {young, unsent}
    finally:
        spool.close()


def test_a_write_that_raises_is_undone_and_others_in_the_same_transaction_stand(tmp_path):
    ledger = Ledger(tmp_path / "spool.db")
    gate = threading.Event()
    with ThreadPoolExecutor(8) as threads:
        held = threads.submit(ledger.write, lambda connection: gate.wait())  # so that the rest gathers behind it

        def good(number):
            return ledger.execute("INSERT INTO setting VALUES (?, 'x')", f"good-{number}")

        def bad(connection):
            connection.execute("INSERT INTO setting VALUES ('bad', 'x')")
            raise KeyError("on purpose")

        goods = [threads.submit(good, number) for number in range(3)]
        broken = threads.submit(ledger.write, bad)
        gate.set()
        assert held.result() and [one.result() for one in goods] == [1, 1, 1]
        with pytest.raises(KeyError):
            broken.result()
    assert {row["key"] for row in ledger.rows("SELECT key FROM setting")} == {"good-0", "good-1", "good-2"}
    ledger.close()
    with pytest.raises(LedgerClosedError):
        ledger.execute("DELETE FROM setting")
