"""What routing does to a study's case: first routing, more images, holds, and findings that move it earlier.

Actors are called as the worker calls them, on real PostgreSQL; brokers are in test_worker_processes.py.
"""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from routing.actors import facts_of, reprioritise_case, route_study
from routing.priority import TIER_FIRST, TIER_ROUTINE, TIER_URGENT
from storage import jobs
from storage.actors import Context, Outcome
from storage.archive import open_study
from storage.database import Database
from storage.objects import Objects
from storage.rows import Case, Event, Gateway, Job, Study, TriageRun, Upload
from storage.settings import Settings
from storage.states import Transition
from storage.transitions import SYSTEM, move, verify_chain
from storage.vocabulary import CaseState, Priority, RunMode, RunState, TriageState, UploadState
from storage.wire import StudyFacts
from tests.centre import Sites, add_study


class County:
    """One study of one county, and what happens to it."""

    def __init__(self, context: Context, sites: Sites) -> None:
        self.context = context
        self.database = context.database
        self.sites = sites
        self.study_id = 0

    def send(self, *modalities: str, **columns: Any) -> None:
        """A study arrives and is complete."""
        with self.database.centre() as session:
            self.study_id = add_study(session, self.sites.county, modalities=modalities)
            self.change(session, instance_count=1, **columns)
            move(session, Transition.STUDY_COMPLETED, self.study_id, actor=SYSTEM)

    def change(self, session: Any, **columns: Any) -> None:
        session.execute(sa.update(Study).where(Study.id == self.study_id).values(**columns))

    def more_images(self, count: int) -> None:
        with self.database.centre() as session:
            move(session, Transition.STUDY_EXTENDED, self.study_id, actor=SYSTEM)
            self.change(session, instance_count=count, last_arrived_at=sa.func.clock_timestamp())
            move(session, Transition.STUDY_COMPLETED, self.study_id, actor=SYSTEM)

    def route(self) -> Case:
        """Run `route_study` as a worker would, and return the case."""
        self.run(route_study.name, self.study_id)
        return self.case()

    def run(self, name: str, subject_id: int) -> None:
        with self.database.centre() as session:
            job_id = jobs.enqueue(session, site_id=self.sites.county, queue="route", actor=name, subject_id=subject_id)
        actor = {route_study.name: route_study, reprioritise_case.name: reprioritise_case}[name]
        assert actor.perform(self.context, job_id) is Outcome.DONE

    def case(self) -> Case:
        with self.database.centre() as session:
            return session.scalars(sa.select(Case).where(Case.study_id == self.study_id)).one()

    def move_case(self, *transitions: Transition, **values: Any) -> None:
        with self.database.centre() as session:
            for transition in transitions:
                move(session, transition, self.case().id, actor=SYSTEM, values=values)

    def triage_queues(self) -> list[str]:
        with self.database.centre() as session:
            return list(session.scalars(sa.select(Job.queue).where(Job.actor == "triage_case").order_by(Job.id)))

    def find(self, minutes_earlier: int, mode: RunMode = RunMode.ACTIVE, positive: bool = True) -> None:
        """A model answers."""
        case = self.case()
        with self.database.centre() as session:
            session.execute(
                sa.insert(TriageRun).values(
                    site_id=self.sites.county,
                    study_id=self.study_id,
                    case_id=case.id,
                    study_version=1,
                    model_name=f"model-{minutes_earlier}-{mode}",
                    model_version="1",
                    model_sha256="0",
                    mode=mode,
                    state=RunState.DONE,
                    findings=[
                        {
                            "code": "af",
                            "text_zh": "房颤",
                            "text_en": "AF",
                            "probability": 0.9,
                            "positive": positive,
                            "minutes_earlier": minutes_earlier,
                        }
                    ],
                )
            )
        self.run(reprioritise_case.name, case.id)

    def events(self, name: str) -> list[Event]:
        with self.database.centre() as session:
            verify_chain(session, self.study_id)
            found = sa.select(Event).where(Event.study_id == self.study_id, Event.name == name)
            return list(session.scalars(found.order_by(Event.sequence)))


@pytest.fixture
def county(database: Database, sites: Sites, configuration: Settings) -> County:
    return County(Context(database, Objects(configuration), configuration), sites)


