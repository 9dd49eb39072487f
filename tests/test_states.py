"""The state table in real PostgreSQL: every transition from every state, the event chain, the schema, the scopes.

Left out: which module makes which transition; each has its own tests.
"""

import itertools
from collections.abc import Iterator
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy.dialects.postgresql import ARRAY, BYTEA, JSONB
from sqlalchemy.orm import Session

from deploy.postgres import APP, OWNER, Postgres
from storage.database import Database
from storage.errors import IllegalTransitionError, NotFoundError
from storage.rows import Event, Row, Study
from storage.states import ENUM_OF_SUBJECT, Subject, Transition
from storage.transitions import SYSTEM, born, move, note, note_outside_study, verify_chain
from storage.vocabulary import StudyState
from tests.centre import Sites, add_study

TABLES = [table for table in Row.metadata.sorted_tables if table.name != "site"]


@pytest.fixture
def owner(migrated: Postgres) -> Iterator[sa.Engine]:
    engine = sa.create_engine(migrated.owner_url)
    yield engine
    engine.dispose()


def filler(column: sa.Column[Any], number: int) -> Any:
    """Some value of a column's type; `number` keeps unique columns apart."""
    if isinstance(column.type, sa.Enum):
        assert column.type.enum_class is not None
        return next(iter(column.type.enum_class))
    kinds: tuple[tuple[type[Any], Any], ...] = (
        (sa.Boolean, False),
        (sa.Integer, number),
        (sa.DateTime, datetime.now(UTC)),
        (BYTEA, number.to_bytes(8, "big")),
        (JSONB, {}),
        (ARRAY, []),
        (sa.Text, f"text {number}"),
    )
    return next(value for kind, value in kinds if isinstance(column.type, kind))


def fill_every_table(
    session: Session, site_ids: list[int], leave_out: str = ""
) -> dict[tuple[str, int], dict[str, Any]]:
    """One row in every table for every site, each pointing to rows of its own site. Returns the rows."""
    numbers = itertools.count(1)
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for site_id, table in itertools.product(site_ids, TABLES):
        if table.name == leave_out:
            continue
        values: dict[str, Any] = {}
        for column in table.columns:
            if column.identity is not None:
                continue
            if column.name == "site_id":
                values[column.name] = site_id
            elif column.foreign_keys:
                (key,) = column.foreign_keys
                values[column.name] = rows[key.column.table.name, site_id][key.column.name]
            elif column.server_default is None and not column.nullable:
                values[column.name] = filler(column, next(numbers))
        row = session.execute(sa.insert(table).values(values).returning(*table.columns)).one()
        rows[table.name, site_id] = dict(row._mapping)
    return rows


def state_of(session: Session, subject: Subject, row_id: int) -> StrEnum:
    name, _, column = subject.value.partition(".")
    table = Row.metadata.tables[name]
    state: StrEnum = session.execute(sa.select(table.c[column or "state"]).where(table.c.id == row_id)).scalar_one()
    return state


def force(session: Session, subject: Subject, row_id: int, state: StrEnum) -> None:
    """Put a row in a state without any event: for tests only."""
    name, _, column = subject.value.partition(".")
    table = Row.metadata.tables[name]
    session.execute(sa.update(table).where(table.c.id == row_id).values({column or "state": state}))


def events(session: Session, study_id: int) -> list[Event]:
    query = sa.select(Event).where(Event.study_id == study_id).order_by(Event.sequence)
    return list(session.scalars(query.execution_options(populate_existing=True)))


@pytest.mark.parametrize("transition", Transition)
def test_a_transition_starts_from_its_own_states_and_from_no_other(
    database: Database, sites: Sites, transition: Transition
) -> None:
    edge = transition.value
    with database.centre() as session:
        rows = fill_every_table(session, [sites.county], leave_out=Event.__tablename__)
    study_id = rows["study", sites.county]["id"]
    row_id = rows[edge.subject.value.partition(".")[0], sites.county]["id"]

    for state in ENUM_OF_SUBJECT[edge.subject]:
        with database.centre() as session:
            force(session, edge.subject, row_id, state)
            before = len(events(session, study_id))
        if transition.allows(state):
            with database.centre() as session:
                at = move(session, transition, row_id, actor=SYSTEM, details={"why": "test"})
            with database.centre() as session:
                newest = events(session, study_id)[-1]
                assert state_of(session, edge.subject, row_id) is edge.target
                assert (newest.name, newest.from_state, newest.to_state) == (transition.event_name, state, edge.target)
                assert (newest.subject_id, newest.at, newest.details) == (row_id, at, {"why": "test"})
                assert verify_chain(session, study_id) == before + 1
        else:
            with pytest.raises(IllegalTransitionError), database.centre() as session:
                move(session, transition, row_id, actor=SYSTEM)
            with database.centre() as session:
                assert state_of(session, edge.subject, row_id) is state
                assert len(events(session, study_id)) == before


