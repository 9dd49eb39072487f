"""SIGKILL of a real gateway process, at random moments, again and again, while senders send and the uplink sends on.

Counted afterwards: every SOP Instance UID that was answered with Success is in the spool with its digest, none twice;
and with a centre behind it, everything is archived in the end. Power cuts are not SIGKILL: see the strace test in
test_gateway_scp.py."""

import hashlib
import json
import random
import signal
import threading
import time
import urllib.request

import pytest
from pydicom.filereader import dcmread
from pynetdicom import AE, build_context
from pynetdicom.sop_class import CTImageStorage

from dicom_gateway.spool import Spool
from dicom_gateway.sweep import sweep
from tests.gateway_kit import SITE, GatewayProcess, data_set_of, gateway_process, many, pki, settings_for, until
from tests.scripted_centre import ScriptedCentre

KILLS = 10


class Sender(threading.Thread):
    """Sends files in order to whatever gateway is there; goes on with the next association after each cut."""

    def __init__(self, files):
        super().__init__(daemon=True)
        self.files, self.acknowledged = list(files), {}
        self.port, self.finished = 0, threading.Event()

    def run(self):
        entity = AE(ae_title="CT1")
        entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = 5
        entity.connection_timeout = 2
        waiting = [(path, dcmread(path), data_set_of(path)[1]) for path in self.files]
        while waiting:
            association = entity.associate(
                "127.0.0.1", self.port, [build_context(CTImageStorage, "1.2.840.10008.1.2.1")], ae_title="YUANZHEN"
            )
            while association.is_established and waiting:
                _, data_set, data = waiting[0]
                try:
                    status = association.send_c_store(data_set)
                except RuntimeError:
                    break
                if "Status" not in status:
                    break
                if status.Status == 0x0000:
                    self.acknowledged[str(data_set.SOPInstanceUID)] = hashlib.sha256(data).hexdigest()
                    waiting.pop(0)
            if association.is_established:
                association.release()
            else:
                time.sleep(0.02)  # nobody listens now
        self.finished.set()


def checked(spool_dir, acknowledged):
    """Open the spool as the next start would, and count. Returns its rows."""
    spool = Spool(settings_for(spool_dir))
    try:
        sweep(spool)
        rows = spool.ledger.rows("SELECT * FROM instance")
        assert len({row["sop_instance_uid"] for row in rows}) == len(rows), "none twice"
        stored = {row["sop_instance_uid"]: row["sha256"] for row in rows}
        assert not {uid: digest for uid, digest in acknowledged.items() if stored.get(uid) != digest}, "none lost"
        for row in rows:
            assert row["damaged_at"] is None
            if row["freed_at"] is None:
                content = spool.object_path(row["sha256"]).read_bytes()
                assert hashlib.sha256(content).hexdigest() == row["sha256"]
        assert spool.ledger.row("PRAGMA integrity_check")[0] == "ok"
        return rows
    finally:
        spool.close()


