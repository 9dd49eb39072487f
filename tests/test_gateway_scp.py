"""The gateway's DICOM services against real peers: DCMTK, Orthanc, pynetdicom as SCU, and what is no DICOM at all."""

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import urllib.request
import warnings
from contextlib import contextmanager
from io import BytesIO

import pytest
from pydicom.filereader import dcmread
from pydicom.uid import UID_dictionary, generate_uid
from pynetdicom import AE, build_context
from pynetdicom.dimse_messages import C_STORE_RQ
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.pdu_primitives import P_DATA
from pynetdicom.sop_class import CTImageStorage, Verification

from dicom_gateway.scp import StorageScp
from dicom_gateway.sop_classes import STORAGE_SOP_CLASSES, TRANSFER_SYNTAXES
from dicom_gateway.spool import Spool
from dicom_gateway.sweep import sweep
from tests.gateway_kit import (
    data_set_of,
    encode,
    free_port,
    gateway_process,
    many,
    pydicom_files,
    renamed,
    sample,
    settings_for,
    until,
)
from tests.peers import peer

FAST = {**os.environ, "TCP_NODELAY": "1"}


class Listening:
    """A spool and its SCP in this process."""

    def __init__(self, spool, scp, port):
        self.spool, self.scp, self.port = spool, scp, port

    def digests(self):
        return {row["sop_instance_uid"]: row["sha256"] for row in self.spool.ledger.rows("SELECT * FROM instance")}


@contextmanager
def listening(folder, **changes):
    settings = settings_for(folder / "spool", **changes)
    spool = Spool(settings)
    sweep(spool)
    scp = StorageScp(settings, spool)
    try:
        yield Listening(spool, scp, scp.start())
    finally:
        scp.stop()
        spool.close()


@pytest.fixture
def gateway(tmp_path):
    with listening(tmp_path, acse_timeout_s=1.0) as opened:  # after an abort a peer has this long to hang up (ARTIM)
        yield opened


@contextmanager
def association(port, *contexts, calling="CT1", called="YUANZHEN"):
    entity = AE(ae_title=calling)
    made = entity.associate("127.0.0.1", port, contexts=list(contexts), ae_title=called)
    try:
        yield made
    finally:
        if made.is_established:
            made.release()


def send_raw(port, data, data_set, transfer_syntax_uid="1.2.840.10008.1.2.1", sop_class_uid=CTImageStorage):
    """C-STORE of bytes as they are: what no honest library would encode."""
    with association(port, build_context(sop_class_uid, transfer_syntax_uid)) as made:
        assert made.is_established
        request = C_STORE()
        request.MessageID, request.Priority = 1, 2
        request.AffectedSOPClassUID, request.AffectedSOPInstanceUID = sop_class_uid, data_set.SOPInstanceUID
        request.DataSet = BytesIO(data)
        made._reactor_checkpoint.clear()  # as send_c_store does: the answer is for us, not for the reactor
        until(lambda: made._is_paused, "reactor paused")
        made.dimse.send_msg(request, made.accepted_contexts[0].context_id)
        _, answer = made.dimse.get_msg(block=True)
        made._reactor_checkpoint.set()
        return answer


@pytest.mark.peer("dcmtk")
def test_dcmtk_echoes_and_stores_and_every_byte_arrives(gateway, tmp_path):
    peer("dcmtk")
    digests = many(tmp_path / "ct", 12)
    where = ["-aec", "YUANZHEN", "127.0.0.1", str(gateway.port)]
    subprocess.run(["/usr/bin/echoscu", *where], env=FAST, check=True)
    subprocess.run(["/usr/bin/storescu", "-R", "+sd", *where, str(tmp_path / "ct")], env=FAST, check=True)
    stored = gateway.digests()
    assert stored.keys() == digests.keys()
    for uid in stored:  # storescu sends group lengths of its own making, so the pixels are compared
        path = gateway.spool.object_path(stored[uid])
        assert hashlib.sha256(path.read_bytes()).hexdigest() == stored[uid]
    assert gateway.scp.counts["stored"] == 12


