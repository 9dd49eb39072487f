"""Every table of the centre. Each has `site_id`: row-level security hangs on it (storage/migrations).

Names are DICOM keywords where the standard has one. Times are `timestamptz`, by the centre's clock unless named
otherwise. A `state` column is written by `storage/transitions.py` alone.
"""

from datetime import datetime
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, BYTEA, JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from storage.vocabulary import (
    CaseState,
    Codec,
    Conclusion,
    Priority,
    ReportState,
    Role,
    RunMode,
    RunState,
    StudyState,
    TriageState,
    UploadState,
)


def _enum(kind: type[StrEnum], name: str) -> sa.Enum:
    return sa.Enum(kind, name=name, values_callable=lambda members: [m.value for m in members])


class Row(DeclarativeBase):
    """Base: names of constraints are fixed, so that migrations can name them."""

    metadata = sa.MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012 - SQLAlchemy reads this class attribute
        datetime: sa.DateTime(timezone=True),
        str: sa.Text,
        bytes: BYTEA,
        dict[str, Any]: JSONB,
        list[str]: ARRAY(sa.Text),
        StudyState: _enum(StudyState, "study_state"),
        CaseState: _enum(CaseState, "case_state"),
        ReportState: _enum(ReportState, "report_state"),
        UploadState: _enum(UploadState, "upload_state"),
        TriageState: _enum(TriageState, "triage_state"),
        RunState: _enum(RunState, "run_state"),
        RunMode: _enum(RunMode, "run_mode"),
        Priority: _enum(Priority, "priority"),
        Conclusion: _enum(Conclusion, "conclusion"),
        Role: _enum(Role, "role"),
        Codec: _enum(Codec, "codec"),
    }


def _id() -> Mapped[int]:
    return mapped_column(sa.BigInteger, sa.Identity(), primary_key=True)


def _site(*, index: bool = False) -> Mapped[int]:
    return mapped_column(sa.ForeignKey("site.site_id"), index=index)


def _now() -> Mapped[datetime]:
    return mapped_column(server_default=sa.func.clock_timestamp())


class Site(Row):
    """A hospital: county or centre."""

    __tablename__ = "site"

    site_id: Mapped[int] = mapped_column(sa.Integer, sa.Identity(), primary_key=True)
    code: Mapped[str] = mapped_column(unique=True)  # on the wire, in object keys: [a-z0-9-]
    name_zh: Mapped[str]
    name_en: Mapped[str]
    is_centre: Mapped[bool] = mapped_column(default=False, server_default=sa.false())
    enabled_models: Mapped[list[str]] = mapped_column(server_default="{}")  # research-only models shown here, by name


class Gateway(Row):
    """An enrolled gateway: who may speak on the wire, by certificate."""

    __tablename__ = "gateway"

    id: Mapped[int] = _id()
    site_id: Mapped[int] = _site()
    name: Mapped[str]
    certificate_sha256: Mapped[str] = mapped_column(unique=True)  # of the DER, hex
    enrolled_at: Mapped[datetime] = _now()
    last_heartbeat_at: Mapped[datetime | None]
    heartbeat: Mapped[dict[str, Any] | None]
    clock_offset_ms: Mapped[int | None]  # gateway minus centre


class Account(Row):
    """A person who signs in."""

    __tablename__ = "account"

    id: Mapped[int] = _id()
    site_id: Mapped[int] = _site()
    username: Mapped[str] = mapped_column(unique=True)
    display_name: Mapped[str]
    role: Mapped[Role]
    password_hash: Mapped[str]  # argon2id
    failed_logins: Mapped[int] = mapped_column(server_default="0")
    locked_until: Mapped[datetime | None]
    signing_identity: Mapped[str | None]  # name of the PKCS#12 file or token label


class ReaderGrant(Row):
    """Which site's cases of which specialty a reader may read; the worklist joins it."""

    __tablename__ = "reader_grant"
    __table_args__ = (sa.UniqueConstraint("account_id", "site_id", "specialty"),)

    id: Mapped[int] = _id()
    site_id: Mapped[int] = _site()
    account_id: Mapped[int] = mapped_column(sa.ForeignKey("account.id"))
    specialty: Mapped[str]


