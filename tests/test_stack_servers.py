"""The embedded servers: they answer, keep what was acknowledged, and are closed to those without a key.

That the S3 server syncs before it answers is seen with strace, because a killed process loses nothing to the page
cache. What a power cut does to the files that are not synced is played by cutting those files.
"""

import io
import os
import secrets
import signal
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
import redis
from minio.commonconfig import COMPLIANCE
from minio.error import S3Error
from minio.retention import Retention

from deploy import embedded
from deploy.postgres import FILER, FILER_DATABASE, Passwords, Postgres
from deploy.process import Child, free_ports, is_free
from deploy.seaweedfs import BUCKET, LOCK_BUCKET, FilerStore, Ports, SeaweedFS
from deploy.valkey import Valkey
from storage.database import psycopg_dsn
from tests.peers import peer


class Store:
    """An S3 server of a test's own, and its process."""

    def __init__(self, postgres: Postgres, home: Path) -> None:
        filer = FilerStore(postgres.port, FILER_DATABASE, FILER, postgres.passwords.filer)
        self.home = home
        self.ports = Ports(*free_ports(8))
        self.server = SeaweedFS(home / "s3", self.ports, "key", secrets.token_hex(8), filer)
        self.child: Child = embedded.start(self.server, home / "s3.log")

    def kill_and_start_again(self) -> None:
        self.child.signal_family(signal.SIGKILL)
        self.child.reap()
        self.child = embedded.start(self.server, self.home / "s3.log")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    # With a PostgreSQL of its own: two S3 servers cannot share one filer database.
    home = tmp_path_factory.mktemp("store")
    postgres = Postgres(home / "pg", free_ports(1)[0], Passwords("a", "b", "c", "d"))
    with embedded.running(postgres, home / "postgres.log"):
        made = Store(postgres, home)
        yield made
        made.child.stop()
    postgres.forget()


def test_the_application_role_owns_nothing_and_cannot_pass_row_level_security(postgres_server: Postgres) -> None:
    with psycopg.connect(psycopg_dsn(postgres_server.app_url)) as connection:
        query = "SELECT rolsuper, rolbypassrls, rolcreatedb, rolcreaterole FROM pg_roles WHERE rolname = current_user"
        assert connection.execute(query).fetchone() == (False, False, False, False)
        owned = connection.execute("SELECT count(*) FROM pg_class WHERE relowner = current_user::regrole").fetchone()
        assert owned == (0,)


def test_a_wrong_password_is_refused_by_postgres_and_valkey(postgres_server: Postgres, valkey_server: Valkey) -> None:
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(host="127.0.0.1", port=postgres_server.port, user="postgres", password="x", dbname="postgres")
    client = redis.Redis(port=valkey_server.port)
    with pytest.raises(redis.AuthenticationError):
        client.ping()
    client.close()


def test_postgres_syncs_its_commits(postgres_server: Postgres) -> None:
    with psycopg.connect(psycopg_dsn(postgres_server.app_url)) as connection:
        for setting in ("fsync", "synchronous_commit", "full_page_writes", "data_checksums"):
            assert connection.execute(f"SHOW {setting}").fetchone() == ("on",), setting


def test_a_locked_object_cannot_be_deleted_and_its_lock_cannot_be_shortened(store: Store) -> None:
    client = store.server.client()
    until = datetime.now(UTC) + timedelta(days=1)
    made = client.put_object(LOCK_BUCKET, "r", io.BytesIO(b"report"), 6, retention=Retention(COMPLIANCE, until))
    with pytest.raises(S3Error, match="AccessDenied"):
        client.remove_object(LOCK_BUCKET, "r", version_id=made.version_id)
    with pytest.raises(S3Error):
        sooner = Retention(COMPLIANCE, until - timedelta(hours=12))
        client.set_object_retention(LOCK_BUCKET, "r", sooner, version_id=made.version_id)
    assert client.get_object(LOCK_BUCKET, "r", version_id=made.version_id).data == b"report"


def test_a_bucket_with_objects_cannot_be_deleted_and_a_put_makes_none(store: Store) -> None:
    client = store.server.client()
    client.put_object(BUCKET, "kept", io.BytesIO(b"x"), 1)
    with pytest.raises(S3Error, match="BucketNotEmpty"):
        client.remove_bucket(BUCKET)
    with pytest.raises(S3Error, match="NoSuchBucket"):
        client.put_object("unknown-bucket", "x", io.BytesIO(b"x"), 1)


@pytest.mark.parametrize(
    ("part", "path"),
    [("master", "/col/delete?collection=yuanzhen"), ("filer", "/buckets/yuanzhen/kept"), ("volume", "/status")],
)
def test_the_servers_inner_ports_answer_nobody_without_its_own_certificate(store: Store, part: str, path: str) -> None:
    port = getattr(store.ports, part)
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    for address in (f"http://127.0.0.1:{port}{path}", f"https://127.0.0.1:{port}{path}"):
        for method in ("GET", "POST", "DELETE"):
            request = urllib.request.Request(address, method=method)
            with pytest.raises((urllib.error.URLError, ConnectionError, ssl.SSLError)) as refusal:
                urllib.request.urlopen(request, context=context, timeout=5).close()
            if isinstance(refusal.value, urllib.error.HTTPError):
                # Plain HTTP on a TLS port is told so, and nothing else.
                assert refusal.value.code == 400
                refusal.value.close()
    client = store.server.client()
    client.put_object(BUCKET, "kept", io.BytesIO(b"still here"), 10)
    assert client.get_object(BUCKET, "kept").data == b"still here"


