"""Real PostgreSQL, S3 and Valkey servers for the tests, one of each for the whole run, on free ports of 127.0.0.1.

They are the servers of the one-machine stack, started by its own code. `YUANZHEN_TEST_S3_URL` (with
`YUANZHEN_TEST_S3_ACCESS_KEY` and `YUANZHEN_TEST_S3_SECRET_KEY`) names another S3 server to test against.
"""

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

from deploy import embedded
from deploy.postgres import FILER, FILER_DATABASE, Passwords, Postgres
from deploy.process import StackError, free_ports
from deploy.seaweedfs import FilerStore, Ports, SeaweedFS
from deploy.valkey import Valkey

_Server = TypeVar("_Server", bound=embedded.Server)


@dataclass(frozen=True)
class S3Server:
    """Where the tests' S3 server is."""

    url: str
    access_key: str
    secret_key: str


def enter_server(stack: ExitStack, make: Callable[[], _Server], log: Path) -> _Server:
    """Start what `make` describes; once more on other ports when somebody was quicker on one of them."""
    for attempt in range(3):
        server = make()
        try:
            stack.enter_context(embedded.running(server, log))
        except StackError as error:
            if attempt == 2 or "in use" not in str(error):
                raise
        else:
            return server
    raise AssertionError("unreachable")


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """PostgreSQL with the roles and the empty database `yuanzhen`: `.owner_url`, `.app_url`, `.port`."""
    home = tmp_path_factory.mktemp("postgres")
    passwords = Passwords(*(secrets.token_hex(8) for _ in range(4)))
    with ExitStack() as stack:
        server = enter_server(stack, lambda: Postgres(home / "pg", free_ports(1)[0], passwords), home / "postgres.log")
        yield server
    server.forget()


@pytest.fixture(scope="session")
def s3_server(postgres_server: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """S3 with the buckets `yuanzhen` and `yuanzhen-reports` (object lock): `.url`, `.access_key`, `.secret_key`."""
    if url := os.environ.get("YUANZHEN_TEST_S3_URL"):
        key, secret = (os.environ[f"YUANZHEN_TEST_S3_{part}_KEY"] for part in ("ACCESS", "SECRET"))
        yield S3Server(url, key, secret)
        return
    home = tmp_path_factory.mktemp("s3")
    filer = FilerStore(postgres_server.port, FILER_DATABASE, FILER, postgres_server.passwords.filer)
    keys = secrets.token_hex(8), secrets.token_hex(16)
    with ExitStack() as stack:
        server = enter_server(
            stack, lambda: SeaweedFS(home / "s3", Ports(*free_ports(8)), *keys, filer), home / "s3.log"
        )
        yield S3Server(server.url, *keys)


@pytest.fixture(scope="session")
def valkey_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """Valkey with a password in its address: `.url`."""
    home = tmp_path_factory.mktemp("valkey")
    with ExitStack() as stack:
        yield enter_server(
            stack, lambda: Valkey(home / "valkey", free_ports(1)[0], secrets.token_hex(8)), home / "valkey.log"
        )
