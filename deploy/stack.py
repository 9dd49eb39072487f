"""`yuanzhen up`, `down`, `status`, `clean`: the whole system on one machine, data under `./var`.

`up` hands over to a detached supervisor, shows its progress, and returns when everything answers. One lock file per
data directory says who runs; the kernel drops the lock with its holder, so a killed supervisor blocks nobody.
"""

import argparse
import fcntl
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from json import loads
from pathlib import Path
from typing import Any, TextIO

import psutil
from rich.console import Console
from rich.table import Table

from deploy.credentials import ensure_credentials
from deploy.pki import ensure_pki
from deploy.ports import choose_ports
from deploy.postgres import Passwords, Postgres
from deploy.process import StackError, end_leftovers, tail
from deploy.seed import seed
from deploy.services import AE_TITLE, PACS_AE_TITLE, layout
from deploy.supervisor import Supervisor
from storage.database import Database, upgrade
from storage.errors import YuanzhenError

_STOP_SECONDS = 120.0
_DONE = "ready"
Say = Callable[[str], None]
Start = Callable[[Path, Supervisor, Say], None]


def var_directory() -> Path:
    """Where the stack keeps everything: YUANZHEN_VAR_DIR, or `var` in the working directory."""
    return Path(os.environ.get("YUANZHEN_VAR_DIR") or "var").resolve()


def holder(var: Path) -> int | None:
    """The pid of the supervisor that runs on this directory, or None."""
    path = var / "stack.lock"
    if not path.exists():
        return None
    with path.open("r") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            text = file.read().strip()
            return int(text) if text.isdecimal() else 0
    return None


@contextmanager
def _locked(var: Path) -> Iterator[None]:
    """Hold the data directory. Raises `StackError` naming the process that has it."""
    var.mkdir(parents=True, exist_ok=True)
    with (var / "stack.lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _busy(var, file.read().strip()) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _busy(var: Path, pid: str) -> StackError:
    advice = "See it with `yuanzhen status`, stop it with `yuanzhen down`."
    return StackError(f"a stack already runs on {var} (pid {pid or 'unknown'}). {advice}")


def read_state(var: Path) -> dict[str, Any]:
    """The content of `stack.json`; empty when there is none."""
    path = var / "stack.json"
    return dict(loads(path.read_text())) if path.exists() else {}


def supervise(var: Path, say: Say, done: Callable[[], None], start: Start) -> None:
    """Run a stack in this process until a signal ends it. `done` is called once everything answers."""
    with _locked(var):
        supervisor = Supervisor(var, say)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, supervisor.request_stop)
        try:
            start(var, supervisor, say)
            supervisor.write_state("up")  # before anybody is told: they read it
            done()
            supervisor.run()
        finally:
            supervisor.stop()


def start_all(var: Path, supervisor: Supervisor, say: Say) -> None:
    """Start the whole stack, group after group."""
    if swept := end_leftovers(str(var)):
        say(f"ended {len(swept)} processes that an earlier run left behind: {', '.join(swept)}")
    ports = choose_ports(var / "ports.json", os.environ, say)
    credentials = ensure_credentials(var / "secrets.env")
    pki = ensure_pki(var / "pki", [os.environ["YUANZHEN_INGEST_HOST"]] if "YUANZHEN_INGEST_HOST" in os.environ else [])
    plan = layout(var, ports, credentials, pki, os.environ)
    environment = plan.environment
    supervisor.describe({"var": str(var), "supervisor_pid": os.getpid(), "environment": dict(environment)})
    for group in plan.servers:
        supervisor.start_group(group)
    upgrade(environment["YUANZHEN_DATABASE_OWNER_URL"])
    database = Database(environment["YUANZHEN_DATABASE_URL"], pool_size=1)
    try:
        accounts = seed(database, pki, credentials["DEMO_PASSWORD"], credentials["DEMO_PIN"])
    finally:
        database.close()
    say("  schema and demonstration accounts ready")
    supervisor.describe(
        {
            "var": str(var),
            "supervisor_pid": os.getpid(),
            "urls": {
                "web": f"http://127.0.0.1:{ports['web']}",
                "ingest": f"https://127.0.0.1:{ports['ingest']}",
                "s3": environment["YUANZHEN_S3_URL"],
            },
            "ports": dict(ports),
            "gateway": {"ae_title": AE_TITLE, "host": "127.0.0.1", "port": ports["dicom"]},
            "county_pacs": {
                "ae_title": PACS_AE_TITLE,
                "host": "127.0.0.1",
                "port": ports["county_pacs"],
                "directory": str(var / "county-pacs"),
            },
            "accounts": [account._asdict() for account in accounts],
            "environment": dict(environment),
        }
    )
    for group in plan.programs:
        supervisor.start_group(group)