@pytest.mark.peer("orthanc")
def test_an_orthanc_sends_a_study_and_every_instance_arrives(gateway, tmp_path):
    program = peer("orthanc")
    digests = many(tmp_path / "ct", 8) | many(tmp_path / "mr", 4, name="MR_small.dcm")
    http, dicom = free_port(), free_port()
    (tmp_path / "orthanc.json").write_text(
        json.dumps({
            "Name": "county", "StorageDirectory": str(tmp_path / "orthanc"), "HttpPort": http, "DicomPort": dicom,
            "DicomAet": "ORTHANC", "HttpBindAddresses": ["127.0.0.1"], "RemoteAccessAllowed": False,
            "AuthenticationEnabled": False, "Plugins": [],
            "DicomModalities": {"gateway": ["YUANZHEN", "127.0.0.1", gateway.port]},
        })
    )  # fmt: skip
    url = f"http://127.0.0.1:{http}"

    def post(path, body):
        return json.load(urllib.request.urlopen(urllib.request.Request(url + path, data=body), timeout=60))

    def is_up():
        try:
            return urllib.request.urlopen(f"{url}/system", timeout=5).status == 200
        except OSError:
            return False

    with (tmp_path / "orthanc.log").open("wb") as log:
        orthanc = subprocess.Popen([program, str(tmp_path / "orthanc.json")], env=FAST, stdout=log, stderr=log)
        try:
            until(is_up, "Orthanc")
            ids = [
                post("/instances", path.read_bytes())["ID"]
                for folder in ("ct", "mr")
                for path in sorted((tmp_path / folder).iterdir())
            ]
            sent = post("/modalities/gateway/store", json.dumps({"Resources": ids, "Synchronous": True}).encode())
            assert (sent["InstancesCount"], sent["FailedInstancesCount"]) == (12, 0)
        finally:
            orthanc.terminate()
            orthanc.wait(timeout=60)
    assert gateway.digests().keys() == digests.keys()


def test_every_storage_class_and_every_transfer_syntax_is_accepted(gateway):
    for start in range(0, len(STORAGE_SOP_CLASSES), 128):
        contexts = [build_context(uid) for uid in STORAGE_SOP_CLASSES[start : start + 128]]
        with association(gateway.port, *contexts) as made:
            assert len(made.accepted_contexts) == len(contexts)
    with association(gateway.port, *(build_context(CTImageStorage, uid) for uid in TRANSFER_SYNTAXES)) as made:
        assert [str(context.transfer_syntax[0]) for context in made.accepted_contexts] == list(TRANSFER_SYNTAXES)


def test_the_lists_hold_what_the_standard_has():
    names = {UID_dictionary[uid][0] for uid in STORAGE_SOP_CLASSES}
    for name in ("Ultrasound", "12-lead ECG Waveform", "VL Whole Slide Microscopy Image", "Encapsulated PDF"):
        assert any(known.startswith(name) and known.endswith("Storage") for known in names)
    assert "1.2.840.10008.5.1.4.1.1.6" in STORAGE_SOP_CLASSES  # Ultrasound Image Storage (Retired)
    for uid in ("1.2.1.99", "1.2.4.70", "1.2.4.201", "1.2.4.202", "1.2.4.203", "1.2.4.102", "1.2.5", "1.2.2"):
        assert f"1.2.840.10008.{uid}" in TRANSFER_SYNTAXES


def test_a_retired_class_is_stored_like_any_other(gateway):
    data_set = renamed(sample())
    data_set.SOPClassUID = "1.2.840.10008.5.1.4.1.1.6"
    answer = send_raw(gateway.port, encode(data_set), data_set, sop_class_uid=data_set.SOPClassUID)
    assert answer.Status == 0x0000


REFUSED = {
    "MR_truncated.dcm", "rtplan_truncated.dcm", "emri_small_jpeg_2k_lossless_too_short.dcm",  # cut off
    "bad_sequence.dcm", "JPEGLSNearLossless_08.dcm", "JPEGLSNearLossless_16.dcm",  # no Study Instance UID, or none
    "SC_rgb_jls_lossy_line.dcm", "SC_rgb_jls_lossy_sample.dcm",
}  # fmt: skip
SENDABLE = [path for path in pydicom_files() if path.stat().st_size < 500_000 and "DICOMDIR" not in path.name]