class WebSession(Row):
    """A sign-in. Only the token's digest is kept."""

    __tablename__ = "web_session"

    token_sha256: Mapped[bytes] = mapped_column(primary_key=True)
    site_id: Mapped[int] = _site()
    account_id: Mapped[int] = mapped_column(sa.ForeignKey("account.id"))
    csrf_token: Mapped[str]
    created_at: Mapped[datetime] = _now()
    expires_at: Mapped[datetime]


class Study(Row):
    """One study of one patient of one site. Text is decoded to Unicode; the original bytes rest in the packs."""

    __tablename__ = "study"
    __table_args__ = (
        # One Study UID with two patients is two rows, both HELD (design §4.8): so the patient is part of the key.
        sa.UniqueConstraint("site_id", "study_instance_uid", "patient_key", "patient_sha256"),
        sa.Index("ix_study_site_received", "site_id", "first_received_at"),
        sa.Index("ix_study_receiving", "last_arrived_at", postgresql_where=sa.text("state = 'receiving'")),
    )

    id: Mapped[int] = _id()
    site_id: Mapped[int] = _site()
    study_instance_uid: Mapped[str]
    patient_key: Mapped[str]  # PatientID and issuer as compared: trimmed, case kept; see storage/archive.py
    patient_sha256: Mapped[bytes] = mapped_column(server_default=sa.text("''::bytea"))  # name, birth date, sex as sent
    patient_id: Mapped[str]
    issuer_of_patient_id: Mapped[str]
    patient_name: Mapped[str]
    patient_birth_date: Mapped[str]
    patient_sex: Mapped[str]
    patient_age: Mapped[str]
    accession_number: Mapped[str]
    study_date: Mapped[str]
    study_time: Mapped[str]
    study_description: Mapped[str]
    specific_character_set: Mapped[str]  # as sent; reports go home in it
    repaired_character_set: Mapped[str]
    calling_ae_title: Mapped[str] = mapped_column(server_default="")  # who sent it to the gateway; rules ask for it
    modalities: Mapped[list[str]] = mapped_column(server_default="{}")
    body_part_examined: Mapped[str] = mapped_column(server_default="")
    priority: Mapped[Priority]
    clinical_question: Mapped[str] = mapped_column(server_default="")
    acquired_at: Mapped[datetime | None]  # modality's clock
    first_received_at: Mapped[datetime]  # gateway's clock: the reading clock starts here
    first_arrived_at: Mapped[datetime] = _now()
    last_arrived_at: Mapped[datetime] = _now()
    state: Mapped[StudyState]
    series_count: Mapped[int] = mapped_column(server_default="0")
    instance_count: Mapped[int] = mapped_column(server_default="0")
    size_bytes: Mapped[int] = mapped_column(sa.BigInteger, server_default="0")
    expected_count: Mapped[int | None]  # instances in the newest inventory
    has_variants: Mapped[bool] = mapped_column(
        server_default=sa.false()
    )  # a SOP Instance UID of it has other bytes too
    event_count: Mapped[int] = mapped_column(server_default="0")
    event_head: Mapped[bytes] = mapped_column(server_default=sa.text("''::bytea"))  # newest event's hash


class Series(Row):
    """One series of a study."""

    __tablename__ = "series"
    __table_args__ = (sa.UniqueConstraint("study_id", "series_instance_uid"),)

    id: Mapped[int] = _id()
    site_id: Mapped[int] = _site()
    study_id: Mapped[int] = mapped_column(sa.ForeignKey("study.id"))
    series_instance_uid: Mapped[str]
    modality: Mapped[str]
    series_number: Mapped[int | None]
    series_description: Mapped[str]
    series_date: Mapped[str]
    series_time: Mapped[str]
    body_part_examined: Mapped[str]
    instance_count: Mapped[int] = mapped_column(server_default="0")


