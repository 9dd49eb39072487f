"""What the clock does by itself, and what it bears: servers away, other clocks, SIGTERM. Real PostgreSQL and Valkey.

Deadlines are not waited for: rows are made older. Publication through both brokers is in test_worker_processes.py.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dramatiq
import psycopg
import pytest
import sqlalchemy as sa

from deploy.pki import ensure_pki
from deploy.postgres import APP, Postgres
from deploy.process import free_ports
from routing.clock import Clock
from routing.priority import TIER_ROUTINE, TIER_URGENT
from routing.sweep import sweep_staging
from storage import jobs
from storage.broker import make_broker
from storage.database import Database
from storage.errors import ConfigurationError
from storage.objects import Objects
from storage.rows import Case, Event, Gateway, Job, Study, TriageRun, Upload
from storage.settings import Settings
from storage.vocabulary import CaseState, RunMode, RunState, StudyState, TriageState, UploadState
from tests.centre import Sites, add_case, add_study

ROOT = Path(__file__).parent.parent
PATIENCE_S = 60
AGO = timedelta(minutes=10)


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen in {PATIENCE_S} s"
        time.sleep(0.05)


def close(broker: Any) -> None:
    broker.client.connection_pool.disconnect()
    broker.close()


@pytest.fixture
def broker(configuration: Settings) -> Iterator[dramatiq.Broker]:
    made = make_broker(configuration.broker_url)
    made.client.flushall()
    yield made
    close(made)


@pytest.fixture
def clock(database: Database, broker: dramatiq.Broker, configuration: Settings) -> Clock:
    return Clock(database, broker, configuration)


@contextmanager
def running(clock: Clock) -> Iterator[None]:
    stop = threading.Event()
    thread = threading.Thread(target=clock.run, args=(stop,))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def make_case(database: Database, sites: Sites, **columns: Any) -> int:
    """A case of a complete study, with some columns set."""
    with database.centre() as session:
        study_id = add_study(session, sites.county, state=StudyState.COMPLETE)
        case_id = add_case(session, study_id)
        if columns:
            session.execute(sa.update(Case).where(Case.id == case_id).values(**columns))
    return case_id


def case_of(database: Database, case_id: int) -> Case:
    with database.centre() as session:
        return session.get_one(Case, case_id)


def event_names(database: Database) -> list[str]:
    with database.centre() as session:
        return list(session.scalars(sa.select(Event.name).order_by(Event.id)))


def enqueue(database: Database, sites: Sites, actor: str = "route_study", subject_id: int = 1) -> int:
    with database.centre() as session:
        return jobs.enqueue(session, site_id=sites.county, queue="route", actor=actor, subject_id=subject_id)


def is_published(database: Database, job_id: int) -> bool:
    with database.centre() as session:
        return session.get_one(Job, job_id).published_at is not None


def at_once(*tasks: Callable[[], int]) -> int:
    """Run the same task of several clocks at the same time; the sum of what they did."""
    done: list[int] = []
    threads = [threading.Thread(target=lambda task=task: done.append(task())) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == len(tasks)
    return sum(done)


def test_a_lease_without_heartbeat_is_given_back_once(
    database: Database, sites: Sites, clock: Clock, broker: dramatiq.Broker, configuration: Settings
) -> None:
    over = {"state": CaseState.CLAIMED, "lease_token": "t", "lease_expires_at": datetime.now(UTC) - AGO}
    case_id = make_case(database, sites, **over)
    other = Clock(database, broker, configuration)
    assert at_once(clock.expire_leases, other.expire_leases) == 1
    case = case_of(database, case_id)
    assert (case.state, case.lease_token, case.lease_expires_at) == (CaseState.QUEUED, None, None)
    assert event_names(database).count("case.lease_expired") == 1


def test_a_lease_that_is_kept_alive_stays(database: Database, sites: Sites, clock: Clock) -> None:
    alive = {"state": CaseState.CLAIMED, "lease_token": "t", "lease_expires_at": datetime.now(UTC) + AGO}
    case_id = make_case(database, sites, **alive)
    assert clock.expire_leases() == 0
    assert case_of(database, case_id).state is CaseState.CLAIMED


def test_the_worklist_stops_waiting_for_a_model_at_the_deadline(database: Database, sites: Sites, clock: Clock) -> None:
    late = make_case(database, sites, triage=TriageState.PENDING, triage_deadline=datetime.now(UTC) - AGO)
    with database.centre() as session:
        study_id = add_study(session, sites.county, "1.2.4", state=StudyState.COMPLETE)
        waiting = add_case(session, study_id, triage=TriageState.PENDING)
        session.execute(sa.update(Case).where(Case.id == waiting).values(triage_deadline=datetime.now(UTC) + AGO))
    assert clock.expire_triage() == 1
    assert case_of(database, late).triage is TriageState.NOT_TRIAGED
    assert case_of(database, waiting).triage is TriageState.PENDING
    assert clock.expire_triage() == 0


def test_an_overdue_routine_case_is_lifted_among_the_urgent_once(
    database: Database, sites: Sites, clock: Clock, broker: dramatiq.Broker, configuration: Settings
) -> None:
    due = datetime.now(UTC) - AGO
    over = {"tier": TIER_ROUTINE, "clock_started_at": due - AGO, "contract_due_at": due, "due_at": due}
    case_id = make_case(database, sites, **over)
    assert at_once(clock.lift_aged, Clock(database, broker, configuration).lift_aged) == 1
    case = case_of(database, case_id)
    assert (case.tier, case.due_at) == (TIER_URGENT, due)
    assert case.due_reasons[-1]["code"] == "aged"
    assert event_names(database).count("case.moved_earlier") == 1


def test_a_quiet_study_is_completed_and_routed(
    database: Database, sites: Sites, clock: Clock, configuration: Settings
) -> None:
    with database.centre() as session:
        study_id = add_study(session, sites.county)
        long_ago = datetime.now(UTC) - timedelta(seconds=configuration.quiet_complete_s + 60)
        session.execute(sa.update(Study).where(Study.id == study_id).values(instance_count=1, last_arrived_at=long_ago))
    clock.tick()
    with database.centre() as session:
        assert session.get_one(Study, study_id).state is StudyState.COMPLETE
        assert session.scalars(sa.select(Job.actor)).all() == ["route_study"]


def test_a_triage_job_that_was_parked_fails_its_run_and_ends_the_wait(
    database: Database, sites: Sites, clock: Clock
) -> None:
    case_id = make_case(database, sites, triage=TriageState.PENDING)
    case = case_of(database, case_id)
    with database.centre() as session:
        run_id = session.scalars(
            sa.insert(TriageRun)
            .values(
                site_id=sites.county,
                study_id=case.study_id,
                case_id=case_id,
                study_version=1,
                model_name="m",
                model_version="1",
                model_sha256="0",
                mode=RunMode.ACTIVE,
                state=RunState.PENDING,
            )
            .returning(TriageRun.id)
        ).one()
    job_id = enqueue(database, sites, "triage_case", case_id)
    with database.centre() as session:
        exhausted = {"starts": jobs.MAX_STARTS, "started_at": datetime.now(UTC) - AGO}
        session.execute(sa.update(Job).where(Job.id == job_id).values(**exhausted))
    assert clock.park_exhausted() == 1
    assert clock.park_exhausted() == 0
    with database.centre() as session:
        assert session.get_one(TriageRun, run_id).state is RunState.FAILED
        parked = session.scalars(sa.select(Event).where(Event.name == "job.parked")).one()
    assert parked.study_id == case.study_id and parked.details["actor"] == "triage_case"
    assert case_of(database, case_id).triage is TriageState.NOT_TRIAGED
    assert case_of(database, case_id).state is CaseState.QUEUED


def test_a_silent_gateway_is_one_event_and_its_return_another(
    database: Database, sites: Sites, clock: Clock, broker: dramatiq.Broker, configuration: Settings
) -> None:
    def heard(at: datetime) -> None:
        with database.centre() as session:
            session.execute(sa.update(Gateway).where(Gateway.id == sites.gateway).values(last_heartbeat_at=at))

    other = Clock(database, broker, configuration)
    assert clock.note_silent_gateways() == 0  # never heard of: not enrolled in earnest yet
    for _ in range(2):
        heard(datetime.now(UTC) - AGO)
        assert at_once(clock.note_silent_gateways, other.note_silent_gateways) == 1
        assert clock.note_silent_gateways() == 0
        heard(datetime.now(UTC))
        assert at_once(clock.note_silent_gateways, other.note_silent_gateways) == 1
    assert event_names(database) == ["gateway.silent", "gateway.heard"] * 2


def test_without_a_broker_the_other_tasks_go_on_and_nothing_is_lost(
    database: Database, sites: Sites, configuration: Settings, broker: dramatiq.Broker
) -> None:
    nobody = make_broker(f"redis://127.0.0.1:{free_ports(1)[0]}/0")
    case_id = make_case(
        database, sites, state=CaseState.CLAIMED, lease_token="t", lease_expires_at=datetime.now(UTC) - AGO
    )
    job_id = enqueue(database, sites)
    with running(Clock(database, nobody, configuration)):
        wait_for(lambda: case_of(database, case_id).state is CaseState.QUEUED, "the lease's end")
        assert not is_published(database, job_id)
    close(nobody)
    with running(Clock(database, broker, configuration)):
        wait_for(lambda: is_published(database, job_id), "the publication")


def test_a_postgres_that_was_away_is_found_again(
    database: Database, sites: Sites, clock: Clock, postgres_server: Postgres
) -> None:
    def as_superuser(statement: str) -> None:
        with psycopg.connect(
            host="127.0.0.1",
            port=postgres_server.port,
            user="postgres",
            password=postgres_server.passwords.superuser,
            dbname="postgres",
            autocommit=True,
        ) as connection:
            connection.execute(statement)  # type: ignore[call-overload]

    end_all = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{APP}'"  # noqa: S608 - our constant
    with running(clock):
        first = enqueue(database, sites)
        wait_for(lambda: is_published(database, first), "the publication")
        try:
            as_superuser(f"ALTER ROLE {APP} NOLOGIN")
            as_superuser(end_all)
            time.sleep(2)  # long enough for the clock to have tried and failed
        finally:
            as_superuser(f"ALTER ROLE {APP} LOGIN")
        second = enqueue(database, sites)
        wait_for(lambda: is_published(database, second), "the publication")


def test_a_new_job_wakes_the_relay(database: Database, sites: Sites, clock: Clock) -> None:
    with running(clock):
        for _ in range(5):
            job_id = enqueue(database, sites)
            wait_for(lambda job_id=job_id: is_published(database, job_id), "the publication")


@pytest.fixture
def environment(configuration: Settings) -> dict[str, str]:
    return dict(os.environ)  # `configuration` has put its values there


def test_the_process_says_when_it_is_ready_and_stops_in_order_on_sigterm(
    database: Database, sites: Sites, environment: dict[str, str], configuration: Settings, tmp_path: Path
) -> None:
    ensure_pki(configuration.pki_dir)
    log = tmp_path / "clock.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "routing.clock"], cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT
        )
    try:
        wait_for(lambda: '"action": "clock.ready"' in log.read_text(), "the start")
        job_id = enqueue(database, sites)
        wait_for(lambda: is_published(database, job_id), "the publication")
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
    finally:
        process.kill()
        process.wait()
    assert '"action": "clock.stopped"' in log.read_text()
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize("module", ["routing.clock", "deploy.worker"])
def test_a_bad_rule_stops_the_start_with_file_line_and_reason(
    environment: dict[str, str], tmp_path: Path, module: str
) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text((ROOT / "routing" / "rules.toml").read_text().replace("deadline_s = 300", "deadline_s = 0"))
    line = rules.read_text().splitlines().index("deadline_s = 0") + 1
    run = ["-m", module] if module == "routing.clock" else ["-m", "dramatiq", module, "--processes", "1"]
    done = subprocess.run(
        [sys.executable, *run],
        cwd=ROOT,
        env=environment | {"YUANZHEN_RULES_FILE": str(rules)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode != 0
    assert f"{rules}:{line}: triage.deadline_s: Input should be greater than 0" in done.stdout + done.stderr


def test_a_clock_without_the_key_of_the_daily_heads_does_not_start(
    environment: dict[str, str], configuration: Settings
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "routing.clock"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode != 0
    assert f"Receipt key {configuration.pki_dir / 'receipt.key'} cannot be read" in done.stdout + done.stderr


def test_what_uploads_left_under_staging_goes_after_a_day_and_nothing_else(
    database: Database, sites: Sites, objects: Objects
) -> None:
    with database.centre() as session:
        study_id = add_study(session, sites.county)
        for state in UploadState:
            upload = {"site_id": sites.county, "study_id": study_id, "gateway_id": sites.gateway, "plan": {}}
            named = {"pack_id": state.value, "staging_key": f"staging/sweep/{state.value}", "state": state}
            session.execute(sa.insert(Upload).values(upload | named))
    left = {f"staging/sweep/{name}" for name in (*UploadState, "unknown")}
    archived = {f"county-a/sweep/{UploadState.RECEIPTED.value}", "stagings/sweep/unknown"}
    for key in left | archived:
        objects.put(key, b"bytes")

    assert sweep_staging(database, objects) == 0  # none is a day old
    assert set(objects.list("staging/sweep/")) == left

    assert sweep_staging(database, objects, older_than=-timedelta(minutes=1)) >= 2  # other tests' leavings go too
    kept = {f"staging/sweep/{state.value}" for state in UploadState if state is not UploadState.RECEIPTED}
    assert set(objects.list("staging/sweep/")) == kept
    assert {key for key in archived if objects.size(key) == 5} == archived


@pytest.mark.parametrize("url", ["kafka://x", "http://127.0.0.1", ""])
def test_a_broker_of_another_kind_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="redis"):
        make_broker(url)
