"""What gateway tests share: certificates, settings, real data sets under new UIDs, a gateway process, patience."""

import functools
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import psutil
import pydicom
from pydicom.data import get_testdata_file
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import dcmread
from pydicom.filewriter import write_dataset
from pydicom.uid import UID, generate_uid

from deploy.pki import Pki, ensure_pki, issue_gateway
from dicom_gateway.settings import GatewaySettings

ROOT = Path(__file__).parents[1]
SITE = "county-a"
PYDICOM_FOLDERS = (
    Path(pydicom.__file__).parent / "data",
    Path(pydicom.__file__).parents[1] / "data_store" / "data",  # where the pydicom-data wheel puts its files
)


@functools.cache
def pki() -> Pki:
    """Certificates for one test run."""
    directory = tempfile.TemporaryDirectory(prefix="yuanzhen-pki-", ignore_cleanup_errors=True)
    _KEPT.append(directory)
    made = ensure_pki(Path(directory.name))
    issue_gateway(made, SITE)
    return made


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def settings_for(spool_dir: Path, centre_url: str = "https://127.0.0.1:1", **changes: object) -> GatewaySettings:
    """Settings with short times, so that tests do not wait."""
    return GatewaySettings(**(settings_values(spool_dir, centre_url) | changes))  # type: ignore[arg-type]


def settings_values(spool_dir: Path, centre_url: str) -> dict[str, object]:
    gateway = issue_gateway(pki(), SITE)
    return {
        "site": SITE,
        "spool_dir": spool_dir,
        "port": 0,
        "centre_url": centre_url,
        "ca_file": pki().site_ca,
        "cert_file": gateway.certificate,
        "key_file": gateway.key,
        "receipt_public_key_file": pki().receipt_public_key,
        "report_ca_file": pki().report_ca,
        "free_disk_watermark_bytes": 0,
        "gather_s": 0.1,
        "quiet_s": 0.5,
        "retry_base_s": 0.05,
        "retry_ceiling_s": 0.4,
        "refused_retry_s": 0.4,
        "heartbeat_s": 0.3,
    }


def until(condition: Callable[[], Any], what: str, timeout_s: float = 60.0) -> Any:
    """Wait for a condition; returns its value."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.02)


# Data sets


def data_set_of(path: Path) -> tuple[str, bytes]:
    """(transfer syntax, data set bytes as in the file, without file meta information)."""
    with path.open("rb") as file:
        return _transfer_syntax(file), file.read()


def _transfer_syntax(file: BinaryIO) -> str:
    pydicom.filereader.read_preamble(file, False)
    return str(pydicom.filereader._read_file_meta_info(file).get("TransferSyntaxUID", ""))


@functools.cache
def pydicom_files() -> list[Path]:
    """Every file of pydicom and pydicom-data whose file meta information names a transfer syntax."""
    found = []
    for path in sorted(path for folder in PYDICOM_FOLDERS for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            if file.read(132)[128:] == b"DICM" and not file.seek(0) and _transfer_syntax(file):
                found.append(path)
    return found


def sample(name: str = "CT_small.dcm") -> pydicom.Dataset:
    return dcmread(str(get_testdata_file(name, download=False)))


def encode(data_set: pydicom.Dataset, transfer_syntax_uid: str | None = None) -> bytes:
    """A data set's bytes, without file meta information."""
    uid = UID(transfer_syntax_uid or str(data_set.file_meta.TransferSyntaxUID))
    out = DicomBytesIO()
    out.is_implicit_VR, out.is_little_endian = uid.is_implicit_VR, uid.is_little_endian
    write_dataset(out, data_set)
    return out.getvalue()


def renamed(data_set: pydicom.Dataset, *, study: str | None = None, series: str | None = None) -> pydicom.Dataset:
    """The same image as another instance, in a given study and series."""
    data_set.SOPInstanceUID = generate_uid()
    data_set.StudyInstanceUID = study or generate_uid()
    data_set.SeriesInstanceUID = series or generate_uid()
    data_set.file_meta.MediaStorageSOPInstanceUID = data_set.SOPInstanceUID
    return data_set


def many(folder: Path, count: int, *, study: str | None = None, name: str = "CT_small.dcm") -> dict[str, str]:
    """Write `count` instances of one series as files. Returns SOP Instance UID → SHA-256 of the data set."""
    folder.mkdir(parents=True, exist_ok=True)
    study, series = study or generate_uid(), generate_uid()
    digests = {}
    for number in range(count):
        data_set = renamed(sample(name), study=study, series=series)
        data_set.InstanceNumber = number + 1
        path = folder / f"{number:04d}.dcm"
        data_set.save_as(path, enforce_file_format=True)
        digests[str(data_set.SOPInstanceUID)] = hashlib.sha256(data_set_of(path)[1]).hexdigest()
    return digests


def as_file(data_set: pydicom.Dataset) -> bytes:
    out = BytesIO()
    data_set.save_as(out, enforce_file_format=True)
    return out.getvalue()


# A gateway as a process of its own


class GatewayProcess:
    """`port` once it is ready. `lines` is its log so far."""

    def __init__(self, environment: dict[str, str], wrapper: list[str] | None = None) -> None:
        self.lines: list[dict[str, Any]] = []
        self.raw: list[str] = []
        self.process = subprocess.Popen(
            [*(wrapper or []), sys.executable, "-m", "dicom_gateway.main"],
            cwd=ROOT,
            env={**os.environ, **environment, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.raw.append(line)
            if line.startswith("{"):
                self.lines.append(json.loads(line))

    def said(self, action: str) -> dict[str, Any] | None:
        return next((line for line in list(self.lines) if line.get("action") == action), None)

    def ready(self) -> "GatewayProcess":
        def is_ready() -> object:
            assert self.process.poll() is None, "".join(self.raw[-30:])
            return self.said("gateway.ready")

        line = until(is_ready, "gateway ready")
        self.port, self.status_port = line["port"], line["status_port"]
        return self

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)  # with its wrapper, if it has one
        self.wait()

    def terminate(self) -> int:
        # The gateway itself, not its wrapper: strace that is told to end lets go of what it traces.
        wrapped = psutil.Process(self.process.pid).children(recursive=True)
        os.kill(wrapped[-1].pid if wrapped else self.process.pid, signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        code = self.process.wait(timeout=60)
        self._reader.join()
        if self.process.stdout:
            self.process.stdout.close()
        return code


@contextmanager
def gateway_process(
    spool_dir: Path, centre_url: str, wrapper: list[str] | None = None, **changes: object
) -> Iterator[GatewayProcess]:
    values = settings_values(spool_dir, centre_url) | changes
    environment = {
        f"YUANZHEN_GATEWAY_{name.upper()}": json.dumps(value) if isinstance(value, list) else str(value)
        for name, value in values.items()
    }
    gateway = GatewayProcess(environment, wrapper)
    try:
        yield gateway
    finally:
        if gateway.process.poll() is None:
            gateway.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
