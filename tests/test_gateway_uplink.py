"""The way up, against a scripted centre over real HTTPS with client certificates: whatever happens on the way, every
instance is archived byte for byte in the end, and none is marked as archived without a receipt that verifies.

Not covered: the real centre, which tests/test_gateway_centre.py and the demonstration run."""

import hashlib
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime

import pytest

from deploy.pki import ensure_pki
from dicom_gateway.client import CentreClient
from dicom_gateway.heartbeat import HeartbeatLoop
from dicom_gateway.intake import Arrival, receive
from dicom_gateway.packer import Packer
from dicom_gateway.spool import Spool
from dicom_gateway.sweep import sweep
from dicom_gateway.uplink import Uplink, backoff_s
from storage import wire
from storage.errors import LinkError, NotFoundError, PermanentError
from storage.receipts import load_public_key
from tests.gateway_kit import SITE, encode, pki, renamed, sample, settings_for, until
from tests.scripted_centre import ScriptedCentre


@pytest.fixture
def centre():
    opened = ScriptedCentre(pki(), SITE)
    yield opened
    opened.close()


class Running:
    def __init__(self, settings, spool, client, uplink):
        self.settings, self.spool, self.client, self.uplink = settings, spool, client, uplink

    def send(self, count=1, **same):
        """Keep new instances of one series. Returns {(SOP Instance UID, digest): bytes}."""
        made = {}
        first = renamed(sample(), **same)
        study, series = str(first.StudyInstanceUID), str(first.SeriesInstanceUID)
        for _ in range(count):
            data_set = renamed(sample(), study=study, series=series)
            data = encode(data_set)
            receive(
                self.spool,
                Arrival(
                    data=data, transfer_syntax_uid="1.2.840.10008.1.2.1", sop_class_uid=str(data_set.SOPClassUID),
                    sop_instance_uid=str(data_set.SOPInstanceUID), calling_ae_title="CT1", called_ae_title="YUANZHEN",
                    received_at=datetime.now(UTC),
                ),
            )  # fmt: skip
            made[str(data_set.SOPInstanceUID), hashlib.sha256(data).hexdigest()] = data
        return made

    def all_archived(self):
        return self.spool.backlog().instances == 0

    def all_complete(self):
        return not self.spool.ledger.rows("SELECT id FROM study WHERE complete_at IS NULL")

    def quarantine(self):
        return self.spool.ledger.rows("SELECT * FROM quarantine WHERE resolved_at IS NULL")


@contextmanager
def running(folder, centre, *, start=True, **changes):
    settings = settings_for(folder / "spool", centre.url, **changes)
    spool, client = Spool(settings), CentreClient(settings)
    sweep(spool)
    uplink = Uplink(settings, spool, client, load_public_key(pki().receipt_public_key.read_bytes()))
    try:
        if start:
            uplink.start()
        yield Running(settings, spool, client, uplink)
    finally:
        uplink.stop()
        client.close()
        spool.close()


@pytest.fixture
def gateway(tmp_path, centre):
    with running(tmp_path, centre) as opened:
        yield opened


def test_a_study_is_archived_byte_for_byte_receipted_and_complete(gateway, centre):
    sent = gateway.send(20) | gateway.send(5)
    until(gateway.all_archived, "all archived")
    until(gateway.all_complete, "all complete")
    assert centre.archive == sent
    rows = gateway.spool.ledger.rows("SELECT * FROM pack")
    assert all(row["state"] == "receipted" and row["receipt"] for row in rows)
    assert list(gateway.spool.packs.iterdir()) == []
    facts = next(iter(centre.studies.values()))
    assert (facts.patient_id, facts.calling_ae_title) == (sample().PatientID, "CT1")
    inventoried = {(line.sop_instance_uid, line.sha256) for one in centre.inventories for line in one.instances}
    assert inventoried == set(sent)
    assert all(gateway.spool.is_whole(digest) for _, digest in sent)  # kept after the receipt


FAULTS = {
    "offer": [(500, {}), (503, {"Retry-After": "1"}), (429, {}), "cut", "portal"],
    "put": [(500, {}), (403, {}), "cut"],
    "commit": [(502, {}), "cut", "verifying", "reject", "portal"],
    "inventory": [(500, {}), "cut"],
}