@pytest.mark.parametrize("transition", Transition)
def test_only_a_birth_is_a_birth(database: Database, sites: Sites, transition: Transition) -> None:
    with database.centre() as session:
        study_id = add_study(session, sites.county)
    if transition.allows(None):
        with database.centre() as session:
            born(session, transition, study_id, 77, actor=SYSTEM)
            newest = events(session, study_id)[-1]
        assert (newest.from_state, newest.to_state, newest.subject_id) == (None, transition.value.target, 77)
    else:
        with pytest.raises(IllegalTransitionError), database.centre() as session:
            born(session, transition, study_id, 77, actor=SYSTEM)


def test_every_arrow_has_its_own_letter_and_every_state_can_be_reached() -> None:
    letters = [transition.value.letter for transition in Transition]
    assert len(letters) == len(set(letters))
    for subject, states in ENUM_OF_SUBJECT.items():
        targets = {transition.value.target for transition in Transition if transition.value.subject is subject}
        first = set() if subject in {Subject.STUDY, Subject.CASE, Subject.REPORT} else {next(iter(states))}
        # A case may be inserted as "no model"; the other rows without a birth start in their first state.
        first |= {state for state in states if subject is Subject.TRIAGE and state.value == "no_model"}
        assert targets | first == set(states), subject


def test_a_false_guard_moves_nothing(database: Database, sites: Sites) -> None:
    with database.centre() as session:
        study_id = add_study(session, sites.county)
    with pytest.raises(IllegalTransitionError, match="another condition"), database.centre() as session:
        move(session, Transition.STUDY_COMPLETED, study_id, actor=SYSTEM, guard=Study.instance_count > 5)
    with database.centre() as session:
        assert state_of(session, Subject.STUDY, study_id) is StudyState.RECEIVING


def test_another_hospitals_study_is_not_found(database: Database, sites: Sites) -> None:
    with database.centre() as session:
        study_id = add_study(session, sites.county)
    with pytest.raises(NotFoundError), database.county(sites.other_county) as session:
        move(session, Transition.STUDY_COMPLETED, study_id, actor=SYSTEM)
    with pytest.raises(NotFoundError), database.centre() as session:
        move(session, Transition.CASE_CLAIMED, 999_999, actor=SYSTEM)


def chain_of_five(database: Database, sites: Sites) -> int:
    with database.centre() as session:
        study_id = add_study(session, sites.county)
        move(session, Transition.STUDY_COMPLETED, study_id, actor=SYSTEM, details={"字": "值"})
        note(session, study_id, "study.looked_at", subject="study", subject_id=study_id, actor=SYSTEM)
        move(session, Transition.STUDY_EXTENDED, study_id, actor=SYSTEM)
        move(session, Transition.STUDY_HELD, study_id, actor=SYSTEM)
    return study_id


def test_an_untouched_chain_verifies(database: Database, sites: Sites) -> None:
    study_id = chain_of_five(database, sites)
    with database.centre() as session:
        assert verify_chain(session, study_id) == 5


@pytest.mark.parametrize(
    "tampering",
    [
        "UPDATE event SET actor = 'account:1' WHERE sequence = 2",
        "UPDATE event SET at = at - interval '1 second' WHERE sequence = 3",
        "UPDATE event SET details = '{\"x\": 1}' WHERE sequence = 5",
        "UPDATE event SET to_state = 'complete' WHERE sequence = 4",
        "UPDATE event SET site_id = (SELECT max(site_id) FROM site) WHERE sequence = 2",
        "UPDATE event SET site_id = (SELECT max(site_id) FROM site)",
        "UPDATE study SET site_id = (SELECT max(site_id) FROM site)",
        "UPDATE study SET event_count = 4",
        "DELETE FROM event WHERE sequence = 5",
        "DELETE FROM event WHERE sequence = 3",
        "DELETE FROM event WHERE sequence = 1",
        "DELETE FROM event",
    ],
)
def test_tampering_with_events_is_found(database: Database, sites: Sites, owner: sa.Engine, tampering: str) -> None:
    study_id = chain_of_five(database, sites)
    with owner.begin() as connection:  # only the owner of the schema could, and row security binds it too
        connection.execute(sa.text("SELECT set_config('app.site', 'all', true)"))
        assert connection.execute(sa.text(tampering)).rowcount > 0
    with pytest.raises(IllegalTransitionError), database.centre() as session:
        verify_chain(session, study_id)


@pytest.mark.parametrize("statement", ["UPDATE event SET actor = 'x'", "DELETE FROM event", "TRUNCATE event"])
def test_the_application_cannot_change_or_remove_an_event(database: Database, sites: Sites, statement: str) -> None:
    chain_of_five(database, sites)
    with pytest.raises(sa.exc.ProgrammingError, match="permission denied"), database.centre() as session:
        session.execute(sa.text(statement))


