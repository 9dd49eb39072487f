"""The supervisor: what dies comes back, one stack per data directory, an ordered stop, nothing left behind.

Runs a small stack of the real servers (tests/small_stack.py) as `yuanzhen up` does; the whole system's own tests are
elsewhere.
"""

import io
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psutil
import psycopg
import pytest
import redis
from minio import Minio

from deploy import stack
from deploy.postgres import Passwords, Postgres
from deploy.process import StackError, free_ports, leftovers
from deploy.seaweedfs import BUCKET
from storage.database import psycopg_dsn

_SERVICES = ("postgres", "s3", "valkey", "web")


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "condition did not come true"
        time.sleep(0.1)


def start(var: Path) -> None:
    stack.up(var, lambda: None, module="tests.small_stack")


def pid_of(var: Path, service: str) -> int | None:
    pid: int | None = stack.read_state(var)["services"][service]["pid"]
    return pid


def answers(var: Path, service: str) -> bool:
    """Whether a service takes a real request."""
    state = stack.read_state(var)
    try:
        if service == "postgres":
            psycopg.connect(psycopg_dsn(state["postgres_url"]), connect_timeout=3).close()
        elif service == "s3":
            endpoint = state["s3_url"].removeprefix("http://")
            client = Minio(
                endpoint=endpoint, access_key=state["s3_keys"][0], secret_key=state["s3_keys"][1], secure=False
            )
            client.put_object(BUCKET, "test", io.BytesIO(b"x"), 1)
        elif service == "valkey":
            client = redis.Redis.from_url(state["valkey_url"])
            client.ping()
            client.close()
        else:
            socket.create_connection(("127.0.0.1", state["ports"]["web"]), timeout=3).close()
    except Exception:  # noqa: BLE001 - any refusal means "not yet"; the caller waits
        return False
    return True


@pytest.fixture(scope="module")
def environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, port in zip(("WEB", "INGEST", "GATEWAY", "GATEWAY_PACS"), free_ports(4), strict=True):
            patch.setenv(f"YUANZHEN_{name}_PORT", str(port))
        yield


@pytest.fixture(scope="module")
def var(tmp_path_factory: pytest.TempPathFactory, environment: None) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("stack") / "var"
    start(directory)
    yield directory
    stack.down(directory)
    stack.clean(directory)


def test_a_second_start_on_the_same_data_is_refused_and_names_the_first(var: Path) -> None:
    with pytest.raises(StackError, match=rf"already runs .*pid {stack.read_state(var)['supervisor_pid']}"):
        start(var)
    with pytest.raises(StackError, match="stop it first"):
        stack.clean(var)


def test_every_process_that_is_killed_comes_back_and_works(var: Path) -> None:
    # Valkey and web at once, then the two that depend on each other.
    for group in (("valkey", "web"), ("s3",), ("postgres",)):
        before = {service: pid_of(var, service) for service in group}
        for pid in before.values():
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
        for service, old in before.items():
            wait_until(lambda service=service, old=old: pid_of(var, service) not in (None, old))  # type: ignore[misc]
            wait_until(lambda service=service: answers(var, service))  # type: ignore[misc]
    # S3 keeps its names in PostgreSQL, and gets over its restart without one of its own.
    wait_until(lambda: answers(var, "s3"))
    restarts = {name: service["restarts"] for name, service in stack.read_state(var)["services"].items()}
    assert all(restarts[service] >= 1 for service in _SERVICES)
    assert stack.print_status(var)


def test_a_killed_supervisor_leaves_no_process_and_the_next_start_works(var: Path) -> None:
    pids = [pid_of(var, service) for service in _SERVICES]
    os.kill(stack.read_state(var)["supervisor_pid"], signal.SIGKILL)
    wait_until(lambda: stack.holder(var) is None)
    wait_until(lambda: not any(pid and psutil.pid_exists(pid) for pid in pids))
    start(var)
    assert all(answers(var, service) for service in _SERVICES)


def test_logs_and_objects_are_readable_by_their_owner_only(var: Path) -> None:
    """By their folder (SeaweedFS sets the modes of its files itself), and the logs by their own mode too."""
    closed = [var / "log", var / "s3", *(var / "log" / f"{service}.log" for service in _SERVICES)]
    assert not [path for path in closed if path.stat().st_mode & 0o077]


def test_secrets_are_readable_by_their_owner_only(var: Path) -> None:
    for name in (
        "secrets.env",
        "stack.json",
        "s3/s3.json",
        "s3/security.toml",
        "s3/internal.key",
        "valkey/valkey.conf",
    ):
        assert (var / name).stat().st_mode & 0o077 == 0, name


def test_no_secret_stands_on_a_command_line(var: Path) -> None:
    text = (var / "secrets.env").read_text()
    secrets = [line.split("=")[1] for line in text.splitlines() if "=" in line]
    for service in _SERVICES:
        line = " ".join(psutil.Process(pid_of(var, service)).cmdline())
        assert not any(secret in line for secret in secrets), service


def test_an_ordered_stop_ends_every_process_and_says_so(var: Path) -> None:
    assert stack.down(var) == "stopped"
    assert stack.holder(var) is None
    assert leftovers(str(var)) == []
    assert stack.read_state(var)["state"] == "down"
    assert stack.down(var) == "not running"
    start(var)


def test_a_port_that_was_asked_for_and_is_taken_is_named_with_its_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        monkeypatch.setenv("YUANZHEN_WEB_PORT", str(port))
        with pytest.raises(StackError, match=f"YUANZHEN_WEB_PORT={port}: port {port} is taken by"):
            start(tmp_path / "var")
        assert str(port) in capfd.readouterr().out
    assert not (tmp_path / "var" / "postgres").exists()


def test_a_remembered_port_that_is_taken_is_replaced_and_said(tmp_path: Path, environment: None) -> None:
    from deploy.ports import choose_ports

    said: list[str] = []
    first = choose_ports(tmp_path / "ports.json", {}, said.append)
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", first["s3"]))
        listener.listen()
        second = choose_ports(tmp_path / "ports.json", {}, said.append)
    assert second["s3"] != first["s3"]
    assert any(f"port {first['s3']} is taken" in line for line in said)
    assert {**second, "s3": 0} == {**first, "s3": 0}


def test_a_start_that_fails_stops_what_it_started(tmp_path: Path, environment: None) -> None:
    var = tmp_path / "var"
    (var / "valkey").parent.mkdir()
    (var / "valkey").write_text("a file where a folder should be")
    with pytest.raises(StackError, match="did not start"):
        start(var)
    assert stack.holder(var) is None
    assert leftovers(str(var)) == []
    Postgres(var / "postgres", 0, Passwords("", "", "", "")).forget()