@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")  # one of pydicom's files has a digest for a UID
def test_every_real_file_arrives_byte_for_byte_or_is_refused_with_a_reason(gateway):
    seen, refused = 0, set()
    for path in SENDABLE:
        transfer_syntax_uid, data = data_set_of(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data_set = dcmread(path, force=True, stop_before_pixels=True)
            sop_class_uid, sop_instance_uid = str(data_set.get("SOPClassUID")), data_set.get("SOPInstanceUID")
        if sop_class_uid not in STORAGE_SOP_CLASSES or not sop_instance_uid:
            continue
        if transfer_syntax_uid not in TRANSFER_SYNTAXES:
            continue
        answer = send_raw(gateway.port, data, data_set, transfer_syntax_uid, data_set.SOPClassUID)
        seen += 1
        if answer.Status == 0x0000:
            digest = hashlib.sha256(data).hexdigest()
            stored = gateway.spool.ledger.rows(
                "SELECT sha256 FROM instance WHERE sop_instance_uid = ?", str(data_set.SOPInstanceUID)
            )
            if digest in {row["sha256"] for row in stored}:
                assert gateway.spool.object_path(digest).read_bytes() == data
            else:
                assert stored  # the same content came in another encoding before
        else:
            refused.add(path.name)
            assert answer.ErrorComment and len(answer.ErrorComment) <= 64
    assert seen > 120 and refused == REFUSED


def test_an_unknown_sop_class_is_rejected_as_a_presentation_context(gateway):
    with association(gateway.port, build_context("1.2.3.4.5"), build_context(Verification)) as made:
        (rejected,) = made.rejected_contexts
        assert rejected.result == 0x03  # PS3.8 Table 9-18: abstract syntax not supported
        assert made.send_c_echo().Status == 0x0000


def test_a_wrong_called_ae_title_is_rejected_with_its_reason(gateway):
    with association(gateway.port, build_context(Verification), called="SOMEONE") as made:
        assert made.is_rejected
        answer = made.acceptor.primitive
        assert (answer.result, answer.result_source, answer.diagnostic) == (1, 1, 7)  # PS3.8 Table 9-21
    assert gateway.scp.counts["rejected"] == 1


def test_a_calling_ae_title_that_is_not_on_the_list_is_rejected_with_its_reason(tmp_path):
    with listening(tmp_path, allowed_ae_titles=("CT1", "MR1")) as gateway:
        with association(gateway.port, build_context(Verification), calling="STRANGER") as made:
            assert made.is_rejected
            assert made.acceptor.primitive.diagnostic == 3
        with association(gateway.port, build_context(Verification), calling="MR1") as made:
            assert made.is_established


def test_a_truncated_data_set_is_refused_with_a_comment_and_kept_for_a_person(gateway):
    data_set = renamed(sample())
    data = encode(data_set)[:-1000]
    answer = send_raw(gateway.port, data, data_set)
    assert answer.Status == 0xC000
    assert answer.ErrorComment.startswith("(7FE0,0010) at byte") and len(answer.ErrorComment) <= 64
    row = gateway.spool.ledger.row("SELECT * FROM quarantine")
    assert (row["kind"], row["subject"]) == ("refused_data_set", str(data_set.SOPInstanceUID))
    assert answer.ErrorComment == row["reason"][:64]
    assert (gateway.spool.refused / row["sha256"]).read_bytes() == data
    assert gateway.digests() == {}
    send_raw(gateway.port, data, data_set)
    assert gateway.spool.ledger.row("SELECT times FROM quarantine")["times"] == 2


def test_a_data_set_of_another_instance_is_answered_a900(gateway):
    data_set = renamed(sample())
    data = encode(data_set)
    data_set.SOPInstanceUID = generate_uid()
    answer = send_raw(gateway.port, data, data_set)
    assert (answer.Status, answer.ErrorComment) == (0xA900, "SOPInstanceUID is not the one announced")


def test_a_mistake_in_the_gateway_is_never_answered_with_success(gateway, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr("dicom_gateway.scp.receive", broken)
    data_set = renamed(sample())
    assert send_raw(gateway.port, encode(data_set), data_set).Status == 0x0110


def test_above_the_watermark_a_store_is_answered_a700_and_echo_goes_on(tmp_path):
    with listening(tmp_path, free_disk_watermark_bytes=2**60) as gateway:
        data_set = renamed(sample())
        answer = send_raw(gateway.port, encode(data_set), data_set)
        assert answer.Status == 0xA700
        assert answer.ErrorComment.startswith("Spool disk at its watermark")
        with association(gateway.port, build_context(Verification)) as made:
            assert made.send_c_echo().Status == 0x0000


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\nHost: gateway\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(600),
        b"\x00" * 64,
        b"\x01\x00\xff\xff\xff\xff" + b"A" * 1000,  # an A-ASSOCIATE-RQ that says it is 4 GiB long
        b"\x01\x00\x00\x00\x00\x04abcd",
        b"MSH|^~\\&|HIS|COUNTY\r",
    ],
    ids=["http", "tls", "zeros", "huge-pdu", "short-associate", "hl7"],
)
def test_what_is_not_dicom_is_cut_off_and_does_no_harm(gateway, sent):
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=30) as connection:
        connection.sendall(sent)
        answer = b""
        try:
            while block := connection.recv(4096):
                answer += block
        except ConnectionResetError:
            pass
    assert answer == b"" or answer[0] in (0x03, 0x07)  # nothing, A-ASSOCIATE-RJ or A-ABORT
    with association(gateway.port, build_context(Verification)) as made:
        assert made.send_c_echo().Status == 0x0000


