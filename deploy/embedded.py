"""The three servers that come as wheels, behind one small interface: prepare, run, check, set up.

PostgreSQL comes first: the S3 server keeps its names in it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from deploy.process import Child, Command, wait_until_healthy


class Server(Protocol):
    """What the supervisor needs to know of a server."""

    @property
    def name(self) -> str:
        """Name of the process: of its log, and in `stack.json`."""

    @property
    def port(self) -> int:
        """TCP port on 127.0.0.1; 0 for none."""

    def prepare(self) -> None:
        """Make directories and configuration; clear what a killed server left. Idempotent."""

    def command(self) -> Command:
        """The process to run."""

    def problem(self) -> str | None:
        """None when a real request is answered, else why not."""

    def bootstrap(self) -> None:
        """After the start: roles, databases, buckets. Idempotent."""

    def stopped(self) -> None:
        """After an ordered stop."""


def start(server: Server, log: Path, mark: str = "") -> Child:
    """Prepare a server, start it, wait until it answers and set it up. Raises `StackError`."""
    server.prepare()
    child = Child(server.command(), log, mark)
    try:
        wait_until_healthy(child, server.problem, log)
        server.bootstrap()
    except BaseException:
        child.stop()
        raise
    return child


@contextmanager
def running(server: Server, log: Path) -> Iterator[Child]:
    """A server for the length of a `with` block."""
    child = start(server, log)
    try:
        yield child
    finally:
        child.stop()
        server.stopped()
