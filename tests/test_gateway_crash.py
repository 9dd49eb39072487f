"""SIGKILL of a real gateway process, at random moments, again and again, while senders send and the uplink sends on.

Counted afterwards: every SOP Instance UID that was answered with Success is in the spool with its digest, none twice;
and with a centre behind it, everything is archived in the end. Power cuts are not SIGKILL: see the strace test in
test_gateway_scp.py."""

import hashlib
import json
import random
import signal
import subprocess
import sys
import time
import urllib.request

import pytest
from pydicom.filereader import dcmread

from dicom_gateway.spool import Spool
from dicom_gateway.sweep import sweep
from tests.gateway_kit import ROOT, SITE, gateway_process, many, pki, settings_for, until
from tests.scripted_centre import ScriptedCentre

KILLS = 10


class Senders:
    """A process of senders (tests/sending.py), one for each folder of `count` images."""

    def __init__(self, place, *counts):
        self.folders = [place / f"sender-{number}" for number in range(len(counts))]
        for folder, count in zip(self.folders, counts, strict=True):
            many(folder, count)
        self._port_file, self._acknowledged = place / "port", place / "acknowledged"
        self._process = None

    def send_to(self, port):
        new = self._port_file.with_suffix(".new")
        new.write_text(str(port))
        new.rename(self._port_file)
        if self._process is None:
            arguments = [str(path) for path in (self._port_file, self._acknowledged, *self.folders)]
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "tests.sending", *arguments], cwd=ROOT, stderr=subprocess.DEVNULL
            )

    def wait(self):
        assert self._process.wait(timeout=120) == 0

    def stop(self):
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def acknowledged(self):
        return dict(line.split() for line in self._acknowledged.read_text().splitlines())

    def count(self):
        return len(self._acknowledged.read_text().splitlines()) if self._acknowledged.exists() else 0


@pytest.fixture
def senders_of(tmp_path):
    made = []

    def make(*counts):
        made.append(Senders(tmp_path, *counts))
        return made[-1]

    yield make
    for senders in made:
        senders.stop()


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


def killed_again_and_again(start, senders, kills, dice):
    """Start, let it take in some images more, SIGKILL at a random moment; at last a start that may finish."""
    for number in range(kills + 1):
        with start() as gateway:
            senders.send_to(gateway.ready().port)
            if number == kills:
                yield gateway
                return
            before = senders.count()
            until(lambda before=before: senders.count() > before, "an image more")
            time.sleep(dice.uniform(0.0, 0.1))
            gateway.kill()


def test_ten_kills_during_intake_lose_nothing_that_was_acknowledged(tmp_path, senders_of):
    senders = senders_of(*[150] * 4)
    for gateway in killed_again_and_again(
        lambda: gateway_process(tmp_path / "spool", "https://127.0.0.1:1"), senders, KILLS, random.Random(2026)
    ):
        assert senders.count() < 600, "the kills came while images were on their way"
        senders.wait()
        assert gateway.terminate() == 0
    acknowledged = senders.acknowledged()
    assert len(acknowledged) == 600
    assert len(checked(tmp_path / "spool", acknowledged)) == 600


def test_kills_while_the_uplink_sends_archive_everything_in_the_end(tmp_path, senders_of):
    dice = random.Random(4)
    centre = ScriptedCentre(pki(), SITE)
    for endpoint in ("offer", "put", "commit"):
        centre.faults[endpoint].extend(dice.choice(["cut", (503, {})]) for _ in range(6))
    senders = senders_of(200)
    try:
        for gateway in killed_again_and_again(
            lambda: gateway_process(tmp_path / "spool", centre.url, gather_s=0.02), senders, 5, dice
        ):
            senders.wait()

            def state(gateway=gateway):
                with urllib.request.urlopen(f"http://127.0.0.1:{gateway.status_port}/status") as answer:
                    return json.load(answer)

            until(lambda: state()["backlog"]["instances"] == 0, "all archived")
            until(lambda: all(study["complete_at"] for study in state()["studies"]), "complete")
            assert state()["studies"][0]["received"] == state()["studies"][0]["archived"] == 200
            assert gateway.terminate() == 0
    finally:
        centre.close()
    rows = checked(tmp_path / "spool", senders.acknowledged())
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


def test_the_log_is_actions_without_patient_data(tmp_path, senders_of):
    centre = ScriptedCentre(pki(), SITE)
    senders = senders_of(2)
    try:
        with gateway_process(tmp_path / "spool", centre.url) as gateway:
            senders.send_to(gateway.ready().port)
            until(lambda: gateway.said("uplink.complete"), "complete")
            with urllib.request.urlopen(f"http://127.0.0.1:{gateway.status_port}/status") as answer:
                status = answer.read().decode()
            retry = urllib.request.Request(f"http://127.0.0.1:{gateway.status_port}/retry", method="POST")
            with urllib.request.urlopen(retry) as answer:
                assert answer.status == 202
            gateway.process.send_signal(signal.SIGINT)
            assert gateway.wait() == 0
    finally:
        centre.close()
    data_set = dcmread(next(senders.folders[0].iterdir()))
    for text in ("".join(gateway.raw), status):
        assert str(data_set.PatientName) not in text and data_set.PatientID not in text
    assert gateway.lines and all("action" in line for line in gateway.lines)