@pytest.mark.parametrize(
    ("endpoint", "fault"),
    [(endpoint, fault) for endpoint, faults in FAULTS.items() for fault in faults],
    ids=lambda value: str(value[0]) if isinstance(value, tuple) else value,
)
def test_one_fault_on_the_way_costs_only_time(gateway, centre, endpoint, fault):
    centre.faults[endpoint].extend([fault, fault])
    sent = gateway.send(3)
    until(gateway.all_archived, "all archived")
    until(gateway.all_complete, "all complete")
    assert centre.archive == sent
    assert not centre.faults[endpoint]
    assert not gateway.quarantine()


@pytest.mark.parametrize("fault", ["forged", "other site", "one short"])
def test_a_receipt_that_does_not_verify_frees_nothing_and_is_shown_to_a_person(gateway, centre, fault):
    centre.always["commit"] = fault
    sent = gateway.send(3)
    (row,) = until(gateway.quarantine, "quarantine")
    assert row["kind"] == "refused_by_centre" and "eceipt" in row["reason"]
    assert gateway.spool.backlog().instances == 3
    assert all(gateway.spool.is_whole(digest) for _, digest in sent)
    del centre.always["commit"]
    until(gateway.all_archived, "archived once the receipts are good")
    assert not gateway.quarantine()
    assert centre.archive == sent


def test_what_the_centre_refuses_is_kept_shown_with_the_reason_and_asked_again(gateway, centre):
    centre.always["offer"] = (422, {})
    sent = gateway.send(2)
    (row,) = until(gateway.quarantine, "quarantine")
    assert row["reason"] == "The centre refused (422): as the test wanted"
    until(lambda: gateway.quarantine()[0]["times"] >= 2, "asked again by itself")
    assert list(gateway.spool.packs.iterdir()) == [] or gateway.spool.backlog().instances == 2
    del centre.always["offer"]
    until(gateway.all_archived, "archived after the centre changed its mind")
    assert centre.archive == sent and not gateway.quarantine()


def test_a_person_can_have_a_refused_pack_tried_at_once(tmp_path, centre):
    with running(tmp_path, centre, refused_retry_s=3600.0) as gateway:
        centre.faults["offer"].append((422, {}))
        gateway.send(1)
        until(gateway.quarantine, "quarantine")
        gateway.uplink.retry_now()
        until(gateway.all_archived, "archived on command")


def test_a_refused_study_does_not_stop_the_others(tmp_path, centre):
    with running(tmp_path, centre, refused_retry_s=3600.0) as gateway:
        centre.faults["offer"].append((409, {}))
        gateway.send(1)
        until(gateway.quarantine, "quarantine")
        sent = gateway.send(3)
        until(lambda: set(sent) <= set(centre.archive), "the second study")
        until(lambda: gateway.spool.backlog().instances == 1, "the second study receipted")


def test_packs_that_the_centre_fails_on_do_not_stop_the_others(tmp_path, centre):
    with running(tmp_path, centre, start=False, refused_retry_s=3600.0) as gateway:
        bad = {uid for _ in range(3 * gateway.settings.uplink_threads) for uid, _ in gateway.send(1)}
        centre.failing = bad
        gateway.uplink.start()
        until(lambda: any(one.instances[0].sop_instance_uid in bad for one in centre.offers), "the first failure")
        good = gateway.send(5)
        until(lambda: set(good) <= set(centre.archive), "the others")
        until(lambda: len(gateway.quarantine()) == len(bad), "a person is told of each")
        assert {(row["kind"], row["reason"]) for row in gateway.quarantine()} == {
            ("refused_by_centre", "The centre answered 500")
        }
        assert gateway.spool.backlog().instances == len(bad)
        centre.failing = set()
        gateway.uplink.retry_now()
        until(gateway.all_archived, "archived after the centre was repaired")
        assert not gateway.quarantine()


def test_a_long_outage_loses_nothing_and_ends_by_itself(gateway, centre):
    for endpoint in ("offer", "put", "commit", "inventory"):
        centre.always[endpoint] = "cut"
    sent = {}
    for _ in range(5):
        sent |= gateway.send(4)
    until(lambda: centre.calls.count("offer") > 30, "many tries")
    assert gateway.spool.backlog().instances == 20
    assert len(list(gateway.spool.packs.iterdir())) <= 2 * gateway.settings.uplink_threads + 1  # not the whole backlog
    centre.always.clear()
    until(gateway.all_archived, "all archived")
    assert centre.archive == sent


