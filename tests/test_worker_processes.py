"""Worker processes that die, brokers that forget, messages that come twice: every job's effect is there once.

On Valkey and on RabbitMQ, with real processes and SIGKILL. Workers are started again by the test, as the supervisor
does. Left out: a broker that comes back with other data than it had (it may lose all, see the test, or repeat).
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import redis
import sqlalchemy as sa

from deploy.process import Child, Command
from routing.clock import Clock
from storage import jobs
from storage.broker import QUEUES, make_broker, publish
from storage.database import Database
from storage.rows import Case, Event, Job
from storage.settings import Settings
from storage.vocabulary import CaseState, StudyState
from tests.centre import Sites, add_study

ROOT = Path(__file__).parent.parent
PATIENCE_S = 120


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen in {PATIENCE_S} s"
        time.sleep(0.05)


class Bench:
    """A broker, a clock in this process, and workers in their own."""

    def __init__(self, database: Database, sites: Sites, configuration: Settings, folder: Path) -> None:
        self.database = database
        self.sites = sites
        self.configuration = configuration
        self.folder = folder

    @contextmanager
    def worker(self) -> Iterator[Child]:
        """A worker process that is ready."""
        known = set(self.folder.glob("ready-*"))
        command = Command(
            "worker",
            [sys.executable, "-m", "dramatiq", "tests.worker_for_tests", "--processes", "1", "--threads", "2"],
            ROOT,
            {"YUANZHEN_TEST_FOLDER": str(self.folder)},
        )
        child = Child(command, self.folder / "worker.log")
        try:
            wait_for(lambda: bool(set(self.folder.glob("ready-*")) - known), "the worker's start")
            yield child
        finally:
            child.stop()

    @contextmanager
    def clock(self) -> Iterator[None]:
        """A clock that ticks."""
        broker = make_broker(self.configuration.broker_url)
        stop = threading.Event()
        thread = threading.Thread(target=Clock(self.database, broker, self.configuration).run, args=(stop,))
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            close(broker)

    def enqueue(self, actor: str, subject_id: int = 1, queue: str = "maintenance") -> int:
        with self.database.centre() as session:
            return jobs.enqueue(session, site_id=self.sites.county, queue=queue, actor=actor, subject_id=subject_id)

    def job(self, job_id: int) -> Job:
        with self.database.centre() as session:
            return session.get_one(Job, job_id)

    def wait_finished(self, *job_ids: int) -> None:
        wait_for(lambda: all(self.job(one).finished_at is not None for one in job_ids), "the job's end")

    def effects(self) -> list[int]:
        with self.database.centre() as session:
            return sorted(session.scalars(sa.select(Event.subject_id).where(Event.name == "test.effect")))

    def running_pid(self) -> int:
        """The process that is in the middle of `wait_then_have_effect`."""
        wait_for(lambda: any(self.folder.glob("running-*")), "the job's start")
        (marker,) = self.folder.glob("running-*")
        marker.unlink()
        return int(marker.name.partition("-")[2])

    def let_go(self) -> None:
        (self.folder / "go").touch()


def close(broker: object) -> None:
    """Close a broker and, for Valkey, its connections: an open socket is a warning, which is an error."""
    if hasattr(broker, "client"):
        broker.client.connection_pool.disconnect()
    broker.close()  # type: ignore[attr-defined]


def empty(url: str) -> None:
    """Make the broker forget everything."""
    if url.startswith("redis"):
        with redis.Redis.from_url(url) as client:
            client.flushall()
            return
    broker = make_broker(url)
    for queue in QUEUES:
        broker.declare_queue(queue, ensure=True)
        broker.flush(queue)
    close(broker)


@pytest.fixture(params=["valkey", pytest.param("rabbitmq", marks=pytest.mark.peer("rabbitmq-server"))])
def bench(
    request: pytest.FixtureRequest,
    database: Database,
    sites: Sites,
    configuration: Settings,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Bench:
    url = configuration.broker_url if request.param == "valkey" else request.getfixturevalue("rabbitmq_url")
    values = {"broker_url": url, "job_stale_s": 3}
    for name, value in values.items():
        monkeypatch.setenv(f"YUANZHEN_{name.upper()}", str(value))
    empty(url)
    return Bench(database, sites, configuration.model_copy(update=values), tmp_path)


def test_a_job_goes_through_broker_and_worker_to_its_effect(bench: Bench) -> None:
    with bench.worker(), bench.clock():
        made = [bench.enqueue("have_effect", subject_id=n) for n in range(20)]
        bench.wait_finished(*made)
    assert bench.effects() == list(range(20))
    assert {bench.job(one).starts for one in made} == {1}


def test_a_complete_study_is_put_in_its_queue(bench: Bench) -> None:
    with bench.database.centre() as session:
        study_id = add_study(session, bench.sites.county, state=StudyState.COMPLETE, modalities=("CT",))
        job_id = jobs.enqueue(
            session, site_id=bench.sites.county, queue="route", actor="route_study", subject_id=study_id
        )
    with bench.worker(), bench.clock():
        bench.wait_finished(job_id)
    with bench.database.centre() as session:
        case = session.scalars(sa.select(Case).where(Case.study_id == study_id)).one()
    assert (case.state, case.specialty, case.rule_name) == (CaseState.QUEUED, "imaging", "ct-mr")


def test_a_worker_killed_in_the_middle_of_a_job_leaves_it_done_once_in_the_end(bench: Bench) -> None:
    with bench.clock():
        with bench.worker():
            job_id = bench.enqueue("wait_then_have_effect")
            os.kill(bench.running_pid(), signal.SIGKILL)
        assert bench.effects() == []
        bench.let_go()
        with bench.worker():
            bench.wait_finished(job_id)
    assert bench.effects() == [1]
    assert bench.job(job_id).starts == 2


def test_a_worker_asked_to_stop_gives_its_job_back_without_counting(bench: Bench) -> None:
    with bench.clock():
        with bench.worker() as child:
            job_id = bench.enqueue("wait_then_have_effect")
            bench.running_pid()
            child.stop()  # SIGTERM, and waits
        assert bench.job(job_id).starts == 0
        bench.let_go()
        with bench.worker():
            bench.wait_finished(job_id)
    assert bench.effects() == [1]


def test_a_broker_that_forgot_everything_is_told_again(bench: Bench) -> None:
    with bench.clock():
        made = [bench.enqueue("have_effect", subject_id=n) for n in range(10)]
        wait_for(lambda: all(bench.job(one).published_at for one in made), "the publication")
    empty(bench.configuration.broker_url)
    with bench.worker(), bench.clock():
        bench.wait_finished(*made)
    assert bench.effects() == list(range(10))


def test_a_message_that_kills_its_worker_is_parked_after_three_starts(bench: Bench) -> None:
    with bench.clock():
        poison = bench.enqueue("kill_the_worker")
        started = 0
        while bench.job(poison).parked_at is None:
            with suppress(AssertionError), bench.worker():
                started += 1
                wait_for(
                    lambda seen=started: bench.job(poison).starts >= min(seen, jobs.MAX_STARTS), "the poison's start"
                )
                wait_for(lambda seen=started: seen < jobs.MAX_STARTS or is_parked(bench, poison), "the parking")
        # Others go on, in the same queue.
        healthy = bench.enqueue("have_effect", subject_id=7)
        with bench.worker():
            bench.wait_finished(healthy)
    assert bench.job(poison).starts == jobs.MAX_STARTS
    assert bench.effects() == [7]
    with bench.database.centre() as session:
        event = session.scalars(sa.select(Event).where(Event.name == "job.parked")).one()
    assert (event.subject_id, event.details["actor"]) == (poison, "kill_the_worker")


def is_parked(bench: Bench, job_id: int) -> bool:
    return bench.job(job_id).parked_at is not None


def test_two_workers_with_ten_messages_of_one_job_do_it_once(bench: Bench) -> None:
    job_id = bench.enqueue("wait_then_have_effect")
    broker = make_broker(bench.configuration.broker_url)
    with bench.worker(), bench.worker():
        for _ in range(10):
            publish(broker, job_id=job_id, queue="maintenance", actor="wait_then_have_effect")
        bench.running_pid()
        bench.let_go()
        bench.wait_finished(job_id)
        # What is left of the ten is taken and found to be nothing to do.
        last = bench.enqueue("have_effect", subject_id=2)
        publish(broker, job_id=last, queue="maintenance", actor="have_effect")
        bench.wait_finished(last)
    close(broker)
    assert bench.effects() == [1, 2]
    assert bench.job(job_id).starts == 1


def test_two_clocks_publish_each_job_once(bench: Bench) -> None:
    made = [bench.enqueue("have_effect", subject_id=n) for n in range(500)]
    with bench.clock(), bench.clock():
        wait_for(lambda: all_published(bench), "the publication")
    assert message_count(bench.configuration.broker_url) == len(made)


def all_published(bench: Bench) -> bool:
    with bench.database.centre() as session:
        return session.scalar(sa.select(sa.func.count()).where(Job.published_at.is_(None))) == 0


def message_count(url: str) -> int:
    """Messages that wait in the queue `maintenance`."""
    broker = make_broker(url)
    try:
        if url.startswith("redis"):
            return int(broker.client.llen("dramatiq:maintenance"))
        return int(broker.get_queue_message_counts("maintenance")[0])
    finally:
        close(broker)


def test_the_stacks_own_worker_routes_a_study(bench: Bench) -> None:
    with bench.database.centre() as session:
        study_id = add_study(session, bench.sites.county, state=StudyState.COMPLETE, modalities=("ECG",))
        job_id = jobs.enqueue(
            session, site_id=bench.sites.county, queue="route", actor="route_study", subject_id=study_id
        )
    arguments = ["deploy.worker", "--processes", "1", "--threads", "1", "--queues", "route"]
    child = Child(Command("worker", [sys.executable, "-m", "dramatiq", *arguments], ROOT), bench.folder / "worker.log")
    try:
        with bench.clock():
            bench.wait_finished(job_id)
    finally:
        child.stop()
    with bench.database.centre() as session:
        case = session.scalars(sa.select(Case).where(Case.study_id == study_id)).one()
        asked = session.scalars(sa.select(Job).where(Job.actor == "triage_case")).one()
    assert (case.specialty, asked.queue, asked.subject_id) == ("ecg", "triage", case.id)