def killed_again_and_again(environment_of, senders, kills, dice):
    """Start, let it work for a random moment, SIGKILL; at last a start that may finish."""
    for number in range(kills + 1):
        with environment_of() as gateway:
            gateway.ready()
            for sender in senders:
                sender.port = gateway.port
                if number == 0:
                    sender.start()
            if number == kills:
                yield gateway
                return
            time.sleep(dice.uniform(0.05, 0.6))
            gateway.kill()


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)  # a sender's socket dies as it should
def test_ten_kills_during_intake_lose_nothing_that_was_acknowledged(tmp_path):
    dice = random.Random(2026)
    senders = []
    for number in range(4):
        many(tmp_path / f"sender-{number}", 60)
        senders.append(Sender(sorted((tmp_path / f"sender-{number}").iterdir())))

    def start():
        return gateway_process(tmp_path / "spool", "https://127.0.0.1:1")

    for gateway in killed_again_and_again(start, senders, KILLS, dice):
        until(lambda: all(sender.finished.is_set() for sender in senders), "all sent", timeout_s=120)
        assert gateway.terminate() == 0
    acknowledged = {uid: digest for sender in senders for uid, digest in sender.acknowledged.items()}
    assert len(acknowledged) == 240
    assert len(checked(tmp_path / "spool", acknowledged)) == 240


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_kills_while_the_uplink_sends_archive_everything_in_the_end(tmp_path):
    dice = random.Random(4)
    centre = ScriptedCentre(pki(), SITE)
    for endpoint in ("offer", "put", "commit"):
        centre.faults[endpoint].extend(dice.choice(["cut", (503, {})]) for _ in range(6))
    many(tmp_path / "ct", 80)
    sender = Sender(sorted((tmp_path / "ct").iterdir()))

    def start():
        return gateway_process(tmp_path / "spool", centre.url, gather_s=0.02)

    try:
        for gateway in killed_again_and_again(start, [sender], 5, dice):
            until(sender.finished.is_set, "all sent", timeout_s=120)

            def state(gateway=gateway):
                return json.load(urllib.request.urlopen(f"http://127.0.0.1:{gateway.status_port}/status"))

            until(lambda: state()["backlog"]["instances"] == 0, "all archived")
            until(lambda: all(study["complete_at"] for study in state()["studies"]), "complete")
            assert state()["studies"][0]["received"] == state()["studies"][0]["archived"] == 80
            assert gateway.terminate() == 0
    finally:
        centre.close()
    rows = checked(tmp_path / "spool", sender.acknowledged)
    assert {(row["sop_instance_uid"], row["sha256"]) for row in rows} == set(centre.archive)
    assert all(row["archived_at"] for row in rows)


def test_sigterm_ends_the_gateway_in_order_with_status_0(tmp_path):
    with gateway_process(tmp_path / "spool", "https://127.0.0.1:1") as gateway:
        gateway.ready()
        assert gateway.terminate() == 0
        assert gateway.said("gateway.stopped")


def test_a_setting_that_cannot_be_used_ends_the_start_with_its_name(tmp_path):
    with gateway_process(tmp_path / "spool", "https://127.0.0.1:1", ca_file=tmp_path / "nowhere.pem") as gateway:
        assert gateway.wait() == 2
        assert "ca_file" in gateway.said("gateway.misconfigured")["reason"]


def test_a_port_that_is_taken_ends_the_start_and_says_so(tmp_path):
    with gateway_process(tmp_path / "one", "https://127.0.0.1:1") as first:
        first.ready()
        with gateway_process(tmp_path / "two", "https://127.0.0.1:1", port=first.port) as second:
            assert second.wait() == 2
            assert "in use" in second.said("gateway.cannot_start")["reason"]


def test_the_log_is_actions_without_patient_data(tmp_path):
    centre = ScriptedCentre(pki(), SITE)
    try:
        many(tmp_path / "ct", 2)
        sender = Sender(sorted((tmp_path / "ct").iterdir()))
        with gateway_process(tmp_path / "spool", centre.url) as gateway:
            sender.port = gateway.ready().port
            sender.start()
            until(lambda: gateway.said("uplink.complete"), "complete")
            status = urllib.request.urlopen(f"http://127.0.0.1:{gateway.status_port}/status").read().decode()
            retried = urllib.request.Request(f"http://127.0.0.1:{gateway.status_port}/retry", method="POST")
            assert urllib.request.urlopen(retried).status == 202
            gateway.process.send_signal(signal.SIGINT)
            assert gateway.wait() == 0
            data_set = dcmread(sender.files[0])
            for text in ("".join(gateway.raw), status):
                assert str(data_set.PatientName) not in text and data_set.PatientID not in text
            assert all("action" in line for line in gateway.lines)
            assert isinstance(gateway, GatewayProcess)
    finally:
        centre.close()