def test_what_is_not_dicom_is_counted(gateway):
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=30) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
        while connection.recv(4096):
            pass
    assert gateway.scp.counts["not_dicom"] == 1


def test_more_associations_than_allowed_are_rejected_for_now(tmp_path):
    with (
        listening(tmp_path, maximum_associations=2) as gateway,
        association(gateway.port, build_context(Verification)) as first,
        association(gateway.port, build_context(Verification)) as second,
        association(gateway.port, build_context(Verification)) as third,
    ):
        assert first.is_established and second.is_established and third.is_rejected
        answer = third.acceptor.primitive
        assert (answer.result, answer.result_source, answer.diagnostic) == (2, 3, 2)  # local limit, transient


def test_idle_connections_keep_no_modality_out(tmp_path):
    with listening(tmp_path, maximum_associations=2, acse_timeout_s=60.0) as gateway, contextlib.ExitStack() as idle:
        connections = [
            idle.enter_context(socket.create_connection(("127.0.0.1", gateway.port), timeout=30)) for _ in range(40)
        ]
        with association(gateway.port, build_context(Verification)) as made:
            assert made.send_c_echo().Status == 0x0000
        assert connections[0].recv(1) == b""  # the oldest went
        until(lambda: len(gateway.scp._server.active_associations) <= 4, "no more than four wait")


def test_a_peer_that_hangs_up_before_it_asks_leaves_nothing_behind(tmp_path):
    with listening(tmp_path, acse_timeout_s=60.0) as gateway:
        for _ in range(5):
            socket.create_connection(("127.0.0.1", gateway.port), timeout=30).close()
        until(lambda: gateway.scp.counts["connections"] == 5, "all seen")
        until(lambda: not gateway.scp._server.active_associations, "all gone", timeout_s=20.0)


def send_fragments(made, data_set, sizes, last):
    """A C-STORE-RQ and fragments of a data set of these sizes."""
    request = C_STORE()
    request.MessageID, request.Priority = 1, 2
    request.AffectedSOPClassUID, request.AffectedSOPInstanceUID = CTImageStorage, data_set.SOPInstanceUID
    request.DataSet = BytesIO(b"-")
    made._reactor_checkpoint.clear()
    until(lambda: made._is_paused, "reactor paused")
    message = C_STORE_RQ()
    message.primitive_to_message(request)
    context_id = made.accepted_contexts[0].context_id
    command, _ = message.encode_msg(context_id, 0)
    made.dul.send_pdu(command)
    for number, size in enumerate(sizes, start=1):
        fragment = P_DATA()
        header = b"\x02" if last and number == len(sizes) else b"\x00"
        fragment.presentation_data_value_list = [[context_id, header + bytes(size)]]
        made.dul.send_pdu(fragment)


def test_a_data_set_that_does_not_fit_into_memory_is_answered_a700_and_the_next_is_stored(tmp_path):
    with listening(tmp_path, receive_memory_bytes=400_000) as gateway:
        with association(gateway.port, build_context(CTImageStorage, "1.2.840.10008.1.2.1")) as made:
            send_fragments(made, renamed(sample()), [50_000] * 6, last=True)  # one may have half of it
            _, answer = made.dimse.get_msg(block=True)
            made._reactor_checkpoint.set()
            assert (answer.Status, answer.ErrorComment) == (0xA700, "No memory for a data set of this size now")
            assert made.send_c_store(renamed(sample())).Status == 0x0000
        until(lambda: gateway.scp._inflow.free_bytes == 400_000, "all given back")


def test_fragments_that_never_end_hold_a_bounded_memory_until_their_peer_is_gone(tmp_path):
    with listening(tmp_path, receive_memory_bytes=400_000) as gateway, contextlib.ExitStack() as open_ones:
        context = build_context(CTImageStorage, "1.2.840.10008.1.2.1")
        made = [open_ones.enter_context(association(gateway.port, context)) for _ in range(2)]
        for one in made:
            send_fragments(one, renamed(sample()), [50_000] * 4, last=False)
        until(lambda: gateway.scp._inflow.free_bytes == 0, "all taken")
        data_set = renamed(sample())
        assert send_raw(gateway.port, encode(data_set), data_set).Status == 0xA700
        for one in made:
            one.abort()
        until(lambda: gateway.scp._inflow.free_bytes == 400_000, "all given back")
        assert send_raw(gateway.port, encode(data_set), data_set).Status == 0x0000