def test_everything_but_nothing_else_listens_on_loopback_only(store: Store) -> None:
    listing = Path("/proc/net/tcp").read_text().splitlines()[1:]
    ours = {getattr(store.ports, name) for name in Ports.__dataclass_fields__}
    addresses = {
        line.split()[1].split(":")[0]
        for line in listing
        if line.split()[3] == "0A" and int(line.split()[1].split(":")[1], 16) in ours
    }
    assert addresses == {"0100007F"}


def test_an_object_is_synced_to_disk_before_its_put_is_answered(store: Store, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    calls = "trace=pwrite64,write,fsync,fdatasync"
    tracer = subprocess.Popen(
        [peer("strace"), "-f", "-y", "-e", calls, "-s", "16", "-p", str(store.child.pid), "-o", str(trace)],
        stderr=subprocess.PIPE,
    )
    assert tracer.stderr is not None
    try:
        assert b"attached" in tracer.stderr.readline()
        data = os.urandom(700_000)
        store.server.client().put_object(BUCKET, "synced", io.BytesIO(data), len(data))
    finally:
        tracer.terminate()
        tracer.wait()
        tracer.stderr.close()
    lines = trace.read_text().splitlines()
    # The answer goes out on the S3 port's socket; the data file's sync stands before it.
    synced = [number for number, line in enumerate(lines) if "fsync(" in line and ".dat" in line]
    answered = [
        number for number, line in enumerate(lines) if "HTTP/1.1 200 OK" in line and f":{store.ports.s3}" in line
    ]
    if not answered:
        answered = [number for number, line in enumerate(lines) if "HTTP/1.1 200 OK" in line]
    assert synced, "no data file was synced"
    assert answered, "no answer was seen"
    assert synced[0] < answered[-1]


def test_what_was_acknowledged_survives_a_kill_of_the_s3_server(store: Store) -> None:
    client = store.server.client()
    written = {f"killed/{number}": os.urandom(300_000) for number in range(6)}
    for key, data in written.items():
        client.put_object(BUCKET, key, io.BytesIO(data), len(data))
    store.kill_and_start_again()
    for key, data in written.items():
        assert client.get_object(BUCKET, key).data == data


def test_volume_indexes_cut_short_by_a_power_cut_are_built_again_from_the_synced_data(store: Store) -> None:
    client = store.server.client()
    written = {f"cut/{number}": os.urandom(300_000) for number in range(6)}
    for key, data in written.items():
        client.put_object(BUCKET, key, io.BytesIO(data), len(data))
    store.child.signal_family(signal.SIGKILL)
    store.child.reap()
    for index in (store.home / "s3" / "data").glob("*.idx"):
        os.truncate(index, index.stat().st_size // 17 // 2 * 17)  # entries are 17 bytes long
    (store.home / "s3" / "running.boot-id").write_text("another boot")
    store.child = embedded.start(store.server, store.home / "s3.log")
    for key, data in written.items():
        assert client.get_object(BUCKET, key).data == data


def test_postgres_starts_after_a_kill_with_its_pid_file_left_behind(tmp_path: Path) -> None:
    server = Postgres(tmp_path / "pg", free_ports(1)[0], Passwords("a", "b", "c", "d"))
    child = embedded.start(server, tmp_path / "log")
    with psycopg.connect(psycopg_dsn(server.owner_url), autocommit=True) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 1 AS one")
    # Only the postmaster: its children are still about when the next start comes.
    os.kill(child.pid, signal.SIGKILL)
    wait_until(lambda: child.exit_status() is not None)
    assert (server.data / "postmaster.pid").exists()
    # As if the number had gone to another process of the same user: PostgreSQL itself would refuse to start.
    lines = (server.data / "postmaster.pid").read_text().splitlines()
    (server.data / "postmaster.pid").write_text("\n".join([str(os.getpid()), *lines[1:]]) + "\n")
    with embedded.running(server, tmp_path / "log"), psycopg.connect(psycopg_dsn(server.owner_url)) as connection:
        assert connection.execute("SELECT one FROM kept").fetchone() == (1,)
    child.reap()
    server.forget()
    assert not server.data.exists()
    assert is_free(server.port)


def test_postgres_runs_where_its_account_cannot_reach_the_wanted_folder(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    server = Postgres(closed / "pg", free_ports(1)[0], Passwords("a", "b", "c", "d"))
    with embedded.running(server, tmp_path / "log"):
        assert server.problem() is None
        assert (closed.stat().st_mode & 0o777) == 0o700, "nobody's folder is loosened"
    server.forget()


def wait_until(condition, seconds: float = 30.0) -> None:
    """Poll until `condition()` is true; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "condition did not come true"
        time.sleep(0.05)