class Pack(Row):
    """One archived object: some instances of one study, and the sidecar made of them."""

    __tablename__ = "pack"

    id: Mapped[int] = _id()
    site_id: Mapped[int] = _site()
    study_id: Mapped[int] = mapped_column(sa.ForeignKey("study.id"), index=True)
    pack_key: Mapped[str] = mapped_column(unique=True)  # object key
    sidecar_key: Mapped[str]  # zstd JSON: DICOM JSON metadata and frame extents of each instance
    size_bytes: Mapped[int] = mapped_column(sa.BigInteger)
    sha256: Mapped[bytes]
    archived_at: Mapped[datetime] = _now()


class Instance(Row):
    """One SOP instance: where its bytes lie. A study's variants of a SOP Instance UID stand beside the first and are
    not read; the same UID in another study of the site is that study's first (both studies say `has_variants`)."""

    __tablename__ = "instance"
    __table_args__ = (
        sa.UniqueConstraint("site_id", "sop_instance_uid", "sha256"),
        # In a study only one set of bytes is *the* instance; others are variants that a person looks at (design §4.8).
        sa.Index(
            "uq_instance_first", "study_id", "sop_instance_uid", unique=True, postgresql_where=sa.text("NOT is_variant")
        ),
        sa.Index("ix_instance_series", "series_id", "instance_number"),
    )

    id: Mapped[int] = _id()
    site_id: Mapped[int] = _site()
    study_id: Mapped[int] = mapped_column(sa.ForeignKey("study.id"), index=True)
    series_id: Mapped[int] = mapped_column(sa.ForeignKey("series.id"))
    pack_id: Mapped[int] = mapped_column(sa.ForeignKey("pack.id"), index=True)
    sop_instance_uid: Mapped[str]
    sop_class_uid: Mapped[str]
    transfer_syntax_uid: Mapped[str]
    instance_number: Mapped[int | None]
    number_of_frames: Mapped[int] = mapped_column(server_default="0")
    sha256: Mapped[bytes]
    header_sha256: Mapped[bytes]
    pixel_sha256: Mapped[bytes]
    size_bytes: Mapped[int] = mapped_column(sa.BigInteger)
    pack_offset: Mapped[int] = mapped_column(sa.BigInteger)
    pack_length: Mapped[int] = mapped_column(sa.BigInteger)
    codec: Mapped[Codec]
    codec_version: Mapped[int]
    is_variant: Mapped[bool] = mapped_column(server_default=sa.false())
    received_at: Mapped[datetime]  # gateway's clock
    archived_at: Mapped[datetime] = _now()


class Upload(Row):
    """One pack on its way: offered, PUT, then receipted or rejected."""

    __tablename__ = "upload"
    __table_args__ = (sa.UniqueConstraint("site_id", "pack_id"),)

    id: Mapped[int] = _id()
    site_id: Mapped[int] = _site()
    study_id: Mapped[int] = mapped_column(sa.ForeignKey("study.id"), index=True)
    gateway_id: Mapped[int] = mapped_column(sa.ForeignKey("gateway.id"))
    pack_id: Mapped[str]  # the gateway's name for it
    staging_key: Mapped[str]
    plan: Mapped[dict[str, Any]]  # PackPlan
    state: Mapped[UploadState]
    attempts: Mapped[int] = mapped_column(server_default="1")
    receipt: Mapped[dict[str, Any] | None]
    offered_at: Mapped[datetime] = _now()


class StudyInventory(Row):
    """What the gateway says the study consists of: the completeness signal. The newest one stands."""

    __tablename__ = "study_inventory"

    study_id: Mapped[int] = mapped_column(sa.ForeignKey("study.id"), primary_key=True)
    site_id: Mapped[int] = _site()
    instances: Mapped[dict[str, Any]]  # {SOP Instance UID + "/" + sha256 hex: 1}
    received_at: Mapped[datetime] = _now()


