"""Completion by silence, for studies whose gateway never sent an inventory; and how patients are compared."""

from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa

from routing import completion
from storage import archive, patients
from storage.database import Database
from storage.rows import Event, Job, Study, StudyInventory
from storage.vocabulary import StudyState
from storage.wire import StudyFacts
from tests.centre import Sites, add_study

QUIET_S = 1800.0


def quiet_study(database: Database, site_id: int, uid: str, *, images: int = 3, minutes: int = 60) -> int:
    with database.centre() as session:
        study_id = add_study(session, site_id, uid)
        ago = sa.func.clock_timestamp() - timedelta(minutes=minutes)
        values = {"instance_count": images, "last_arrived_at": ago}
        session.execute(sa.update(Study).where(Study.id == study_id).values(values))
        return study_id


def state(database: Database, study_id: int) -> StudyState:
    with database.centre() as session:
        return session.get_one(Study, study_id).state


def test_a_study_without_an_inventory_is_complete_after_silence_and_routed_once(
    database: Database, sites: Sites
) -> None:
    quiet = quiet_study(database, sites.county, "1.1")
    lively = quiet_study(database, sites.county, "1.2", minutes=1)
    empty = quiet_study(database, sites.county, "1.3", images=0)
    assert completion.complete_quiet(database, QUIET_S) == 1
    assert completion.complete_quiet(database, QUIET_S) == 0
    assert state(database, quiet) is StudyState.COMPLETE
    assert state(database, lively) is state(database, empty) is StudyState.RECEIVING
    with database.centre() as session:
        assert session.scalars(sa.select(Job.subject_id)).all() == [quiet]
        event = session.scalars(sa.select(Event).where(Event.name == "study.completed")).one()
    assert event.details == {"by": "quiet", "instances": 3} and event.actor == "system"


def test_a_study_whose_gateway_promised_more_is_waited_for_however_long(database: Database, sites: Sites) -> None:
    study_id = quiet_study(database, sites.county, "1.1", minutes=60 * 24)
    with database.centre() as session:
        lines = {archive.line_key("1.2.9", "0" * 64): 1}
        session.add(StudyInventory(study_id=study_id, site_id=sites.county, instances=lines))
    assert completion.complete_quiet(database, QUIET_S) == 0
    assert state(database, study_id) is StudyState.RECEIVING


def test_more_quiet_studies_than_one_batch_are_all_completed(database: Database, sites: Sites) -> None:
    for number in range(105):
        quiet_study(database, sites.county, f"1.{number}")
    assert completion.complete_quiet(database, QUIET_S) == 105


def test_a_study_without_an_image_of_its_own_is_held_and_not_queued(database: Database, sites: Sites) -> None:
    study_id = quiet_study(database, sites.county, "1.1", images=0)
    with database.centre() as session:
        session.add(StudyInventory(study_id=study_id, site_id=sites.county, instances={}))
        assert not completion.check(session, study_id, actor="system")
    assert state(database, study_id) is StudyState.HELD
    with database.centre() as session:
        assert session.scalars(sa.select(Job)).all() == []


def test_patients_are_compared_by_id_and_by_issuer_where_both_have_one() -> None:
    def is_of(study: Study, patient_id: str, issuer: str = "") -> bool:
        return patients.same_patient_id(study, Study(patient_id=patient_id, issuer_of_patient_id=issuer))

    study = Study(patient_id="P1 ", issuer_of_patient_id="")
    assert is_of(study, "P1") and is_of(study, "P1", "HIS")
    assert not is_of(study, "p1") and not is_of(study, "")
    study = Study(patient_id="P1", issuer_of_patient_id="HIS")
    assert is_of(study, "P1") and not is_of(study, "P1", "OTHER")
    assert archive.patient_key("P1\0 ", "") == "P1" and archive.patient_key("P1", "HIS") == "P1^^^HIS"


_WANG = {"patient_id": "P1", "patient_name": "Wang^Wu=王^五", "patient_birth_date": "19800101", "patient_sex": "M"}


@pytest.mark.parametrize(
    ("mine", "theirs", "same"),
    [
        ({}, {}, True),
        ({}, {"patient_name": "WANG WU"}, True),
        ({}, {"patient_name": "Li^Si"}, True),  # with an ID of somebody, a corrected name
        ({}, {"patient_birth_date": "19810101"}, False),
        ({}, {"patient_birth_date": ""}, True),
        ({}, {"patient_birth_date": "00000000"}, True),
        ({}, {"patient_sex": "F"}, False),
        ({}, {"patient_sex": "O"}, True),
        ({"patient_id": ""}, {"patient_id": "P1"}, False),
        ({"patient_id": ""}, {"patient_id": ""}, True),
        ({"patient_id": ""}, {"patient_id": "", "patient_name": "WANG^WU"}, True),
        ({"patient_id": ""}, {"patient_id": "", "patient_name": "=王五"}, True),
        ({"patient_id": ""}, {"patient_id": "", "patient_name": "王五"}, True),
        ({"patient_id": ""}, {"patient_id": "", "patient_name": "Wang^Wu=王^武"}, False),
        ({"patient_id": ""}, {"patient_id": "", "patient_name": "Li^Si"}, False),
        ({"patient_id": ""}, {"patient_id": "", "patient_name": ""}, False),
        ({"patient_id": "", "patient_name": ""}, {"patient_id": "", "patient_name": "^"}, True),
        ({"patient_id": "000000"}, {"patient_id": "000000", "patient_name": "Li^Si"}, False),
    ],
)
def test_one_study_uid_is_of_one_patient_only_where_nothing_speaks_against_it(
    mine: dict[str, str], theirs: dict[str, str], same: bool
) -> None:
    study = Study(**(_WANG | {"issuer_of_patient_id": ""} | mine))
    facts = StudyFacts(study_instance_uid="1.2.3", first_received_at=datetime.now(UTC), **(_WANG | theirs))
    assert patients.same_patient(study, facts) is patients.same_patient(facts, study) is same