def up(var: Path, announce: Callable[[], None], *, foreground: bool = False, module: str = "deploy.stack") -> None:
    """Start the stack, in the background unless `foreground`. Raises `StackError`.

    `announce` is called when everything answers; `module` is the program of the detached supervisor.
    """
    if (running := holder(var)) is not None:
        raise _busy(var, str(running))
    if foreground:
        supervise(var, lambda text: print(text, flush=True), announce, start_all)
        return
    (var / "log").mkdir(parents=True, exist_ok=True)
    log = var / "log" / "supervisor.log"
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    arguments = [sys.executable, "-m", module, "--var", str(var), "--progress-fd", str(writer)]
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    environment = {**os.environ, "PYTHONPATH": _python_path()}
    # Not subprocess.Popen: it wants to see the end of what it started, and this one stays.
    pid = os.posix_spawn(sys.executable, arguments, environment, file_actions=actions, setsid=True)
    os.close(writer)
    with os.fdopen(reader, encoding="utf-8") as progress:
        if _follow(progress):
            announce()
            return
    os.waitpid(pid, 0)
    raise StackError(f"the stack did not start (see above, and {log})\n{tail(log)}")


def _python_path() -> str:
    root = str(Path(__file__).resolve().parent.parent)
    return os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))


def _follow(progress: TextIO) -> bool:
    """Show the supervisor's progress. Returns whether it got ready."""
    for line in progress:
        if line.strip() == _DONE:
            return True
        print(line, end="", flush=True)
    return False


def down(var: Path) -> str:
    """Stop the stack in order and wait for its end. Returns what happened, in words."""
    pid = holder(var)
    if pid is None:
        swept = end_leftovers(str(var))
        return f"not running; ended {len(swept)} left-over processes" if swept else "not running"
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + _STOP_SECONDS
    while holder(var) is not None:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            end_leftovers(str(var))
            return f"did not stop within {_STOP_SECONDS:.0f} s and was killed; see {var}/log/supervisor.log"
        time.sleep(0.1)
    return "stopped"


def clean(var: Path) -> str:
    """Forget everything under `var`. Raises `StackError` while a stack runs, or when `var` is not a stack's."""
    if (pid := holder(var)) is not None:
        raise StackError(f"a stack runs on {var} (pid {pid}); stop it first with `yuanzhen down`")
    if not var.exists():
        return f"{var} is not there: nothing to forget"
    if not (var / "stack.lock").exists():
        raise StackError(f"{var} does not look like a stack's data directory; nothing was removed")
    end_leftovers(str(var))
    # PostgreSQL's data may lie elsewhere (deploy/postgres.py).
    Postgres(var / "postgres", 0, Passwords("", "", "", "")).forget()
    shutil.rmtree(var)
    return f"removed {var}"


def print_status(var: Path) -> bool:
    """Print a table of the processes. Returns whether every one runs and the stack is up."""
    pid, state = holder(var), read_state(var)
    table = Table("process", "pid", "port", "restarts", "since", "state")
    well = pid is not None
    for name, service in state.get("services", {}).items():
        alive = service["pid"] is not None and psutil.pid_exists(service["pid"]) and pid is not None
        well = well and alive
        words = "runs" if alive else f"ended ({service['last_exit']}), starts again soon" if pid else "not running"
        cells = (service["pid"] or "", service["port"] or "", service["restarts"], service["started_at"], words)
        table.add_row(name, *(str(cell) for cell in cells))
    print(f"stack on {var}: " + (f"up (pid {pid})" if pid is not None else "not running"))
    if pid is not None:
        Console().print(table)
    return well


def summary(var: Path) -> str:
    """Addresses and accounts of a running stack, for people."""
    state = read_state(var)
    gateway, pacs = state["gateway"], state["county_pacs"]
    lines = [
        f"  worklist      {state['urls']['web']}",
        f"  DICOM in      {gateway['ae_title']} at {gateway['host']}:{gateway['port']}",
        f"  county PACS   {pacs['ae_title']} at {pacs['host']}:{pacs['port']}, simulated: {pacs['directory']}",
        f"  logs          {var / 'log'}",
        "  accounts      (demonstration only; same password and PIN for all)",
    ]
    for account in state["accounts"]:
        lines.append(
            f"    {account['username']:<14} {account['role']:<14} {account['site']:<10} {account['display_name']}"
        )
    first = state["accounts"][0]
    lines.append(f"    password {first['password']}   signing PIN {first['pin']}")
    return "\n".join(lines)


class _Progress:
    """Progress of a detached start: to the log, and to the person who started it while that person is there."""

    def __init__(self, descriptor: int) -> None:
        os.set_inheritable(descriptor, False)
        self._pipe: TextIO | None = os.fdopen(descriptor, "w", encoding="utf-8", buffering=1)

    def say(self, text: str) -> None:
        print(text, flush=True)
        if self._pipe:
            try:
                print(text, file=self._pipe)
            except BrokenPipeError:
                self._pipe = None

    def done(self) -> None:
        self.say(_DONE)
        if self._pipe:
            self._pipe.close()
            self._pipe = None


def main(start: Start = start_all) -> None:
    """The detached supervisor's own start (`up` runs it)."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--var", type=Path, required=True)
    parser.add_argument("--progress-fd", type=int, required=True)
    arguments = parser.parse_args()
    progress = _Progress(arguments.progress_fd)
    try:
        supervise(arguments.var, progress.say, progress.done, start)
    except (StackError, YuanzhenError) as error:
        progress.say(f"error: {error}")
        sys.exit(1)


if __name__ == "__main__":
    main()
