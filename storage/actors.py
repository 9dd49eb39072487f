"""The frame around every actor: start, work, finish once; and what an error means.

An actor is a function `(context, job)`; it calls `jobs.finish(session, job.id)` in the transaction of its effect. The
frame counts the start before the work (a message that kills its worker is seen), keeps the job from looking dead while
it works, and turns errors into what the job table knows: retryable ones are published again later and do not count;
permanent ones, time limits and bugs count, and after `jobs.MAX_STARTS` the clock parks the job for a person.

Actors register by name in `ACTORS` when their module is imported, without any broker; `declare` hands them to one.
"""

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import dramatiq
import psycopg.errors
import sqlalchemy as sa
import structlog
from dramatiq.middleware import Interrupt, Shutdown

from storage import jobs
from storage.database import Database
from storage.errors import LinkError, PermanentError, RetryableError
from storage.objects import Objects
from storage.settings import Settings

_LOG = structlog.get_logger()
_RETRY_CEILING_S = 10.0
_STOPPED_RETRY_S = 5.0
"""A worker that stops interrupts its jobs first and its consumers after: at once, it would take its own job again."""
_NOTE_FAILURE_FOR_S = 30.0
_DEFAULT_TIME_LIMIT_S = 600.0


@dataclass(frozen=True, slots=True)
class Context:
    """What an actor may use. One per process; all parts are thread-safe."""

    database: Database
    objects: Objects
    settings: Settings

    @classmethod
    def of(cls, configuration: Settings) -> "Context":
        """The context of a process with these settings; connects when first used."""
        return cls(Database(configuration.database_url), Objects(configuration), configuration)


Work = Callable[[Context, jobs.StartedJob], None]


class Outcome(StrEnum):
    """What became of one delivery of a message."""

    NOTHING_TO_DO = "nothing_to_do"  # finished, parked, gone, or running elsewhere
    DONE = "done"
    RETRY = "retry"  # published again later, start not counted
    FAILED = "failed"  # start counted


@dataclass(frozen=True, slots=True)
class Actor:
    """One registered actor. Its queue is where its messages go unless `jobs.enqueue` names another."""

    name: str
    queue: str
    work: Work
    time_limit_s: float

    def perform(self, context: Context, job_id: int) -> Outcome:
        """Do the job if it is still to be done. Never raises: the job's row says what happened."""
        stale_s = context.settings.job_stale_s
        job = jobs.start(context.database, job_id, stale_s=stale_s)
        if job is None:
            _LOG.info("job.nothing_to_do", job_id=job_id, actor=self.name)
            return Outcome.NOTHING_TO_DO
        log = _LOG.bind(job_id=job_id, actor=self.name, starts=job.starts)
        began = time.monotonic()
        heartbeat = _Heartbeat(context.database, job, stale_s / 3)
        try:
            try:
                self.work(context, job)
            finally:
                heartbeat.stop()
        except Shutdown:
            return _note_failure(context, job, "The worker was stopped", _STOPPED_RETRY_S, log)
        except RetryableError as error:
            asked = error.retry_after_s if isinstance(error, LinkError) else None
            return _note_failure(context, job, error.reason, _retry_after_s(asked), log)
        except sa.exc.OperationalError as error:
            # Away, restarting, deadlock, lock timeout: later. A statement that always runs too long is a bug: counts.
            slow = isinstance(error.orig, psycopg.errors.QueryCanceled)
            return _note_failure(context, job, _database_reason(error), None if slow else _retry_after_s(None), log)
        except PermanentError as error:
            return _note_failure(context, job, error.reason, None, log)
        except Interrupt as error:  # time limit
            return _note_failure(context, job, f"Stopped after {self.time_limit_s:.0f} s: {error!r}", None, log)
        except Exception as error:
            # The edge of the process. The text of an unknown error may hold patient data: it stays out of the row.
            log.exception("job.bug")
            return _note_failure(context, job, f"Unexpected {type(error).__name__}", None, log)
        log.info("job.done", duration_ms=round((time.monotonic() - began) * 1000))
        return Outcome.DONE


ACTORS: dict[str, Actor] = {}
"""Every actor whose module is imported, by name."""


def actor(name: str, *, queue: str, time_limit_s: float = _DEFAULT_TIME_LIMIT_S) -> Callable[[Work], Actor]:
    """Register a function `(context, job)` as the actor `name`."""

    def register(work: Work) -> Actor:
        if name in ACTORS and ACTORS[name].work.__module__ != work.__module__:
            raise ValueError(f"Two actors are called {name}: {ACTORS[name].work.__module__}, {work.__module__}")
        ACTORS[name] = Actor(name, queue, work, time_limit_s)
        return ACTORS[name]

    return register


def declare(broker: dramatiq.Broker, context: Context) -> None:
    """Make every registered actor known to `broker`, so that a worker on it can run them."""
    for entry in ACTORS.values():
        register = dramatiq.actor(
            actor_name=entry.name,
            queue_name=entry.queue,
            broker=broker,
            time_limit=entry.time_limit_s * 1000,
            notify_shutdown=True,
        )
        register(_receiver(entry, context))


def _receiver(entry: Actor, context: Context) -> Callable[[int], None]:
    def receive(job_id: int) -> None:
        entry.perform(context, job_id)

    return receive


class _Heartbeat:
    """Says every few seconds that the job still runs, so that the sweeper leaves it alone."""

    def __init__(self, database: Database, job: jobs.StartedJob, every_s: float) -> None:
        self._database = database
        self._job = job
        self._every_s = every_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"job-{job.id}", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._stopped.wait(self._every_s):
            try:
                jobs.touch(self._database, self._job)
            except sa.exc.OperationalError:
                _LOG.warning("job.heartbeat_missed", job_id=self._job.id)

    def stop(self) -> None:
        """After this no beat comes any more."""
        self._stopped.set()
        self._thread.join()


def _retry_after_s(asked: float | None) -> float:
    """What the other side asked for, else full jitter."""
    return asked if asked is not None else random.uniform(0, _RETRY_CEILING_S)  # noqa: S311 - spread, no secret


def _database_reason(error: sa.exc.OperationalError) -> str:
    return f"PostgreSQL: {type(error.orig).__name__}"


def _note_failure(
    context: Context,
    job: jobs.StartedJob,
    reason: str,
    retry_after_s: float | None,
    log: structlog.typing.FilteringBoundLogger,
) -> Outcome:
    """Write the failure down, waiting a while for a PostgreSQL that is away: otherwise the start would count."""
    outcome = Outcome.FAILED if retry_after_s is None else Outcome.RETRY
    log.warning(f"job.{outcome}", reason=reason, retry_after_s=retry_after_s)
    deadline = time.monotonic() + _NOTE_FAILURE_FOR_S
    while True:
        try:
            jobs.fail(context.database, job.id, reason, retry_after_s=retry_after_s)
            break
        except sa.exc.OperationalError:
            if time.monotonic() > deadline:
                log.error("job.failure_not_noted")
                break
            time.sleep(1)
    return outcome