def test_a_command_that_never_ends_is_cut_off(gateway):
    with association(gateway.port, build_context(CTImageStorage)) as made:
        for _ in range(5):
            fragment = P_DATA()
            fragment.presentation_data_value_list = [[made.accepted_contexts[0].context_id, b"\x01" + bytes(16_000)]]
            made.dul.send_pdu(fragment)
        until(lambda: made.is_aborted, "aborted")
    assert gateway.scp.counts["not_dicom"] == 1


def test_an_empty_data_set_is_refused_with_a_comment(gateway):
    data_set = renamed(sample())
    with association(gateway.port, build_context(CTImageStorage, "1.2.840.10008.1.2.1")) as made:
        send_fragments(made, data_set, [0], last=True)
        _, answer = made.dimse.get_msg(block=True)
        made._reactor_checkpoint.set()
    assert (answer.Status, answer.ErrorComment) == (0xC000, "StudyInstanceUID is missing")


def test_what_the_gateway_keeps_is_for_its_own_account_only(tmp_path):
    (tmp_path / "spool").mkdir(mode=0o755)
    with gateway_process(tmp_path / "spool", "https://127.0.0.1:1") as gateway:
        gateway.ready()
        data_set = renamed(sample())
        assert send_raw(gateway.port, encode(data_set), data_set).Status == 0x0000
        modes = {path.stat().st_mode & 0o077 for path in [tmp_path / "spool", *(tmp_path / "spool").rglob("*")]}
        assert modes == {0}


def test_a_peer_that_connects_and_says_nothing_is_let_go(gateway):
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=30) as connection:
        assert connection.recv(4096) == b""


def test_a_peer_that_stops_in_the_middle_of_a_message_is_let_go(tmp_path):
    with (
        listening(tmp_path, network_timeout_s=0.5, acse_timeout_s=0.5) as gateway,
        socket.create_connection(("127.0.0.1", gateway.port), timeout=30) as connection,
    ):
        connection.sendall(b"\x01\x00\x00\x00\x00\xff half")
        while connection.recv(4096):
            pass


@pytest.mark.peer("strace")
def test_a_sync_of_file_directory_and_database_precedes_the_response(tmp_path):
    """SIGKILL does not test fsync, because the page cache survives it; the order of system calls does."""
    program = peer("strace")
    trace = tmp_path / "trace"
    wrapper = [program, "-f", "-y", "-e", "trace=fsync,fdatasync,rename,sendto", "-s", "16", "-o", str(trace)]
    if subprocess.run([*wrapper, "/bin/true"], check=False, capture_output=True).returncode:
        pytest.skip("strace may not trace here")
    with gateway_process(tmp_path / "spool", "https://127.0.0.1:1", wrapper) as gateway:
        gateway.ready()
        data_set = renamed(sample())
        before = len(trace.read_text().splitlines())
        assert send_raw(gateway.port, encode(data_set), data_set).Status == 0x0000
        gateway.terminate()
    lines = trace.read_text().splitlines()[before:]
    names_given = [i for i, line in enumerate(lines) if "rename(" in line and "/objects/" in line]
    assert len(names_given) == 2 and ".json" in lines[names_given[0]], "facts have their name before the bytes"
    renamed_at = names_given[1]
    file_synced = [i for i, line in enumerate(lines) if "sync(" in line and "/incoming/" in line]
    directory_synced = [i for i, line in enumerate(lines) if "sync(" in line and "/objects/" in line]
    database_synced = [i for i, line in enumerate(lines) if "sync(" in line and "spool.db-wal" in line]
    # The response is the last P-DATA-TF (type 04) sent: the first bytes of the PDU show in the trace.
    responses = [i for i, line in enumerate(lines) if "sendto(" in line and '"\\4\\0' in line]
    assert responses, lines[-20:]
    assert sum(i < names_given[0] for i in file_synced) == 2, "facts and bytes synced before they are renamed"
    assert any(renamed_at < i < responses[0] for i in directory_synced), "directory synced after the rename"
    assert any(max(renamed_at, directory_synced[0]) < i < responses[0] for i in database_synced), "row synced last"
