"""The supervisor of the one-machine stack: starts, watches, restarts and stops its processes. One thread.

Start: one lock file per data directory, group after group, each member healthy before the next group.
Watch: what ends is started again after a pause that doubles from half a second to thirty and begins anew after a
minute of good running. Stop: the groups in reverse order, each asked first and killed only when it does not follow.
A supervisor that is itself killed takes its children along (deploy/process.py); the next start clears the rest.
"""

import json
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog

from deploy.embedded import Server
from deploy.process import Child, StackError, wait_until_healthy

_POLL_S = 0.2
_HOUSEKEEPING_S = 5.0
_PAUSE_FIRST_S, _PAUSE_MOST_S, _GOOD_RUN_S = 0.5, 30.0, 60.0
_LOG_BYTES, _LOGS_KEPT = 10 * 1024 * 1024, 3
_START_S = 120.0

log = structlog.get_logger()


@dataclass
class Watched:
    """A server and its process, over all its restarts."""

    server: Server
    child: Child | None = None
    restarts: int = 0
    pause_s: float = _PAUSE_FIRST_S
    due: float = 0.0  # monotonic time of the next start while `child` is None
    last_exit: int | None = None
    started_at: str = ""


class Supervisor:
    """Owns the processes of one stack. Use from the main thread only (see `die_with_parent`)."""

    def __init__(self, var: Path, say: Callable[[str], None]) -> None:
        """`say` receives progress for people."""
        self._var = var
        self._say = say
        self._groups: list[list[Watched]] = []
        self._stopping = False
        self._facts: dict[str, Any] = {}

    def log_path(self, name: str) -> Path:
        """Where a process writes."""
        return self._var / "log" / f"{name}.log"

    def describe(self, facts: Mapping[str, Any]) -> None:
        """Facts for `stack.json` beside the processes' own."""
        self._facts = dict(facts)

    def start_group(self, servers: Sequence[Server]) -> None:
        """Start several servers and wait until every one is healthy. Raises `StackError`."""
        group = [Watched(server) for server in servers]
        self._groups.append(group)
        began = time.monotonic()
        for watched in group:
            self._spawn(watched)
        for watched in group:
            self._await(watched, began)

    def _await(self, watched: Watched, began: float) -> None:
        if watched.child is None:
            raise StackError(f"{watched.server.name} was not started")
        server, child = watched.server, watched.child

        def problem() -> str | None:
            if self._stopping:
                raise StackError("stopped while starting")
            return server.problem()

        wait_until_healthy(child, problem, self.log_path(server.name), _START_S)
        status = child.exit_status()
        if status is not None:
            raise StackError(f"{server.name} ended with status {status} right after it started")
        server.bootstrap()
        where = f" on port {server.port}" if server.port else ""
        self._say(f"  {server.name:<12} ready{where} after {time.monotonic() - began:.1f} s")

    def _spawn(self, watched: Watched) -> None:
        watched.server.prepare()
        watched.child = Child(watched.server.command(), self.log_path(watched.server.name), str(self._var))
        watched.started_at = datetime.now(UTC).isoformat(timespec="seconds")
        log.info("stack.started", service=watched.server.name, pid=watched.child.pid)

    def run(self) -> None:
        """Watch until `request_stop`."""
        housekeeping = 0.0
        while not self._stopping:
            changed = [self._look_after(watched) for group in self._groups for watched in group]
            if any(changed):
                self.write_state("up")
            if time.monotonic() >= housekeeping:
                self._rotate_logs()
                housekeeping = time.monotonic() + _HOUSEKEEPING_S
            time.sleep(_POLL_S)

    def request_stop(self, _number: int = 0, _frame: object = None) -> None:
        """Signal handler: leave `run`, or a start under way, at the next look."""
        self._stopping = True

    def _look_after(self, watched: Watched) -> bool:
        """Notice an end, or start again when its pause is over. Returns whether anything changed."""
        now = time.monotonic()
        if watched.child is None:
            if now < watched.due:
                return False
            watched.restarts += 1
            try:
                self._spawn(watched)
            except (StackError, OSError) as error:
                log.error("stack.start_failed", service=watched.server.name, error=str(error))
                self._pause(watched, now)
            return True
        status = watched.child.exit_status()
        if status is None:
            return False
        watched.child.reap()
        if now - watched.child.started > _GOOD_RUN_S:
            watched.pause_s = _PAUSE_FIRST_S
        watched.last_exit = status
        log.warning("stack.ended", service=watched.server.name, status=status, pause_s=watched.pause_s)
        watched.child = None
        self._pause(watched, now)
        return True

    def _pause(self, watched: Watched, now: float) -> None:
        watched.due = now + watched.pause_s
        watched.pause_s = min(watched.pause_s * 2, _PAUSE_MOST_S)

    def stop(self) -> None:
        """Stop everything in reverse order of the start."""
        # A second signal must not interrupt the ordered stop.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        for group in reversed(self._groups):
            running = [(watched, watched.child) for watched in group if watched.child]
            for _, child in running:
                child.ask_to_stop()
            for watched, child in running:
                child.finish()
                watched.server.stopped()
                watched.child = None
                log.info("stack.stopped", service=watched.server.name)
                self._say(f"  {watched.server.name:<12} stopped")
        self._groups.clear()
        self.write_state("down")

    def write_state(self, state: str) -> None:
        """Write `stack.json` as a whole (it holds demonstration passwords: mode 0600)."""
        services = {
            watched.server.name: {
                "pid": watched.child.pid if watched.child else None,
                "port": watched.server.port,
                "restarts": watched.restarts,
                "started_at": watched.started_at,
                "last_exit": watched.last_exit,
            }
            for group in self._groups
            for watched in group
        }
        fresh = self._var / "stack.json.new"
        fresh.unlink(missing_ok=True)
        fresh.touch(mode=0o600)
        fresh.write_text(
            json.dumps({"state": state, **self._facts, "services": services}, indent=1, ensure_ascii=False)
        )
        fresh.replace(self._var / "stack.json")

    def _rotate_logs(self) -> None:
        """Cut logs that grew too long: copy, then truncate.

        The children hold their files open in append mode, so they go on at the new end. What is written between copy
        and cut is lost; a pipe through this process would lose nothing, but stop every child when this one is slow.
        """
        for path in (self._var / "log").glob("*.log"):
            if path.stat().st_size < _LOG_BYTES:
                continue
            for number in range(_LOGS_KEPT - 1, 0, -1):
                older = path.with_suffix(f".log.{number}")
                if older.exists():
                    older.replace(path.with_suffix(f".log.{number + 1}"))
            path.with_suffix(".log.1").touch(mode=0o600)
            shutil.copyfile(path, path.with_suffix(".log.1"))
            with path.open("r+b") as file:
                file.truncate(0)