def test_a_complete_study_gets_a_case_with_rule_reasons_and_due_time(county: County) -> None:
    received = datetime.now(UTC) - timedelta(minutes=10)
    county.send("CT", first_received_at=received)
    case = county.route()
    assert (case.state, case.specialty, case.priority, case.tier) == (
        CaseState.QUEUED,
        "imaging",
        Priority.ROUTINE,
        TIER_ROUTINE,
    )
    assert case.clock_started_at == received
    assert case.due_at == case.contract_due_at == received + timedelta(minutes=240)
    assert (case.triage, case.triage_deadline, county.triage_queues()) == (TriageState.NO_MODEL, None, [])
    assert [reason["code"] for reason in case.due_reasons] == ["rule", "contract"]
    (event,) = county.events("case.queued")
    assert event.details["rule"] == case.rule_name == "ct-mr"
    assert event.details["rules_version"] == case.rules_version
    assert event.details["contract_due_at"] == case.contract_due_at.isoformat()


def test_an_ecg_waits_for_a_model_without_being_held(county: County) -> None:
    county.send("ECG", priority=Priority.STAT)
    case = county.route()
    assert (case.state, case.tier, case.triage) == (CaseState.QUEUED, TIER_FIRST, TriageState.PENDING)
    assert case.triage_deadline is not None and case.triage_deadline > datetime.now(UTC)
    assert county.triage_queues() == ["triage-urgent"]


def test_a_study_no_rule_knows_is_read_all_the_same(county: County) -> None:
    county.send("XX")
    case = county.route()
    assert (case.specialty, case.rule_name) == ("imaging", "default")
    assert "没有规则适用" in case.due_reasons[0]["zh"]


def test_the_gateways_clock_is_corrected(county: County) -> None:
    received = datetime.now(UTC) + timedelta(minutes=50)  # its clock runs an hour ahead
    county.send("CT", first_received_at=received)
    with county.database.centre() as session:
        session.execute(sa.update(Gateway).where(Gateway.id == county.sites.gateway).values(clock_offset_ms=3_600_000))
        session.execute(
            sa.insert(Upload).values(
                site_id=county.sites.county,
                study_id=county.study_id,
                gateway_id=county.sites.gateway,
                pack_id="0",
                staging_key="0",
                plan={},
                state=UploadState.RECEIPTED,
            )
        )
    assert county.route().clock_started_at == received - timedelta(hours=1)


def test_a_study_that_is_receiving_again_or_held_is_left_for_its_next_completion(county: County) -> None:
    county.send("CT")
    with county.database.centre() as session:
        move(session, Transition.STUDY_HELD, county.study_id, actor=SYSTEM)
    county.run(route_study.name, county.study_id)
    with county.database.centre() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(Case)) == 0
    county.run(route_study.name, 999_999)  # gone: nothing to do


def test_routing_twice_changes_nothing(county: County) -> None:
    county.send("ECG")
    first = county.route()
    second = county.route()
    assert second.due_at == first.due_at and second.triage_deadline == first.triage_deadline
    assert county.triage_queues() == ["triage"]
    assert len(county.events("case.queued")) == 1 and county.events("case.renewed") == []


def test_more_images_before_reading_ask_the_models_again_and_keep_the_place(county: County) -> None:
    county.send("ECG")
    first = county.route()
    county.move_case(Transition.TRIAGE_DONE)
    county.find(15)
    county.more_images(2)
    again = county.route()
    assert again.due_at == first.due_at - timedelta(minutes=15)
    assert (again.triage, again.new_images, again.state) == (TriageState.PENDING, False, CaseState.QUEUED)
    assert county.triage_queues() == ["triage", "triage"]
    assert [event.details["instance_count"] for event in county.events("case.renewed")] == [2]


def test_more_images_in_a_readers_hands_are_shown_and_leave_the_claim(county: County) -> None:
    county.send("CT")
    county.route()
    county.move_case(Transition.CASE_CLAIMED, lease_token="t")
    with county.database.centre() as session:
        county.change(session, modalities=["CT", "US"])
    county.more_images(2)
    case = county.route()
    assert (case.state, case.lease_token, case.new_images, case.specialty) == (CaseState.CLAIMED, "t", True, "imaging")