class Case(Row):
    """The reading of one study: a place in a specialty's queue."""

    __tablename__ = "reading_case"
    __table_args__ = (
        # A study is read once at a time; the worklist asks only for open cases, in this order (design §7).
        sa.Index("uq_reading_case_study", "study_id", unique=True),
        sa.Index(
            "ix_reading_case_open",
            "specialty",
            "tier",
            "due_at",
            "id",
            postgresql_where=sa.text("state IN ('queued', 'claimed')"),
        ),
        sa.Index("ix_reading_case_lease", "lease_expires_at", postgresql_where=sa.text("state = 'claimed'")),
        sa.Index("ix_reading_case_triage", "triage_deadline", postgresql_where=sa.text("triage = 'pending'")),
    )

    id: Mapped[int] = _id()
    site_id: Mapped[int] = _site(index=True)
    study_id: Mapped[int] = mapped_column(sa.ForeignKey("study.id"))
    state: Mapped[CaseState]
    specialty: Mapped[str]
    priority: Mapped[Priority]
    tier: Mapped[int]  # 0 stands before everything; see routing/priority.py
    clock_started_at: Mapped[datetime]  # receipt at the gateway, corrected to the centre's clock
    contract_due_at: Mapped[datetime]  # what the rule promises
    due_at: Mapped[datetime]  # what orders the worklist: never later than contract_due_at
    due_reasons: Mapped[list[dict[str, Any]]] = mapped_column(JSONB, server_default=sa.text("'[]'::jsonb"))
    rule_name: Mapped[str]
    rules_version: Mapped[str]  # digest of the rules file
    triage: Mapped[TriageState]
    triage_deadline: Mapped[datetime | None]
    claimed_by: Mapped[int | None] = mapped_column(sa.ForeignKey("account.id"))
    lease_token: Mapped[str | None]  # names this claim: a heartbeat of an older claim changes nothing
    lease_expires_at: Mapped[datetime | None]
    new_images: Mapped[bool] = mapped_column(server_default=sa.false())  # arrived after claim or signature
    queued_at: Mapped[datetime] = _now()


class TriageRun(Row):
    """One run of one model on one study; what it found, and what it was."""

    __tablename__ = "triage_run"
    __table_args__ = (sa.UniqueConstraint("case_id", "model_name", "model_version", "study_version"),)

    id: Mapped[int] = _id()
    site_id: Mapped[int] = _site()
    study_id: Mapped[int] = mapped_column(sa.ForeignKey("study.id"), index=True)
    case_id: Mapped[int] = mapped_column(sa.ForeignKey("reading_case.id"), index=True)
    study_version: Mapped[int]  # instance count the run was asked for: a grown study is asked about again
    model_name: Mapped[str]
    model_version: Mapped[str]
    model_sha256: Mapped[str]
    mode: Mapped[RunMode]
    state: Mapped[RunState]
    reason: Mapped[str] = mapped_column(server_default="")  # why unsuitable or failed
    findings: Mapped[list[dict[str, Any]]] = mapped_column(JSONB, server_default=sa.text("'[]'::jsonb"))
    input_uids: Mapped[list[str]] = mapped_column(server_default="{}")
    sr_key: Mapped[str | None]  # object key of the DICOM SR (TID 1500)
    heat_map_key: Mapped[str | None]  # object key of the heat map, DICOM Secondary Capture
    inference_ms: Mapped[int | None]
    asked_at: Mapped[datetime] = _now()


