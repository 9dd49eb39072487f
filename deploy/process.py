"""Child processes of the one-machine stack: how one is started, watched, stopped and never left behind.

Every child gets its own session, so a signal reaches its whole family, and the kernel's parent-death signal, so that
a supervisor that is itself killed leaves nobody running. What still survives (a grandchild whose parent was killed in
the same instant) carries the run's mark in its environment, and the next start sweeps it away.
"""

import ctypes
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

# Below the kernel's range for outgoing connections (32768 up), so that a port chosen now is still ours after a restart.
_PORTS = range(20000, 32000)
_PR_SET_PDEATHSIG = 1
_MARK = "YUANZHEN_STACK_VAR"
_CHILD_UMASK = 0o077
"""What a child writes (images, reports, keys) is for its own account only. The supervisor does without: it makes the
folders on the way to PostgreSQL's data, and PostgreSQL's account must be able to pass them."""
_libc = ctypes.CDLL(None, use_errno=True)


class StackError(Exception):
    """The stack cannot start or go on; the text says what is wrong and what to do."""


@dataclass(frozen=True)
class Account:
    """The system account that a child runs as, when it is not ours."""

    name: str
    uid: int
    gid: int


@dataclass(frozen=True)
class Command:
    """What to run. `stop_signal` asks for an ordered stop; `stop_seconds` is how long that may take before SIGKILL."""

    name: str
    argv: Sequence[str]
    cwd: Path
    env: Mapping[str, str] = field(default_factory=dict)
    account: Account | None = None
    stop_signal: signal.Signals = signal.SIGTERM
    stop_seconds: float = 20.0


def _for_owner_only(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def die_with_parent() -> None:
    """Ask the kernel to SIGKILL this process when the thread that started it ends (prctl(2), PR_SET_PDEATHSIG)."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Child:
    """One running process of the stack."""

    def __init__(self, command: Command, log: Path, mark: str = "") -> None:
        """Start `command`, its output appended to `log`. `mark` names the run (see `leftovers`)."""
        self.command = command
        account = command.account
        log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        log.parent.chmod(0o700)
        # Appending, so that the supervisor may cut the file under a running child (see deploy/logs in stack.py).
        with open(log, "ab", opener=_for_owner_only) as out:
            self._process = subprocess.Popen(
                list(command.argv),
                cwd=command.cwd,
                env={**os.environ, **command.env, _MARK: mark},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                user=account.uid if account else None,
                group=account.gid if account else None,
                extra_groups=[] if account else None,
                umask=_CHILD_UMASK,
                # After the change of user, which would clear it. The supervisor has one thread, so this is safe.
                preexec_fn=die_with_parent,  # noqa: PLW1509
            )
        self.started = time.monotonic()

    @property
    def pid(self) -> int:
        """The process id, which is also the id of its process group."""
        return self._process.pid

    def exit_status(self) -> int | None:
        """None while it runs; then its exit status, negative for a signal."""
        return self._process.poll()

    def signal_family(self, number: signal.Signals) -> None:
        """Send a signal to the process and its descendants in its group."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def reap(self) -> None:
        """After the process ended by itself: end what it left in its group."""
        self.signal_family(signal.SIGKILL)
        self._process.wait()

    def ask_to_stop(self) -> None:
        """Send the signal that asks for an ordered stop, without waiting."""
        if self._process.poll() is None:
            self._process.send_signal(self.command.stop_signal)

    def stop(self) -> None:
        """Ask for an ordered stop, wait, and then insist."""
        self.ask_to_stop()
        self.finish()

    def finish(self) -> None:
        """After `ask_to_stop`: wait as long as the command allows, then SIGKILL what is left of the family."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(self.command.stop_seconds)
        self.reap()


def wait_until_healthy(child: Child, problem: Callable[[], str | None], log: Path, seconds: float = 60.0) -> None:
    """Poll `problem` until it answers None.

    Raises `StackError` with the last problem and the end of the log when the process dies or time is up.
    """
    deadline = time.monotonic() + seconds
    pause = 0.05
    while (trouble := problem()) is not None:
        status = child.exit_status()
        if status is not None or time.monotonic() > deadline:
            why = (
                f"ended with status {status}"
                if status is not None
                else f"is not ready after {seconds:.0f} s: {trouble}"
            )
            raise StackError(f"{child.command.name} {why}\n{tail(log)}")
        time.sleep(pause)
        pause = min(pause * 1.5, 0.5)


def tail(log: Path, lines: int = 12) -> str:
    """The last lines of a log, indented, for an error message."""
    if not log.exists():
        return "    (no log)"
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 8192))
        last = file.read().decode("utf-8", "replace").splitlines()[-lines:]
    return "\n".join(f"    {line}" for line in last) + f"\n    (whole log: {log})"


def free_ports(count: int, avoid: frozenset[int] = frozenset()) -> list[int]:
    """Return `count` TCP ports that nobody listens on at 127.0.0.1."""
    found: list[int] = []
    for port in random.sample(_PORTS, len(_PORTS)):
        if port not in avoid and is_free(port):
            found.append(port)
            if len(found) == count:
                return found
    raise StackError("no free TCP port between 20000 and 31999 on 127.0.0.1")


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a server could listen on (`host`, `port`) now."""
    with closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def port_holder(port: int) -> str:
    """Who listens on a TCP port, in words, as far as this user may know."""
    try:
        listeners = psutil.net_connections("tcp")
    except psutil.AccessDenied:
        return "another program"
    for connection in listeners:
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    return "another program"


def leftovers(mark: str) -> list[psutil.Process]:
    """Processes of an earlier run with this mark, other than ourselves and our parents."""
    ours = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied, OSError):
            if process.pid not in ours and mark and process.environ().get(_MARK) == mark:
                found.append(process)
    return found


def end_leftovers(mark: str) -> list[str]:
    """Kill what an earlier run left behind and wait until it is gone. Returns the names of what was killed."""
    processes = leftovers(mark)
    names = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            names.append(f"{process.name()} ({process.pid})")
            process.kill()
    psutil.wait_procs(processes, timeout=10)
    return names
