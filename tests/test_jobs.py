"""The job table on real PostgreSQL: outbox, idempotence, poison counter; and the frame around actors.

Brokers and worker processes are in test_worker_processes.py. Time is not waited for: rows are made older.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from storage import jobs
from storage.actors import Actor, Context, Outcome
from storage.database import Database
from storage.errors import IllegalTransitionError, LinkError, MalformedDataSetError, ObjectStoreError
from storage.objects import Objects
from storage.rows import Job, Site
from storage.settings import Settings
from tests.centre import Sites

STALE_S = 60


@pytest.fixture
def context(database: Database, configuration: Settings) -> Context:
    return Context(database, Objects(configuration), configuration)


@pytest.fixture
def job_id(database: Database, sites: Sites) -> int:
    return enqueue(database, sites)


def enqueue(database: Database, sites: Sites, subject_id: int = 1) -> int:
    with database.centre() as session:
        return jobs.enqueue(session, site_id=sites.county, queue="route", actor="test", subject_id=subject_id)


def job(database: Database, job_id: int) -> Job:
    with database.centre() as session:
        return session.get_one(Job, job_id)


def older(database: Database, job_id: int, seconds: float, *columns: str) -> None:
    """Make times of a job earlier."""
    with database.centre() as session:
        shift = sa.func.make_interval(0, 0, 0, 0, 0, 0, seconds)
        values = {column: getattr(Job, column) - shift for column in columns}
        session.execute(sa.update(Job).where(Job.id == job_id).values(**values))


def publishable(database: Database) -> list[int]:
    with database.centre() as session:
        return sorted(taken[0] for taken in jobs.take_publishable(session, stale_s=STALE_S))


def effects(database: Database, sites: Sites) -> int:
    """The tests' effect: names of a site, one letter for each effect."""
    with database.centre() as session:
        return len(session.get_one(Site, sites.county).name_en) - len("County A Hospital")


def have_effect(session: Session, started: jobs.StartedJob) -> None:
    session.execute(sa.update(Site).where(Site.site_id == started.site_id).values(name_en=Site.name_en + "!"))
    jobs.finish(session, started.id)


def work(context: Context, started: jobs.StartedJob) -> None:
    with context.database.centre() as session:
        have_effect(session, started)


def actor(work: Callable[[Context, jobs.StartedJob], None]) -> Actor:
    return Actor("test", "route", work, 60)


def raising(error: Exception) -> Actor:
    def fails(_context: Context, _job: jobs.StartedJob) -> None:
        raise error

    return actor(fails)


def test_a_job_of_a_transaction_that_failed_was_never_there(database: Database, sites: Sites) -> None:
    with pytest.raises(ZeroDivisionError), database.centre() as session:
        jobs.enqueue(session, site_id=sites.county, queue="route", actor="test", subject_id=1)
        raise ZeroDivisionError
    assert publishable(database) == []


def test_a_new_job_is_taken_for_publication_once(database: Database, job_id: int) -> None:
    assert publishable(database) == [job_id]
    assert publishable(database) == []


def test_a_delayed_job_is_not_published_early(database: Database, sites: Sites) -> None:
    with database.centre() as session:
        delayed = jobs.enqueue(session, site_id=sites.county, queue="route", actor="test", subject_id=1, delay_s=3600)
    assert publishable(database) == []
    older(database, delayed, 3601, "run_after")
    assert publishable(database) == [delayed]


def test_two_relays_at_once_take_each_job_once(database: Database, sites: Sites) -> None:
    made = sorted(enqueue(database, sites, n) for n in range(40))
    both_have_taken = threading.Barrier(2, timeout=20)

    def relay() -> list[int]:
        with database.centre() as session:
            taken = [row[0] for row in jobs.take_publishable(session, stale_s=STALE_S, limit=20)]
            both_have_taken.wait()
        return taken

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.submit(relay), pool.submit(relay)
    assert sorted(first.result() + second.result()) == made


def test_a_job_nobody_took_up_is_published_again_and_then_more_rarely(database: Database, job_id: int) -> None:
    publishable(database)
    older(database, job_id, STALE_S + 1, "published_at", "run_after")
    assert publishable(database) == [job_id]
    older(database, job_id, 3600, "run_after")  # an hour old, published just now
    older(database, job_id, STALE_S + 1, "published_at")
    assert publishable(database) == []
    older(database, job_id, jobs.REPUBLISH_CEILING.total_seconds(), "published_at", "run_after")
    assert publishable(database) == [job_id]


def test_a_run_that_fell_silent_is_published_again(database: Database, job_id: int) -> None:
    publishable(database)
    assert jobs.start(database, job_id, stale_s=STALE_S) is not None
    older(database, job_id, STALE_S + 1, "published_at")
    assert publishable(database) == []  # it still runs
    older(database, job_id, STALE_S + 1, "started_at")
    assert publishable(database) == [job_id]


def test_a_heartbeat_keeps_a_long_run_from_being_taken_for_dead(database: Database, job_id: int) -> None:
    publishable(database)
    started = jobs.start(database, job_id, stale_s=STALE_S)
    assert started is not None
    older(database, job_id, STALE_S + 1, "published_at", "started_at")
    jobs.touch(database, started)
    assert publishable(database) == []
    assert jobs.start(database, job_id, stale_s=STALE_S) is None


