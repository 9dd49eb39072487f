"""The centre for a test: migrated database, buckets, settings, two counties. Real servers, rows fresh for each test."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa
from pydantic import SecretStr
from sqlalchemy.orm import Session

from deploy.postgres import Postgres
from deploy.valkey import Valkey
from storage.database import Database, upgrade
from storage.objects import Objects
from storage.rows import Case, Gateway, Row, Site, Study
from storage.settings import Settings
from storage.states import Transition
from storage.transitions import SYSTEM, born
from storage.vocabulary import CaseState, Priority, StudyState, TriageState
from tests.servers import S3Server


@dataclass(frozen=True)
class Sites:
    """Row ids of the sites every test has."""

    centre: int
    county: int
    other_county: int
    gateway: int  # of `county`
    other_gateway: int


@pytest.fixture(scope="session")
def migrated(postgres_server: Postgres) -> Postgres:
    """The server with our schema in it."""
    upgrade(postgres_server.owner_url)
    return postgres_server


@pytest.fixture
def configuration(
    migrated: Postgres, s3_server: S3Server, valkey_server: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Settings:
    """Settings of a centre on the test servers, also in the environment for subprocesses."""
    values = {
        "database_url": migrated.app_url,
        "database_owner_url": migrated.owner_url,
        "broker_url": valkey_server.url,
        "s3_url": s3_server.url,
        "s3_access_key": s3_server.access_key,
        "s3_secret_key": s3_server.secret_key,
        "pki_dir": str(tmp_path / "pki"),
        "object_lock_mode": "GOVERNANCE",
        "report_lock_days": "1",
    }
    for name, value in values.items():
        monkeypatch.setenv(f"YUANZHEN_{name.upper()}", value)
    return Settings.model_validate(values | {"s3_secret_key": SecretStr(s3_server.secret_key)})


def empty_all(owner_url: str) -> None:
    """Forget every row (TRUNCATE is not subject to row-level security; the owner may)."""
    engine = sa.create_engine(owner_url)
    with engine.begin() as connection:
        names = ", ".join(table.name for table in Row.metadata.sorted_tables)
        connection.execute(sa.text(f"TRUNCATE {names} RESTART IDENTITY CASCADE"))
    engine.dispose()


@pytest.fixture
def database(migrated: Postgres) -> Iterator[Database]:
    """The database as the application role, without a row."""
    empty_all(migrated.owner_url)
    opened = Database(migrated.app_url, pool_size=4)
    yield opened
    opened.close()


@pytest.fixture
def objects(configuration: Settings) -> Objects:
    """The object store with both buckets."""
    store = Objects(configuration)
    store.ensure_buckets()
    return store


@pytest.fixture
def sites(database: Database) -> Sites:
    """A centre and two counties, each county with one enrolled gateway."""
    with database.centre() as session:
        ids = [
            session.execute(
                sa.insert(Site)
                .values(code=code, name_zh=zh, name_en=en, is_centre=code == "centre")
                .returning(Site.site_id)
            ).scalar_one()
            for code, zh, en in (
                ("centre", "中心医院", "Central Hospital"),
                ("county-a", "甲县医院", "County A Hospital"),
                ("county-b", "乙县医院", "County B Hospital"),
            )
        ]
        gateways = [
            session.execute(
                sa.insert(Gateway)
                .values(site_id=site_id, name=f"gateway-{site_id}", certificate_sha256=f"{site_id:064x}")
                .returning(Gateway.id)
            ).scalar_one()
            for site_id in ids[1:]
        ]
    return Sites(*ids, *gateways)


def add_study(
    session: Session,
    site_id: int,
    study_instance_uid: str = "1.2.3",
    *,
    state: StudyState = StudyState.RECEIVING,
    patient_id: str = "P1",
    patient_name: str = "Zhang^San=张^三",
    modalities: tuple[str, ...] = ("CT",),
) -> int:
    """A study row with its first event. Returns its id."""
    study_id: int = session.execute(
        sa.insert(Study)
        .values(
            site_id=site_id,
            study_instance_uid=study_instance_uid,
            patient_key=patient_id,
            patient_id=patient_id,
            issuer_of_patient_id="",
            patient_name=patient_name,
            patient_birth_date="19800101",
            patient_sex="M",
            patient_age="046Y",
            accession_number="A1",
            study_date="20261123",
            study_time="080000",
            study_description="",
            specific_character_set="ISO_IR 192",
            repaired_character_set="",
            modalities=list(modalities),
            priority=Priority.ROUTINE,
            first_received_at=datetime.now(UTC),
            state=state,
        )
        .returning(Study.id)
    ).scalar_one()
    born(session, Transition.STUDY_ANNOUNCED, study_id, study_id, actor=SYSTEM)
    return study_id


def add_case(
    session: Session,
    study_id: int,
    *,
    specialty: str = "imaging",
    state: CaseState = CaseState.QUEUED,
    priority: Priority = Priority.ROUTINE,
    tier: int = 1,
    due_at: datetime | None = None,
    triage: TriageState = TriageState.NO_MODEL,
) -> int:
    """A case row with its first event, on the study's site. Returns its id."""
    site_id = session.execute(sa.select(Study.site_id).where(Study.id == study_id)).scalar_one()
    now = datetime.now(UTC)
    case_id: int = session.execute(
        sa.insert(Case)
        .values(
            site_id=site_id,
            study_id=study_id,
            state=state,
            specialty=specialty,
            priority=priority,
            tier=tier,
            clock_started_at=now,
            contract_due_at=due_at or now,
            due_at=due_at or now,
            rule_name="test",
            rules_version="0",
            triage=triage,
        )
        .returning(Case.id)
    ).scalar_one()
    born(session, Transition.CASE_QUEUED, study_id, case_id, actor=SYSTEM)
    return case_id
