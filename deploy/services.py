"""What the one-machine stack consists of: its processes in order, their settings, and how each shows that it works.

External servers take the place of the embedded ones when their address is in the environment already
(`YUANZHEN_DATABASE_URL`, `YUANZHEN_S3_URL`, `YUANZHEN_BROKER_URL`); nothing else changes.
"""

import http.client
import os
import ssl
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.dicom_probe import dicom_problem
from deploy.embedded import Server
from deploy.pki import Pki, issue_gateway
from deploy.postgres import FILER, FILER_DATABASE, Passwords, Postgres
from deploy.process import Command
from deploy.seaweedfs import FilerStore, Ports, SeaweedFS
from deploy.seed import GATEWAY_NAME, GATEWAY_SITE
from deploy.valkey import Valkey

_ROOT = Path(__file__).resolve().parent.parent


AE_TITLE = "YUANZHEN"
PACS_AE_TITLE = "COUNTYPACS"
_PROBE_SECONDS = 3.0
Probe = Callable[[], str | None]


@dataclass(frozen=True)
class Program:
    """One of our own Python processes, in the shape of `deploy.embedded.Server`."""

    name: str
    port: int
    run: Command
    probe: Probe

    def prepare(self) -> None:
        """Forget an earlier run's log; our programs clear up after themselves when they start."""
        if isinstance(self.probe, SaidReady):
            self.probe.begin()

    def command(self) -> Command:
        """The process to run."""
        return self.run

    def problem(self) -> str | None:
        """None when the probe is answered."""
        return self.probe()

    def bootstrap(self) -> None:
        """Nothing."""

    def stopped(self) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Layout:
    """Everything that describes one stack."""

    var: Path
    ports: Mapping[str, int]
    environment: Mapping[str, str]
    servers: Sequence[Sequence[Server]]  # groups, in start order; a group starts together
    programs: Sequence[Sequence[Server]]  # started after migration and seeding


def layout(
    var: Path, ports: Mapping[str, int], credentials: Mapping[str, str], pki: Pki, environ: Mapping[str, str]
) -> Layout:
    """Describe the stack under `var`."""
    passwords = Passwords(*(credentials[f"POSTGRES_{role}"] for role in ("SUPERUSER", "OWNER", "APP", "FILER")))
    postgres = Postgres(var / "postgres", ports["postgres"], passwords)
    filer = FilerStore(ports["postgres"], FILER_DATABASE, FILER, passwords.filer)
    s3 = SeaweedFS(var / "s3", Ports.of(ports), credentials["S3_ACCESS_KEY"], credentials["S3_SECRET_KEY"], filer)
    valkey = Valkey(var / "valkey", ports["valkey"], credentials["VALKEY"])

    values = _centre(var, ports, pki)
    second: list[Server] = []
    if "YUANZHEN_DATABASE_URL" not in environ:
        values |= {"YUANZHEN_DATABASE_URL": postgres.app_url, "YUANZHEN_DATABASE_OWNER_URL": postgres.owner_url}
    if "YUANZHEN_S3_URL" not in environ:
        values |= {
            "YUANZHEN_S3_URL": s3.url,
            "YUANZHEN_S3_ACCESS_KEY": s3.access_key,
            "YUANZHEN_S3_SECRET_KEY": s3.secret_key,
        }
        second.append(s3)
    if "YUANZHEN_BROKER_URL" not in environ:
        values["YUANZHEN_BROKER_URL"] = valkey.url
        second.append(valkey)
    # The embedded S3 server keeps its names in PostgreSQL, so it brings PostgreSQL with it.
    first: list[Server] = [postgres] if s3 in second or "YUANZHEN_DATABASE_URL" not in environ else []
    values |= _gateway(var, ports, pki)
    environment = {name: environ.get(name, value) for name, value in values.items()}
    programs = _programs(var, ports, pki, environment)
    return Layout(var, ports, environment, [group for group in (first, second) if group], programs)


def _centre(var: Path, ports: Mapping[str, int], pki: Pki) -> dict[str, str]:
    return {
        "YUANZHEN_WEB_HOST": "127.0.0.1",
        "YUANZHEN_WEB_PORT": str(ports["web"]),
        "YUANZHEN_INGEST_HOST": "127.0.0.1",
        "YUANZHEN_INGEST_PORT": str(ports["ingest"]),
        "YUANZHEN_PKI_DIR": str(pki.directory),
        "YUANZHEN_ASSETS_DIR": str(Path.cwd() / ".cache" / "assets"),
    }