def test_instances_of_one_series_travel_in_packs_of_limited_size(tmp_path, centre, monkeypatch):
    monkeypatch.setattr("dicom_gateway.packer.MAX_PACK_BYTES", 120_000)  # a CT_small is 39 kB
    with running(tmp_path, centre) as gateway:
        sent = gateway.send(10)
        until(gateway.all_archived, "all archived")
        assert centre.archive == sent
        assert {len(offer.instances) for offer in centre.offers} <= {1, 2, 3}
        assert len(centre.plans) >= 4


def test_an_instance_larger_than_a_pack_travels_alone(tmp_path, centre, monkeypatch):
    monkeypatch.setattr("dicom_gateway.packer.MAX_PACK_BYTES", 1000)
    with running(tmp_path, centre) as gateway:
        sent = gateway.send(3)
        until(gateway.all_archived, "all archived")
        assert centre.archive == sent and all(len(offer.instances) == 1 for offer in centre.offers)


def test_packs_do_not_wait_for_the_study_to_be_quiet(tmp_path, centre):
    with running(tmp_path, centre, quiet_s=3600.0) as gateway:
        gateway.send(3)
        until(gateway.all_archived, "archived while the study is still open")
        assert not centre.inventories


def test_images_that_come_after_completion_open_the_study_again(gateway, centre):
    first = gateway.send(2, study="1.2.3.4")
    until(gateway.all_complete, "complete")
    second = gateway.send(1, study="1.2.3.4")
    assert not gateway.all_complete()
    until(gateway.all_complete, "complete again")
    assert centre.archive == first | second
    assert len(centre.inventories[-1].instances) == 3


def test_what_the_centre_lost_after_signing_is_sent_again(gateway, centre):
    sent = gateway.send(4)
    until(gateway.all_archived, "archived")
    with centre.lock:
        gone = next(iter(centre.archive))
        del centre.archive[gone]
    until(lambda: gone in centre.archive, "sent again after the inventory")
    until(gateway.all_complete, "complete")
    assert centre.archive == sent


def test_a_centre_that_forgot_the_pack_is_offered_it_again(gateway, centre):
    centre.faults["commit"].append((404, {}))
    sent = gateway.send(2)
    until(gateway.all_archived, "archived")
    assert centre.archive == sent and not gateway.quarantine()


def test_after_a_restart_a_pack_that_was_put_is_committed_and_not_put_again(tmp_path, centre):
    centre.always["commit"] = "cut"
    with running(tmp_path, centre) as gateway:
        sent = gateway.send(3)
        until(lambda: gateway.spool.ledger.rows("SELECT 1 FROM pack WHERE state = 'put'"), "put")
        (planned,) = list(centre.plans)
    centre.always.clear()
    with running(tmp_path, centre) as gateway:
        until(gateway.all_archived, "archived")
    assert centre.archive == sent
    assert (list(centre.plans), centre.puts) == ([planned], [planned])


def test_a_gateway_that_lost_its_receipts_gets_them_again_without_sending(tmp_path, centre):
    with running(tmp_path, centre) as gateway:
        gateway.send(3)
        until(gateway.all_archived, "archived")
        gateway.spool.ledger.execute("UPDATE instance SET archived_at = NULL, archived_at_s = NULL, pack_id = NULL")
        gateway.spool.arrived.set()
        until(gateway.all_archived, "archived again")
    assert len(centre.puts) == 1


def test_a_damaged_spool_file_is_told_and_the_others_go(tmp_path, centre):
    with running(tmp_path, centre, start=False) as gateway:
        sent = gateway.send(3)
        _, digest = next(iter(sent))
        path = gateway.spool.object_path(digest)
        path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
        gateway.uplink.start()
        (row,) = until(gateway.quarantine, "quarantine")
        assert row["kind"] == "damaged"
        until(lambda: gateway.spool.backlog().instances == 1, "the others")
        assert len(centre.archive) == 2


def test_a_pack_file_that_was_torn_is_built_again(tmp_path, centre):
    with running(tmp_path, centre, start=False) as gateway:
        sent = gateway.send(3)
        time.sleep(gateway.settings.gather_s)
        assert Packer(gateway.settings, gateway.spool).plan() == 1
        (path,) = gateway.spool.packs.iterdir()
        path.write_bytes(bytes(path.stat().st_size))  # a power cut: the size is there, the content is not
    with running(tmp_path, centre) as gateway:
        until(gateway.all_archived, "archived")
    assert centre.archive == sent