def test_a_start_is_counted_before_the_work_and_only_one_runs(database: Database, job_id: int) -> None:
    started = jobs.start(database, job_id, stale_s=STALE_S)
    assert started is not None and started.starts == 1
    assert jobs.start(database, job_id, stale_s=STALE_S) is None
    older(database, job_id, STALE_S + 1, "started_at")
    again = jobs.start(database, job_id, stale_s=STALE_S)
    assert again is not None and again.starts == 2


def test_ten_workers_that_start_one_job_at_once_are_one(database: Database, job_id: int) -> None:
    with ThreadPoolExecutor(10) as pool:
        started = list(pool.map(lambda _: jobs.start(database, job_id, stale_s=STALE_S), range(10)))
    assert len([one for one in started if one is not None]) == 1


def test_the_second_of_two_runs_rolls_its_effect_back(database: Database, sites: Sites, job_id: int) -> None:
    started = jobs.start(database, job_id, stale_s=STALE_S)
    assert started is not None
    with database.centre() as session:
        have_effect(session, started)
    with pytest.raises(IllegalTransitionError), database.centre() as session:
        have_effect(session, started)
    assert effects(database, sites) == 1


def test_a_finished_or_missing_job_is_nothing_to_do(context: Context, sites: Sites, job_id: int) -> None:
    once = actor(work)
    assert once.perform(context, job_id) is Outcome.DONE
    assert once.perform(context, job_id) is Outcome.NOTHING_TO_DO
    assert once.perform(context, job_id + 1000) is Outcome.NOTHING_TO_DO
    assert effects(context.database, sites) == 1
    assert publishable(context.database) == []


def test_what_was_away_is_tried_again_without_counting(context: Context, job_id: int) -> None:
    away = raising(ObjectStoreError("Object store did not answer"))
    for _ in range(jobs.MAX_STARTS + 2):
        assert away.perform(context, job_id) is Outcome.RETRY
    row = job(context.database, job_id)
    assert (row.starts, row.started_at, row.error) == (0, None, "Object store did not answer")
    with context.database.centre() as session:
        assert jobs.park_exhausted(session, stale_s=STALE_S) == []
    assert actor(work).perform(context, job_id) is Outcome.DONE
    assert job(context.database, job_id).error == ""


def test_the_other_side_says_when_to_ask_again(context: Context, job_id: int) -> None:
    assert raising(LinkError("busy", retry_after_s=3600)).perform(context, job_id) is Outcome.RETRY
    assert publishable(context.database) == []
    older(context.database, job_id, 3601, "run_after")
    assert publishable(context.database) == [job_id]


def test_a_permanent_error_counts_and_parks_the_job_in_the_end(context: Context, job_id: int) -> None:
    broken = raising(MalformedDataSetError("Truncated at byte 7"))
    for expected in range(1, jobs.MAX_STARTS + 1):
        with context.database.centre() as session:
            assert jobs.park_exhausted(session, stale_s=STALE_S) == []
        assert publishable(context.database) == [job_id]
        assert broken.perform(context, job_id) is Outcome.FAILED
        assert job(context.database, job_id).starts == expected
    assert publishable(context.database) == []
    with context.database.centre() as session:
        assert [parked.id for parked in jobs.park_exhausted(session, stale_s=STALE_S)] == [job_id]
    assert broken.perform(context, job_id) is Outcome.NOTHING_TO_DO
    assert job(context.database, job_id).error == "Truncated at byte 7"


def test_the_last_allowed_run_is_not_parked_while_it_runs(context: Context, job_id: int) -> None:
    broken = raising(MalformedDataSetError("Truncated at byte 7"))
    for _ in range(jobs.MAX_STARTS - 1):
        broken.perform(context, job_id)
    assert jobs.start(context.database, job_id, stale_s=STALE_S) is not None
    with context.database.centre() as session:
        assert jobs.park_exhausted(session, stale_s=STALE_S) == []
    older(context.database, job_id, STALE_S + 1, "started_at")
    with context.database.centre() as session:
        assert len(jobs.park_exhausted(session, stale_s=STALE_S)) == 1


def test_a_bug_counts_and_its_text_stays_out_of_the_row(context: Context, job_id: int) -> None:
    assert raising(KeyError("Zhang^San")).perform(context, job_id) is Outcome.FAILED
    assert job(context.database, job_id).error == "Unexpected KeyError"


def test_a_lost_connection_to_postgres_is_tried_again(context: Context, job_id: int) -> None:
    def loses(context: Context, _job: jobs.StartedJob) -> None:
        with context.database.centre() as session:
            session.execute(sa.text("SELECT pg_terminate_backend(pg_backend_pid())"))

    assert actor(loses).perform(context, job_id) is Outcome.RETRY
    row = job(context.database, job_id)
    assert row.starts == 0 and row.error.startswith("PostgreSQL: ")


def test_a_statement_that_takes_too_long_counts(context: Context, job_id: int) -> None:
    def slow(context: Context, _job: jobs.StartedJob) -> None:
        with context.database.centre() as session:
            session.execute(sa.text("SET LOCAL statement_timeout = '10ms'"))
            session.execute(sa.text("SELECT pg_sleep(5)"))

    assert actor(slow).perform(context, job_id) is Outcome.FAILED
    assert job(context.database, job_id).error == "PostgreSQL: QueryCanceled"