class Report(Row):
    """One version of the report of a case."""

    __tablename__ = "report"
    __table_args__ = (
        sa.UniqueConstraint("case_id", "version"),
        # One draft at a time: two tabs write the same draft, revision checked.
        sa.Index("uq_report_draft", "case_id", unique=True, postgresql_where=sa.text("state = 'draft'")),
    )

    id: Mapped[int] = _id()
    site_id: Mapped[int] = _site(index=True)
    study_id: Mapped[int] = mapped_column(sa.ForeignKey("study.id"), index=True)
    case_id: Mapped[int] = mapped_column(sa.ForeignKey("reading_case.id"))
    version: Mapped[int]
    state: Mapped[ReportState]
    author_id: Mapped[int] = mapped_column(sa.ForeignKey("account.id"))
    revision: Mapped[int] = mapped_column(server_default="0")
    findings: Mapped[str] = mapped_column(server_default="")
    impression: Mapped[str] = mapped_column(server_default="")
    conclusion: Mapped[Conclusion | None]
    language: Mapped[str] = mapped_column(server_default="zh")
    updated_at: Mapped[datetime] = _now()
    signed_at: Mapped[datetime | None]
    pdf_key: Mapped[str | None]
    pdf_sha256: Mapped[bytes | None]
    encapsulated_key: Mapped[str | None]
    encapsulated_sha256: Mapped[bytes | None]
    sr_key: Mapped[str | None]
    sr_sha256: Mapped[bytes | None]
    opened_at: Mapped[datetime | None]  # first opened by a person at the county
    opened_by: Mapped[int | None] = mapped_column(sa.ForeignKey("account.id"))


class DraftVersion(Row):
    """Earlier texts of a draft: a reader never loses a sentence."""

    __tablename__ = "draft_version"
    __table_args__ = (sa.UniqueConstraint("report_id", "revision"),)

    id: Mapped[int] = _id()
    site_id: Mapped[int] = _site()
    report_id: Mapped[int] = mapped_column(sa.ForeignKey("report.id"))
    revision: Mapped[int]
    author_id: Mapped[int] = mapped_column(sa.ForeignKey("account.id"))
    text: Mapped[dict[str, Any]]
    saved_at: Mapped[datetime] = _now()


class FeedEntry(Row):
    """A signed report on its county's feed; `id` is the cursor."""

    __tablename__ = "feed_entry"
    __table_args__ = (sa.Index("ix_feed_entry_site", "site_id", "id"),)

    id: Mapped[int] = _id()
    site_id: Mapped[int] = _site()
    report_id: Mapped[int] = mapped_column(sa.ForeignKey("report.id"), unique=True)
    entered_at: Mapped[datetime] = _now()


class Event(Row):
    """What happened: the audit trail and the only source of times. Append only; a study's events form a hash chain."""

    __tablename__ = "event"
    __table_args__ = (
        sa.UniqueConstraint("study_id", "sequence"),
        sa.Index("ix_event_name_at", "name", "at"),
    )

    id: Mapped[int] = _id()
    site_id: Mapped[int] = _site()
    study_id: Mapped[int | None] = mapped_column(sa.ForeignKey("study.id"))  # None: sign-in, enrolment
    sequence: Mapped[int | None]  # 1, 2, … in the study
    name: Mapped[str]
    subject: Mapped[str]  # table the event is about
    subject_id: Mapped[int] = mapped_column(sa.BigInteger)
    from_state: Mapped[str | None]
    to_state: Mapped[str | None]
    actor: Mapped[str]  # "account:7", "gateway:3", "system"
    at: Mapped[datetime]
    details: Mapped[dict[str, Any]] = mapped_column(server_default=sa.text("'{}'::jsonb"))
    hash: Mapped[bytes]


class Job(Row):
    """Work to be done once: outbox, idempotence and poison counter in one row (storage/jobs.py)."""

    __tablename__ = "job"
    __table_args__ = (
        sa.Index(
            "ix_job_open",
            "run_after",
            postgresql_where=sa.text("finished_at IS NULL AND parked_at IS NULL"),
        ),
    )

    id: Mapped[int] = _id()
    site_id: Mapped[int] = _site()
    queue: Mapped[str]
    actor: Mapped[str]
    subject_id: Mapped[int] = mapped_column(sa.BigInteger)
    run_after: Mapped[datetime] = _now()
    created_at: Mapped[datetime] = _now()
    published_at: Mapped[datetime | None]
    starts: Mapped[int] = mapped_column(server_default="0")
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    parked_at: Mapped[datetime | None]  # after three starts: a person looks
    error: Mapped[str] = mapped_column(server_default="")


OPEN_CASE_STATES = (CaseState.QUEUED, CaseState.CLAIMED)