def test_two_variants_of_one_instance_are_both_archived(gateway, centre):
    data_set = renamed(sample())
    for name in ("First", "Second"):
        data_set.PatientName = name
        receive(
            gateway.spool,
            Arrival(
                data=encode(data_set), transfer_syntax_uid="1.2.840.10008.1.2.1",
                sop_class_uid=str(data_set.SOPClassUID), sop_instance_uid=str(data_set.SOPInstanceUID),
                calling_ae_title="CT1", called_ae_title="YUANZHEN", received_at=datetime.now(UTC),
            ),
        )  # fmt: skip
    until(gateway.all_archived, "archived")
    assert len(centre.archive) == 2
    assert [row["kind"] for row in gateway.quarantine()] == ["variant"]


def test_two_patients_under_one_study_uid_travel_apart(gateway, centre):
    for patient in ("P-1", "P-2"):
        data_set = renamed(sample(), study="1.2.3.4")
        data_set.PatientID = patient
        receive(
            gateway.spool,
            Arrival(
                data=encode(data_set), transfer_syntax_uid="1.2.840.10008.1.2.1",
                sop_class_uid=str(data_set.SOPClassUID), sop_instance_uid=str(data_set.SOPInstanceUID),
                calling_ae_title="CT1", called_ae_title="YUANZHEN", received_at=datetime.now(UTC),
            ),
        )  # fmt: skip
    until(gateway.all_complete, "complete")
    assert centre.studies.keys() == {("1.2.3.4", "P-1"), ("1.2.3.4", "P-2")}
    assert {len(one.instances) for one in centre.inventories} == {1}


def test_the_heartbeat_says_what_waits_and_measures_the_clock(tmp_path, centre):
    with running(tmp_path, centre, start=False) as gateway:
        gateway.send(2)
        beat, stop = HeartbeatLoop(gateway.settings, gateway.spool, gateway.client), threading.Event()
        centre.faults["heartbeat"].append((503, {}))
        thread = threading.Thread(target=beat.run, args=(stop,))
        thread.start()
        try:
            until(lambda: beat.last_contact, "contact")
        finally:
            stop.set()
            thread.join()
        (told,) = centre.heartbeats
        assert (told.unsent_instances, told.quarantined, told.out_of_space) == (2, 0, False)
        assert told.oldest_unsent_at is not None and told.free_disk_bytes > 0
        assert beat.clock_offset is not None and abs(beat.clock_offset.total_seconds()) < 5 and beat.error == ""


def test_the_client_names_every_failure(tmp_path, centre):
    with running(tmp_path, centre, start=False) as gateway:
        commit = wire.Commit(study_instance_uid="1.2", pack_id="0" * 32)
        with pytest.raises(NotFoundError):
            gateway.client.commit(commit)
        centre.faults["commit"].append((503, {"Retry-After": "7"}))
        with pytest.raises(LinkError) as caught:
            gateway.client.commit(commit)
        assert caught.value.retry_after_s == 7
        centre.faults["commit"].append((400, {}))
        with pytest.raises(PermanentError, match="as the test wanted"):
            gateway.client.commit(commit)
        centre.faults["commit"].append("portal")
        with pytest.raises(LinkError, match="not a CommitAnswer"):
            gateway.client.commit(commit)
        with pytest.raises(LinkError):
            gateway.client.feed(0, wait_s=0)


def test_a_centre_under_another_authority_is_not_spoken_to(tmp_path, centre):
    other = ensure_pki(tmp_path / "other")
    with running(tmp_path, centre, start=False, ca_file=other.site_ca) as gateway:
        with pytest.raises(LinkError):
            gateway.client.commit(wire.Commit(study_instance_uid="1.2", pack_id="0" * 32))
        assert centre.calls == []


def test_backoff_is_full_jitter_under_a_ceiling():
    waits = [backoff_s(tries, 0.5, 60.0) for tries in range(100) for _ in range(50)]
    assert max(waits) <= 60.0 and min(waits) >= 0.0
    assert max(backoff_s(0, 0.5, 60.0) for _ in range(200)) <= 0.5
    assert len({round(wait, 3) for wait in waits[-50:]}) > 30
    assert 5.0 <= backoff_s(0, 0.5, 60.0, retry_after_s=5.0) <= 60.0
    assert backoff_s(0, 0.5, 60.0, retry_after_s=9999.0) == 60.0