def _gateway(var: Path, ports: Mapping[str, int], pki: Pki) -> dict[str, str]:
    certificate = issue_gateway(pki, GATEWAY_NAME)
    values = {
        "SITE": GATEWAY_SITE,
        "NAME": GATEWAY_NAME,
        "SPOOL_DIR": str(var / "gateway"),
        "AE_TITLE": AE_TITLE,
        "HOST": "127.0.0.1",
        "PORT": str(ports["dicom"]),
        "CENTRE_URL": f"https://127.0.0.1:{ports['ingest']}",
        "CA_FILE": str(pki.site_ca),
        "CERT_FILE": str(certificate.certificate),
        "KEY_FILE": str(certificate.key),
        "RECEIPT_PUBLIC_KEY_FILE": str(pki.receipt_public_key),
        "REPORT_CA_FILE": str(pki.report_ca),
        "PACS_HOST": "127.0.0.1",
        "PACS_PORT": str(ports["county_pacs"]),
        "PACS_AE_TITLE": PACS_AE_TITLE,
    }
    return {f"YUANZHEN_GATEWAY_{name}": value for name, value in values.items()}


def _programs(var: Path, ports: Mapping[str, int], pki: Pki, environment: Mapping[str, str]) -> list[list[Server]]:
    env = {
        **environment,
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH", "")))),
    }

    def program(name: str, *arguments: str, port: int, probe: Probe) -> Program:
        return Program(name, port, Command(name, [sys.executable, "-m", *arguments], var, env), probe)

    def said(name: str, text: str) -> SaidReady:
        return SaidReady(var / "log" / f"{name}.log", text)

    def worker(name: str, threads: int, *queues: str) -> Program:
        limits = ("--processes", "1", "--threads", str(threads), "--worker-shutdown-timeout", "10000")
        arguments = ("dramatiq", "deploy.worker", *limits, "--queues", *queues)
        return program(name, *arguments, port=0, probe=said(name, "is ready for action"))

    certificate = issue_gateway(pki, GATEWAY_NAME)
    tls = ssl.create_default_context(cafile=str(pki.site_ca))
    tls.load_cert_chain(certificate.certificate, certificate.key)
    web, ingest, dicom, pacs = (ports[name] for name in ("web", "ingest", "dicom", "county_pacs"))
    pacs_options = ("--port", str(pacs), "--ae-title", PACS_AE_TITLE, "--directory", str(var / "county-pacs"))
    return [
        [
            program("web", "reading_queue.server", port=web, probe=_http(web, "/healthz")),
            program("ingest", "routing.server", port=ingest, probe=_http(ingest, "/", tls)),
            program("clock", "routing.clock", port=0, probe=said("clock", "clock.ready")),
            worker("worker", 4, "route", "return", "maintenance"),
            worker("triage", 1, "triage-urgent", "triage"),
        ],
        [
            program("county-pacs", "deploy.county_pacs", *pacs_options, port=pacs, probe=_dicom(pacs, PACS_AE_TITLE)),
            program("gateway", "dicom_gateway.main", port=dicom, probe=_dicom(dicom, AE_TITLE)),
        ],
    ]


class SaidReady:
    """The probe of a process without a port: it writes `text` to its log when it has begun its work."""

    def __init__(self, log: Path, text: str) -> None:
        self._log = log
        self._text = text.encode()
        self._from_byte = 0

    def begin(self) -> None:
        """Only what is written from now on counts."""
        self._from_byte = self._log.stat().st_size if self._log.exists() else 0

    def __call__(self) -> str | None:
        if not self._log.exists():
            return "no log yet"
        with self._log.open("rb") as file:
            # A log that was cut meanwhile is shorter than the place remembered: read all of it.
            file.seek(self._from_byte if self._log.stat().st_size >= self._from_byte else 0)
            return None if self._text in file.read() else "it has not said that it is ready"


def _http(port: int, path: str, tls: ssl.SSLContext | None = None) -> Probe:
    def probe() -> str | None:
        connection = (
            http.client.HTTPSConnection("127.0.0.1", port, timeout=_PROBE_SECONDS, context=tls)
            if tls
            else http.client.HTTPConnection("127.0.0.1", port, timeout=_PROBE_SECONDS)
        )
        try:
            connection.request("GET", path)
            status = connection.getresponse().status
        except (OSError, http.client.HTTPException) as error:
            return str(error) or type(error).__name__
        finally:
            connection.close()
        return f"HTTP {status}" if status >= 500 else None

    return probe


def _dicom(port: int, ae_title: str) -> Probe:
    return lambda: dicom_problem(port, ae_title, _PROBE_SECONDS)