def test_images_after_the_signature_reopen_the_case_with_a_clock_of_its_own(county: County) -> None:
    county.send("CT", first_received_at=datetime.now(UTC) - timedelta(days=2))
    first = county.route()
    county.move_case(Transition.CASE_CLAIMED, Transition.CASE_REPORTED)
    county.more_images(2)
    case = county.route()
    assert (case.state, case.new_images) == (CaseState.QUEUED, True)
    assert case.due_at > first.due_at + timedelta(days=1)
    promises = [event.details["contract_due_at"] for event in county.events("case.queued")]
    assert promises == [first.contract_due_at.isoformat()]  # the first promise stays on record


def test_a_case_reopened_at_the_door_gets_its_own_clock_too(county: County) -> None:
    county.send("CT", first_received_at=datetime.now(UTC) - timedelta(days=2))
    first = county.route()
    county.move_case(Transition.CASE_CLAIMED, Transition.CASE_REPORTED)
    county.move_case(Transition.CASE_REOPENED, new_images=True)  # what ingest does on arrival
    county.more_images(2)
    case = county.route()
    assert case.due_at > first.due_at + timedelta(days=1)
    assert county.route().due_at == case.due_at


def test_a_released_study_is_read_again_from_where_it_stood(county: County) -> None:
    county.send("CT")
    first = county.route()
    county.move_case(Transition.CASE_SUSPENDED)
    with county.database.centre() as session:
        for transition in (Transition.STUDY_HELD, Transition.STUDY_RELEASED, Transition.STUDY_COMPLETED):
            move(session, transition, county.study_id, actor=SYSTEM)
    case = county.route()
    assert (case.state, case.due_at) == (CaseState.QUEUED, first.due_at)


def test_a_county_that_raises_the_priority_moves_its_case_earlier(county: County) -> None:
    county.send("CT")
    county.route()
    with county.database.centre() as session:
        county.change(session, priority=Priority.STAT)
    case = county.route()
    assert (case.tier, case.priority) == (TIER_FIRST, Priority.STAT)
    assert case.due_at == case.clock_started_at + timedelta(minutes=60)
    with county.database.centre() as session:
        county.change(session, priority=Priority.ROUTINE)
    assert county.route().priority is Priority.STAT


def test_an_active_finding_moves_the_case_earlier_and_says_which(county: County) -> None:
    county.send("ECG")
    first = county.route()
    county.find(15)
    case = county.case()
    assert case.due_at == first.due_at - timedelta(minutes=15)
    assert case.contract_due_at == first.contract_due_at
    assert [reason["code"] for reason in case.due_reasons] == ["rule", "contract", "finding"]
    (event,) = county.events("case.moved_earlier")
    assert event.details["why"] == "triage"


@pytest.mark.parametrize(("mode", "positive"), [(RunMode.SHADOW, True), (RunMode.ACTIVE, False)])
def test_a_shadow_or_negative_answer_moves_nothing(county: County, mode: RunMode, positive: bool) -> None:
    county.send("ECG")
    first = county.route()
    county.find(15, mode, positive)
    assert county.case().due_at == first.due_at
    assert county.events("case.moved_earlier") == []


def test_a_weaker_later_finding_moves_nothing_back(county: County) -> None:
    county.send("ECG")
    first = county.route()
    county.find(20)
    county.find(5)
    assert county.case().due_at == first.due_at - timedelta(minutes=20)
    assert len(county.events("case.moved_earlier")) == 1


def test_a_reported_case_is_not_moved(county: County) -> None:
    county.send("ECG")
    first = county.route()
    county.move_case(Transition.CASE_CLAIMED, Transition.CASE_REPORTED)
    county.find(15)
    assert county.case().due_at == first.due_at
    county.run(reprioritise_case.name, 999_999)  # gone: nothing to do


def test_an_overdue_routine_case_is_lifted_when_it_is_placed_again(county: County) -> None:
    county.send("CT", first_received_at=datetime.now(UTC) - timedelta(hours=5))
    assert county.route().tier == TIER_URGENT


def test_rules_may_ask_for_the_sender_of_an_offer(county: County) -> None:
    with county.database.centre() as session:
        facts = StudyFacts(study_instance_uid="1.2.9", calling_ae_title="CT_ROOM2", first_received_at=datetime.now(UTC))
        study = open_study(session, county.sites.county, facts, actor=SYSTEM)
        assert facts_of(session, study).calling_ae_title == "CT_ROOM2"
