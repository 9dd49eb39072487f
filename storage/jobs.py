"""Work to be done once, kept in PostgreSQL: outbox, idempotence and poison counter in one row.

`enqueue` writes the job in the transaction that causes it. The clock (`routing/clock.py`) publishes it: the broker
carries the job's id and nothing else, and may lose it; what stands still is published again. An actor asks `start`,
which counts the attempt in a transaction of its own, so that a message that kills its worker is seen to have started
(Dramatiq's own max_retries does not see a SIGKILL). After MAX_STARTS the job is parked for a person. The actor calls
`finish` in the transaction of its effect: run twice, it has the effect of once.
"""

from dataclasses import dataclass
from datetime import timedelta

import sqlalchemy as sa
from sqlalchemy.orm import Session

from storage.database import Database
from storage.errors import IllegalTransitionError
from storage.rows import Job

MAX_STARTS = 3
REPUBLISH_CEILING = timedelta(minutes=10)
NOTIFY_CHANNEL = "yuanzhen_job"


@dataclass(frozen=True, slots=True)
class StartedJob:
    """A job that this actor may now do."""

    id: int
    site_id: int
    actor: str
    subject_id: int
    starts: int


def enqueue(session: Session, *, site_id: int, queue: str, actor: str, subject_id: int, delay_s: float = 0) -> int:
    """Write a job in the caller's transaction; published after commit. Returns its id."""
    job_id = session.execute(
        sa.insert(Job)
        .values(
            site_id=site_id,
            queue=queue,
            actor=actor,
            subject_id=subject_id,
            run_after=sa.func.clock_timestamp() + timedelta(seconds=delay_s),
        )
        .returning(Job.id)
    ).scalar_one()
    session.execute(sa.select(sa.func.pg_notify(NOTIFY_CHANNEL, "")))
    return job_id


def start(database: Database, job_id: int, *, stale_s: float) -> StartedJob | None:
    """Count a start. None: finished, parked, gone, or running elsewhere since less than `stale_s`: nothing to do."""
    stale = sa.func.clock_timestamp() - timedelta(seconds=stale_s)
    with database.centre() as session:
        row = session.execute(
            sa.update(Job)
            .where(
                Job.id == job_id,
                Job.finished_at.is_(None),
                Job.parked_at.is_(None),
                Job.starts < MAX_STARTS,
                sa.or_(Job.started_at.is_(None), Job.started_at < stale),
            )
            .values(starts=Job.starts + 1, started_at=sa.func.clock_timestamp())
            .returning(Job.id, Job.site_id, Job.actor, Job.subject_id, Job.starts)
        ).one_or_none()
    return None if row is None else StartedJob(*row)


def touch(database: Database, job: StartedJob) -> None:
    """Say that this start still runs: it is not stale from now on."""
    with database.centre() as session:
        session.execute(
            sa.update(Job)
            .where(Job.id == job.id, Job.starts == job.starts, Job.started_at.is_not(None), Job.finished_at.is_(None))
            .values(started_at=sa.func.clock_timestamp())
        )


def finish(session: Session, job_id: int) -> None:
    """Mark done, in the transaction of the effect. Raises IllegalTransitionError if another run was first."""
    done = session.execute(
        sa.update(Job)
        .where(Job.id == job_id, Job.finished_at.is_(None))
        .values(finished_at=sa.func.clock_timestamp(), error="")
        .returning(Job.id)
    ).scalar_one_or_none()
    if done is None:
        raise IllegalTransitionError(f"Job {job_id} was finished by another run")


def fail(database: Database, job_id: int, error: str, *, retry_after_s: float | None) -> None:
    """Note why a run failed. With `retry_after_s` it is published again then, without counting as a start (a link or
    a server was away: that may go on for days); without, the start counts and it is parked after MAX_STARTS."""
    with database.centre() as session:
        values: dict[str, object] = {"error": error[:500], "published_at": None, "started_at": None}
        if retry_after_s is not None:
            values["starts"] = sa.func.greatest(Job.starts - 1, 0)
            values["run_after"] = sa.func.clock_timestamp() + timedelta(seconds=retry_after_s)
        session.execute(sa.update(Job).where(Job.id == job_id, Job.finished_at.is_(None)).values(**values))


def take_publishable(session: Session, *, stale_s: float, limit: int = 500) -> list[tuple[int, str, str]]:
    """Jobs to publish now, as (id, queue, actor): new ones and those that stand still. Marks them published.

    A job whose run fell silent stands still after `stale_s`. One that no worker took up may be waiting its turn in a
    long queue: it is published again after `stale_s`, then ever more rarely, at least every REPUBLISH_CEILING, so
    that a queue without workers does not fill with copies.

    The caller publishes, then commits: a crash between the two publishes twice, which `start` and `finish` bear.
    """
    now = sa.func.clock_timestamp()
    stale = timedelta(seconds=stale_s)
    patience = sa.func.greatest(
        sa.literal(stale, sa.Interval),
        sa.func.least(Job.published_at - Job.run_after, sa.literal(REPUBLISH_CEILING, sa.Interval)),
    )
    picked = (
        sa.select(Job.id)
        .where(
            Job.finished_at.is_(None),
            Job.parked_at.is_(None),
            Job.starts < MAX_STARTS,
            Job.run_after <= now,
            sa.or_(
                Job.published_at.is_(None),
                sa.and_(Job.started_at.is_(None), Job.published_at < now - patience),
                sa.and_(Job.started_at < now - stale, Job.published_at < now - stale),
            ),
        )
        .order_by(Job.run_after)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    rows = session.execute(
        sa.update(Job).where(Job.id.in_(picked)).values(published_at=now).returning(Job.id, Job.queue, Job.actor)
    ).all()
    return [(row[0], row[1], row[2]) for row in rows]


def park_exhausted(session: Session, *, stale_s: float) -> list[StartedJob]:
    """Park jobs whose last allowed start did not finish within `stale_s`. Returns them, for their events."""
    stale = sa.func.clock_timestamp() - timedelta(seconds=stale_s)
    rows = session.execute(
        sa.update(Job)
        .where(
            Job.finished_at.is_(None),
            Job.parked_at.is_(None),
            Job.starts >= MAX_STARTS,
            sa.or_(Job.started_at.is_(None), Job.started_at < stale),  # None: its failure was noted
        )
        .values(parked_at=sa.func.clock_timestamp())
        .returning(Job.id, Job.site_id, Job.actor, Job.subject_id, Job.starts)
    ).all()
    return [StartedJob(*row) for row in rows]
