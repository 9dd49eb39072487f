"""The centre's clock: what must happen though nobody asks. `python -m routing.clock`; several at once are safe.

It publishes jobs (and again those that stand still), parks what was started too often, gives back cases whose reader
fell silent, ends the wait for triage, lifts overdue routine cases, completes quiet studies, notes silent gateways,
signs each day's head of the audit trail and removes what uploads left behind. Each is a task with its own period; one
that fails waits, ever longer to a ceiling, and holds up no other. PostgreSQL's NOTIFY wakes the relay at once; the look
every second is for when a notification was lost.
"""

import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType

import dramatiq
import psycopg
import sqlalchemy as sa
import structlog
from sqlalchemy.orm import Session

from routing import actors, completion, heads, priority, sweep
from routing.rules_file import load_rules
from storage import jobs, logs, transitions
from storage.broker import make_broker, publish
from storage.database import Database, psycopg_dsn
from storage.errors import IllegalTransitionError, RetryableError
from storage.objects import Objects
from storage.receipts import read_signing_key
from storage.rows import OPEN_CASE_STATES, Case, Event, Gateway, Study, TriageRun
from storage.settings import Settings, settings
from storage.states import Transition
from storage.transitions import SYSTEM
from storage.vocabulary import CaseState, RunState, TriageState

_LOG = structlog.get_logger()
_WAKE_S = 1.0
_BACKOFF_CEILING_S = 30.0
_BATCH = 200
_SILENT, _HEARD = "gateway.silent", "gateway.heard"
_STUDY_ACTORS = frozenset({"route_study"})
_CASE_ACTORS = frozenset({"triage_case", "reprioritise_case"})


@dataclass
class _Task:
    """Something to do every `every_s`; `failures` in a row put it off."""

    name: str
    every_s: float
    work: Callable[[], int]
    failures: int = 0
    next_at: float = 0.0