def test_python_and_postgres_know_the_same_words(migrated: Postgres, owner: sa.Engine) -> None:
    declared = {
        column.type.name: tuple(column.type.enums)
        for table in Row.metadata.sorted_tables
        for column in table.columns
        if isinstance(column.type, sa.Enum)
    }
    with owner.connect() as connection:
        rows = connection.execute(
            sa.text(
                "SELECT t.typname, array_agg(e.enumlabel ORDER BY e.enumsortorder) FROM pg_type t"
                " JOIN pg_enum e ON e.enumtypid = t.oid GROUP BY t.typname"
            )
        )
        assert {name: tuple(labels) for name, labels in rows} == declared


def test_the_migrations_from_nothing_make_the_declared_schema(migrated: Postgres, owner: sa.Engine) -> None:
    with owner.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Row.metadata) == []


def test_every_table_has_a_site_and_forced_row_security(migrated: Postgres, owner: sa.Engine) -> None:
    with owner.connect() as connection:
        rows = connection.execute(
            sa.text(
                "SELECT c.relname, c.relrowsecurity, c.relforcerowsecurity,"
                " (SELECT count(*) FROM pg_policy p WHERE p.polrelid = c.oid)"
                " FROM pg_class c WHERE c.relkind IN ('r', 'p') AND c.relnamespace = 'public'::regnamespace"
            )
        ).all()
    secured = {name: (on, forced, policies) for name, on, forced, policies in rows if name != "alembic_version"}
    assert secured == {table.name: (True, True, 1) for table in Row.metadata.sorted_tables}
    for table in Row.metadata.sorted_tables:
        assert not table.c.site_id.nullable, table.name


def test_the_application_role_owns_nothing_and_bypasses_nothing(migrated: Postgres, owner: sa.Engine) -> None:
    with owner.connect() as connection:
        names = {"app": APP, "owner": OWNER}
        owned = connection.execute(
            sa.text(
                "SELECT (SELECT count(*) FROM pg_class WHERE relowner = CAST(:app AS regrole))"
                " + (SELECT count(*) FROM pg_namespace WHERE nspowner = CAST(:app AS regrole))"
                " + (SELECT count(*) FROM pg_proc WHERE proowner = CAST(:app AS regrole))"
                " + (SELECT count(*) FROM pg_database WHERE datdba = CAST(:app AS regrole))"
            ),
            {"app": names["app"]},
        ).scalar_one()
        powers = connection.execute(
            sa.text(
                "SELECT rolname, rolsuper, rolbypassrls, rolcreaterole, rolcreatedb FROM pg_roles"
                " WHERE rolname IN (:app, :owner)"
            ),
            names,
        ).all()
        member = connection.execute(
            sa.text("SELECT pg_has_role(CAST(:app AS name), CAST(:owner AS name), 'member')"), names
        ).scalar_one()
    assert owned == 0
    assert {tuple(row[1:]) for row in powers} == {(False, False, False, False)}
    assert member is False


def test_a_county_sees_its_own_rows_in_every_table_and_no_other(database: Database, sites: Sites) -> None:
    counties = [sites.county, sites.other_county]
    with database.centre() as session:
        fill_every_table(session, counties)
    for site_id in counties:
        with database.county(site_id) as session:
            for table in Row.metadata.sorted_tables:
                assert set(session.scalars(sa.select(table.c.site_id))) == {site_id}, table.name
    with database.centre() as session:
        for table in Row.metadata.sorted_tables:
            assert set(session.scalars(sa.select(table.c.site_id))) >= set(counties), table.name


def test_without_a_scope_there_is_no_row_at_all(database: Database, sites: Sites) -> None:
    with database.centre() as session:
        fill_every_table(session, [sites.county])
    with database.engine.begin() as connection:
        for table in Row.metadata.sorted_tables:
            assert connection.execute(sa.select(table.c.site_id)).all() == [], table.name


def test_a_scope_ends_with_its_transaction(database: Database, sites: Sites) -> None:
    for _ in range(8):  # more than the pool keeps, so that each of its connections was used
        with database.centre() as session:
            session.execute(sa.text("SELECT 1"))
    with database.engine.begin() as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM site")).scalar_one() == 0


def test_a_county_cannot_write_another_countys_rows(database: Database, sites: Sites) -> None:
    with database.centre() as session:
        study_id = add_study(session, sites.county)
    with database.county(sites.other_county) as session:
        changed = session.execute(sa.update(Study).where(Study.id == study_id).values(patient_name="x"))
        assert changed.rowcount == 0  # type: ignore[attr-defined]
    with (
        pytest.raises(sa.exc.ProgrammingError, match="row-level security"),
        database.county(sites.other_county) as session,
    ):
        note_outside_study(session, sites.county, "forged", subject="site", subject_id=1, actor=SYSTEM)
