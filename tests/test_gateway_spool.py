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

from dicom_gateway.intake import Arrival, DataSetMismatchError, receive
from dicom_gateway.ledger import Ledger, LedgerClosedError
from dicom_gateway.spool import Spool, StoreOutcome
from dicom_gateway.sweep import sweep
from storage.errors import ConfigurationError, OutOfSpaceError
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
    rows = spool.ledger.rows("SELECT patient_id FROM study WHERE study_instance_uid = '1.2.3'")
    assert {row["patient_id"] for row in rows} == {first.PatientID, "ANOTHER"}


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


def test_a_sweep_removes_what_nobody_was_promised_and_tells_what_is_lost(tmp_path):
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
        row = spool.ledger.row("SELECT * FROM quarantine WHERE resolved_at IS NULL")
        assert (row["kind"], row["subject"]) == ("damaged", second.sop_instance_uid)
        # The sender sends it again: whole, and nobody has to look any more.
        assert receive(spool, second) is StoreOutcome.ALREADY_STORED
        assert lost.read_bytes() == second.data
        assert spool.ledger.row("SELECT * FROM quarantine WHERE resolved_at IS NULL") is None
    finally:
        spool.close()


def test_a_second_gateway_on_the_same_spool_is_refused(spool):
    with pytest.raises(ConfigurationError, match="another gateway is working"):
        Spool(settings_for(spool.directory))


def test_objects_without_their_database_are_not_swept_away(tmp_path):
    settings = settings_for(tmp_path / "spool")
    spool = Spool(settings)
    receive(spool, arrival(sample()))
    spool.close()
    for path in spool.directory.glob("spool.db*"):
        path.unlink()
    with pytest.raises(ConfigurationError, match=r"spool\.db is gone"):
        Spool(settings)
    assert len(kept(spool)) == 1


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