class Clock:
    """The tasks on one database and one broker."""

    def __init__(self, database: Database, broker: dramatiq.Broker, configuration: Settings) -> None:
        self._database = database
        self._broker = broker
        self._settings = configuration
        self._objects = Objects(configuration)
        self._tasks = (
            _Task("relay", 0, self.relay),
            _Task("park", 2, self.park_exhausted),
            _Task("leases", 2, self.expire_leases),
            _Task("triage", 2, self.expire_triage),
            _Task("ageing", 15, self.lift_aged),
            _Task("quiet", 15, lambda: completion.complete_quiet(database, configuration.quiet_complete_s)),
            _Task("gateways", 15, self.note_silent_gateways),
            _Task("heads", 600, self.sign_heads),
            _Task("staging", 3600, lambda: sweep.sweep_staging(database, self._objects)),
        )

    def run(self, stop: threading.Event) -> None:
        """Tick until `stop`; what is away is waited for."""
        dsn = psycopg_dsn(self._settings.database_url)
        while not stop.is_set():
            try:
                with psycopg.connect(dsn, autocommit=True, connect_timeout=5) as listener:
                    listener.execute(f"LISTEN {jobs.NOTIFY_CHANNEL}")
                    while not stop.is_set():
                        self.tick()
                        for _ in listener.notifies(timeout=_WAKE_S, stop_after=1):
                            pass
            except psycopg.OperationalError as error:
                _LOG.warning("clock.database_away", error=type(error).__name__)
                self.tick()  # each task finds out for itself, and waits
                stop.wait(_WAKE_S)

    def tick(self) -> None:
        """Do every task that is due."""
        for task in self._tasks:
            if time.monotonic() < task.next_at:
                continue
            log, wait_s = _LOG.bind(task=task.name), task.every_s
            try:
                count = task.work()
                task.failures = 0
                if count:
                    log.info("clock.task", count=count)
            except (RetryableError, sa.exc.OperationalError) as error:
                wait_s = self._put_off(task)
                log.warning("clock.task_put_off", error=type(error).__name__, wait_s=wait_s)
            except Exception:
                # The edge of the process: one task's bug must not stop the relay.
                wait_s = self._put_off(task)
                log.exception("clock.task_bug", wait_s=wait_s)
            task.next_at = time.monotonic() + wait_s

    @staticmethod
    def _put_off(task: _Task) -> float:
        task.failures += 1
        ceiling = min(_BACKOFF_CEILING_S, max(task.every_s, 0.5) * 2 ** min(task.failures, 10))
        return round(random.uniform(ceiling / 2, ceiling), 1)  # noqa: S311 - spread, no secret

    def relay(self) -> int:
        """Publish what is new or stands still. A crash before the commit publishes again: actors bear that."""
        published = 0
        while True:
            with self._database.centre() as session:
                taken = jobs.take_publishable(session, stale_s=self._settings.job_stale_s, limit=_BATCH)
                for job_id, queue, name in taken:
                    publish(self._broker, job_id=job_id, queue=queue, actor=name)
            published += len(taken)
            if len(taken) < _BATCH:
                return published

    def park_exhausted(self) -> int:
        """Set aside what was started too often, with an event on its study; a model that never answers has failed."""
        with self._database.centre() as session:
            parked = jobs.park_exhausted(session, stale_s=self._settings.job_stale_s)
            for job in parked:
                _LOG.error("job.parked", job_id=job.id, actor=job.actor, subject_id=job.subject_id)
                self._note_parked(session, job)
        return len(parked)

    def _note_parked(self, session: Session, job: jobs.StartedJob) -> None:
        study_id: int | None = None
        if job.actor in _STUDY_ACTORS:
            study_id = session.scalar(sa.select(Study.id).where(Study.id == job.subject_id))
        elif job.actor in _CASE_ACTORS:
            study_id = session.scalar(sa.select(Case.study_id).where(Case.id == job.subject_id))
        details = {"actor": job.actor, "subject_id": job.subject_id, "starts": job.starts}
        if study_id is None:
            transitions.note_outside_study(
                session, job.site_id, "job.parked", subject="job", subject_id=job.id, actor=SYSTEM, details=details
            )
            return
        transitions.note(
            session, study_id, "job.parked", subject="job", subject_id=job.id, actor=SYSTEM, details=details
        )
        if job.actor != actors.TRIAGE_ACTOR:
            return
        pending = sa.select(TriageRun.id).where(
            TriageRun.case_id == job.subject_id, TriageRun.state == RunState.PENDING
        )
        for run_id in session.scalars(pending.order_by(TriageRun.id)).all():
            values = {"reason": "parked: the worker died or failed three times"}
            transitions.move(session, Transition.RUN_FAILED, run_id, actor=SYSTEM, details=details, values=values)
        still = session.scalar(sa.select(Case.triage).where(Case.id == job.subject_id))
        if still is TriageState.PENDING:
            transitions.move(session, Transition.TRIAGE_EXPIRED, job.subject_id, actor=SYSTEM, details=details)

    def expire_leases(self) -> int:
        """Lifecycle i: a claim without a heartbeat goes back to the queue."""
        over = sa.and_(Case.state == CaseState.CLAIMED, Case.lease_expires_at < sa.func.clock_timestamp())
        freed = {"claimed_by": None, "lease_token": None, "lease_expires_at": None}
        return self._move_each(Transition.CASE_LEASE_EXPIRED, over, freed)

    def expire_triage(self) -> int:
        """Lifecycle p: the worklist stops waiting for a model; a late answer still counts."""
        over = sa.and_(Case.triage == TriageState.PENDING, Case.triage_deadline < sa.func.clock_timestamp())
        return self._move_each(Transition.TRIAGE_EXPIRED, over, {})

    def _move_each(self, transition: Transition, over: sa.ColumnElement[bool], values: dict[str, None]) -> int:
        """Move every case for which `over` holds, each in its own transaction; another clock may be quicker."""
        moved = 0
        with self._database.centre() as session:
            ids = session.scalars(sa.select(Case.id).where(over).limit(_BATCH)).all()
        for case_id in ids:
            try:
                with self._database.centre() as session:
                    transitions.move(session, transition, case_id, actor=SYSTEM, values=dict(values), guard=over)
                moved += 1
            except IllegalTransitionError:
                _LOG.info("clock.not_any_more", case_id=case_id, transition=transition.event_name)
        return moved

    def lift_aged(self) -> int:
        """Routine cases that have come due stand among the urgent ones from now on (design §7)."""
        with self._database.centre() as session:
            ids = session.scalars(
                sa.select(Case.id)
                .where(
                    Case.state.in_(OPEN_CASE_STATES),
                    Case.tier == priority.TIER_ROUTINE,
                    Case.due_at <= sa.func.clock_timestamp(),
                )
                .limit(_BATCH)
            ).all()
        lifted = 0
        for case_id in ids:
            with self._database.centre() as session:
                lifted += actors.reprioritise(session, case_id, why="ageing")
        return lifted

    def note_silent_gateways(self) -> int:
        """One event when a gateway falls silent, one when it is heard again."""
        noted = sa.select(sa.func.max(Event.id)).where(Event.name.in_((_SILENT, _HEARD))).group_by(Event.subject_id)
        newest = sa.select(Event.subject_id, Event.name).where(Event.id.in_(noted)).subquery()
        silent_for = timedelta(seconds=self._settings.gateway_silent_s)
        is_silent = Gateway.last_heartbeat_at < sa.func.clock_timestamp() - silent_for
        was_silent = sa.func.coalesce(newest.c.name == _SILENT, sa.false())
        changed = (
            sa.select(Gateway.id, Gateway.site_id, Gateway.last_heartbeat_at, is_silent)
            .outerjoin(newest, newest.c.subject_id == Gateway.id)
            .where(is_silent != was_silent)
            .order_by(Gateway.id)
        )
        with self._database.centre() as session:
            # One clock at a time: the events that say what was noted are read by the statement after this one.
            if not session.scalar(sa.select(sa.func.pg_try_advisory_xact_lock(sa.func.hashtext(_SILENT)))):
                return 0
            rows = session.execute(changed).all()
            for gateway_id, site_id, heard_at, silent in rows:
                transitions.note_outside_study(
                    session,
                    site_id,
                    _SILENT if silent else _HEARD,
                    subject="gateway",
                    subject_id=gateway_id,
                    actor=SYSTEM,
                    details={"last_heartbeat_at": str(heard_at)},
                )
        return len(rows)

    def sign_heads(self) -> int:
        """Make the signed heads of the days that are over, those missed included."""
        key = read_signing_key(self._settings.pki_dir / heads.KEY_FILE)
        return heads.sign_missing_days(self._database, self._objects, key)


def main() -> None:
    """Run until SIGTERM or SIGINT; the transaction at hand is finished first."""
    logs.configure("clock")
    configuration = settings()
    load_rules(configuration.rules_file)  # a bad rule stops the start, with file, line and reason
    read_signing_key(configuration.pki_dir / heads.KEY_FILE)  # and so does a key that cannot sign the daily heads
    stop = threading.Event()

    def ask_to_stop(_signal: int, _frame: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, ask_to_stop)
    signal.signal(signal.SIGINT, ask_to_stop)
    database = Database(configuration.database_url, pool_size=2)
    broker = make_broker(configuration.broker_url)
    _LOG.info("clock.ready")
    Clock(database, broker, configuration).run(stop)
    broker.close()
    database.close()
    _LOG.info("clock.stopped")


if __name__ == "__main__":
    main()
