"""The first schema: every table has site_id, row-level security denies by default, the application role owns nothing.

The application role is `yuanzhen_app`; it must exist (deploy makes it). Scope of a transaction: `app.site` is 'all'
for the centre, a site's number for a county, and unset means no row at all.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_ENUMS = {
    "case_state": (
        "queued",
        "claimed",
        "reported",
        "suspended",
    ),
    "codec": ("raw",),
    "conclusion": (
        "negative",
        "positive",
        "critical",
    ),
    "priority": (
        "stat",
        "urgent",
        "routine",
    ),
    "report_state": (
        "draft",
        "signed",
        "received",
        "delivered",
        "superseded",
    ),
    "role": (
        "radiographer",
        "clinician",
        "reader",
        "quality",
        "administrator",
    ),
    "run_mode": (
        "active",
        "shadow",
    ),
    "run_state": (
        "pending",
        "done",
        "unsuitable",
        "failed",
    ),
    "study_state": (
        "receiving",
        "complete",
        "held",
    ),
    "triage_state": (
        "pending",
        "done",
        "no_model",
        "not_for_model",
        "not_triaged",
    ),
    "upload_state": (
        "offered",
        "receipted",
        "rejected",
    ),
}

_TABLES = (
    "site",
    "account",
    "gateway",
    "job",
    "study",
    "event",
    "pack",
    "reader_grant",
    "reading_case",
    "series",
    "study_inventory",
    "upload",
    "web_session",
    "instance",
    "report",
    "triage_run",
    "draft_version",
    "feed_entry",
)

_APPEND_ONLY = ("event", "draft_version")
_SCOPE = (
    "(SELECT current_setting('app.site', true)) = 'all' OR "
    "site_id = (SELECT nullif(nullif(current_setting('app.site', true), ''), 'all')::int)"
)


def upgrade() -> None:
    for name, values in _ENUMS.items():
        postgresql.ENUM(*values, name=name).create(op.get_bind())
    op.create_table(
        "site",
        sa.Column("site_id", sa.Integer(), sa.Identity(always=False), nullable=False),
        sa.Column("code", sa.Text(), nullable=False),
        sa.Column("name_zh", sa.Text(), nullable=False),
        sa.Column("name_en", sa.Text(), nullable=False),
        sa.Column("is_centre", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("enabled_models", postgresql.ARRAY(sa.Text()), server_default="{}", nullable=False),
        sa.PrimaryKeyConstraint("site_id", name=op.f("pk_site")),
        sa.UniqueConstraint("code", name=op.f("uq_site_code")),
    )
    op.create_table(
        "account",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("site_id", sa.Integer(), nullable=False),
        sa.Column("username", sa.Text(), nullable=False),
        sa.Column("display_name", sa.Text(), nullable=False),
        sa.Column("role", postgresql.ENUM(name="role", create_type=False), nullable=False),
        sa.Column("password_hash", sa.Text(), nullable=False),
        sa.Column("failed_logins", sa.Integer(), server_default="0", nullable=False),
        sa.Column("locked_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("signing_identity", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["site_id"], ["site.site_id"], name=op.f("fk_account_site_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_account")),
        sa.UniqueConstraint("username", name=op.f("uq_account_username")),
    )
    op.create_table(
        "gateway",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("site_id", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("certificate_sha256", sa.Text(), nullable=False),
        sa.Column(
            "enrolled_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("last_heartbeat_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("heartbeat", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("clock_offset_ms", sa.Integer(), nullable=True),
        sa.ForeignKeyConstraint(["site_id"], ["site.site_id"], name=op.f("fk_gateway_site_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_gateway")),
        sa.UniqueConstraint("certificate_sha256", name=op.f("uq_gateway_certificate_sha256")),
    )
    op.create_table(
        "job",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("site_id", sa.Integer(), nullable=False),
        sa.Column("queue", sa.Text(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("subject_id", sa.BigInteger(), nullable=False),
        sa.Column("run_after", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("published_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("starts", sa.Integer(), server_default="0", nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("parked_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("error", sa.Text(), server_default="", nullable=False),
        sa.ForeignKeyConstraint(["site_id"], ["site.site_id"], name=op.f("fk_job_site_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_job")),
    )
    op.create_index(
        "ix_job_open",
        "job",
        ["run_after"],
        unique=False,
        postgresql_where=sa.text("finished_at IS NULL AND parked_at IS NULL"),
    )
    op.create_table(
        "study",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("site_id", sa.Integer(), nullable=False),
        sa.Column("study_instance_uid", sa.Text(), nullable=False),
        sa.Column("patient_key", sa.Text(), nullable=False),
        sa.Column("patient_sha256", postgresql.BYTEA(), server_default=sa.text("''::bytea"), nullable=False),
        sa.Column("patient_id", sa.Text(), nullable=False),
        sa.Column("issuer_of_patient_id", sa.Text(), nullable=False),
        sa.Column("patient_name", sa.Text(), nullable=False),
        sa.Column("patient_birth_date", sa.Text(), nullable=False),
        sa.Column("patient_sex", sa.Text(), nullable=False),
        sa.Column("patient_age", sa.Text(), nullable=False),
        sa.Column("accession_number", sa.Text(), nullable=False),
        sa.Column("study_date", sa.Text(), nullable=False),
        sa.Column("study_time", sa.Text(), nullable=False),
        sa.Column("study_description", sa.Text(), nullable=False),
        sa.Column("specific_character_set", sa.Text(), nullable=False),
        sa.Column("repaired_character_set", sa.Text(), nullable=False),
        sa.Column("calling_ae_title", sa.Text(), server_default="", nullable=False),
        sa.Column("modalities", postgresql.ARRAY(sa.Text()), server_default="{}", nullable=False),
        sa.Column("body_part_examined", sa.Text(), server_default="", nullable=False),
        sa.Column("priority", postgresql.ENUM(name="priority", create_type=False), nullable=False),
        sa.Column("clinical_question", sa.Text(), server_default="", nullable=False),
        sa.Column("acquired_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("first_received_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column(
            "first_arrived_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column(
            "last_arrived_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("state", postgresql.ENUM(name="study_state", create_type=False), nullable=False),
        sa.Column("series_count", sa.Integer(), server_default="0", nullable=False),
        sa.Column("instance_count", sa.Integer(), server_default="0", nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("expected_count", sa.Integer(), nullable=True),
        sa.Column("has_variants", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("event_count", sa.Integer(), server_default="0", nullable=False),
        sa.Column("event_head", postgresql.BYTEA(), server_default=sa.text("''::bytea"), nullable=False),
        sa.ForeignKeyConstraint(["site_id"], ["site.site_id"], name=op.f("fk_study_site_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_study")),
        sa.UniqueConstraint(
            "site_id",
            "study_instance_uid",
            "patient_key",
            "patient_sha256",
            name=op.f("uq_study_site_id_study_instance_uid_patient_key_patient_sha256"),
        ),
    )
    op.create_index(
        "ix_study_receiving",
        "study",
        ["last_arrived_at"],
        unique=False,
        postgresql_where=sa.text("state = 'receiving'"),
    )
    op.create_index("ix_study_site_received", "study", ["site_id", "first_received_at"], unique=False)
    op.create_table(
        "event",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("site_id", sa.Integer(), nullable=False),
        sa.Column("study_id", sa.BigInteger(), nullable=True),
        sa.Column("sequence", sa.Integer(), nullable=True),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("subject_id", sa.BigInteger(), nullable=False),
        sa.Column("from_state", sa.Text(), nullable=True),
        sa.Column("to_state", sa.Text(), nullable=True),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column(
            "details", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'{}'::jsonb"), nullable=False
        ),
        sa.Column("hash", postgresql.BYTEA(), nullable=False),
        sa.ForeignKeyConstraint(["site_id"], ["site.site_id"], name=op.f("fk_event_site_id")),
        sa.ForeignKeyConstraint(["study_id"], ["study.id"], name=op.f("fk_event_study_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_event")),
        sa.UniqueConstraint("study_id", "sequence", name=op.f("uq_event_study_id_sequence")),
    )
    op.create_index("ix_event_name_at", "event", ["name", "at"], unique=False)
    op.create_table(
        "pack",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("site_id", sa.Integer(), nullable=False),
        sa.Column("study_id", sa.BigInteger(), nullable=False),
        sa.Column("pack_key", sa.Text(), nullable=False),
        sa.Column("sidecar_key", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", postgresql.BYTEA(), nullable=False),
        sa.Column(
            "archived_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.ForeignKeyConstraint(["site_id"], ["site.site_id"], name=op.f("fk_pack_site_id")),
        sa.ForeignKeyConstraint(["study_id"], ["study.id"], name=op.f("fk_pack_study_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_pack")),
        sa.UniqueConstraint("pack_key", name=op.f("uq_pack_pack_key")),
    )
    op.create_index(op.f("ix_pack_study_id"), "pack", ["study_id"], unique=False)
    op.create_table(
        "reader_grant",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("site_id", sa.Integer(), nullable=False),
        sa.Column("account_id", sa.BigInteger(), nullable=False),
        sa.Column("specialty", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["account_id"], ["account.id"], name=op.f("fk_reader_grant_account_id")),
        sa.ForeignKeyConstraint(["site_id"], ["site.site_id"], name=op.f("fk_reader_grant_site_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_reader_grant")),
        sa.UniqueConstraint(
            "account_id", "site_id", "specialty", name=op.f("uq_reader_grant_account_id_site_id_specialty")
        ),
    )
    op.create_table(
        "reading_case",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("site_id", sa.Integer(), nullable=False),
        sa.Column("study_id", sa.BigInteger(), nullable=False),
        sa.Column("state", postgresql.ENUM(name="case_state", create_type=False), nullable=False),
        sa.Column("specialty", sa.Text(), nullable=False),
        sa.Column("priority", postgresql.ENUM(name="priority", create_type=False), nullable=False),
        sa.Column("tier", sa.Integer(), nullable=False),
        sa.Column("clock_started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("contract_due_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("due_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column(
            "due_reasons",
            postgresql.JSONB(astext_type=sa.Text()),
            server_default=sa.text("'[]'::jsonb"),
            nullable=False,
        ),
        sa.Column("rule_name", sa.Text(), nullable=False),
        sa.Column("rules_version", sa.Text(), nullable=False),
        sa.Column("triage", postgresql.ENUM(name="triage_state", create_type=False), nullable=False),
        sa.Column("triage_deadline", sa.DateTime(timezone=True), nullable=True),
        sa.Column("claimed_by", sa.BigInteger(), nullable=True),
        sa.Column("lease_token", sa.Text(), nullable=True),
        sa.Column("lease_expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("new_images", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("queued_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.ForeignKeyConstraint(["claimed_by"], ["account.id"], name=op.f("fk_reading_case_claimed_by")),
        sa.ForeignKeyConstraint(["site_id"], ["site.site_id"], name=op.f("fk_reading_case_site_id")),
        sa.ForeignKeyConstraint(["study_id"], ["study.id"], name=op.f("fk_reading_case_study_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_reading_case")),
    )
    op.create_index(
        "ix_reading_case_lease",
        "reading_case",
        ["lease_expires_at"],
        unique=False,
        postgresql_where=sa.text("state = 'claimed'"),
    )
    op.create_index(
        "ix_reading_case_open",
        "reading_case",
        ["specialty", "tier", "due_at", "id"],
        unique=False,
        postgresql_where=sa.text("state IN ('queued', 'claimed')"),
    )
    op.create_index(op.f("ix_reading_case_site_id"), "reading_case", ["site_id"], unique=False)
    op.create_index(
        "ix_reading_case_triage",
        "reading_case",
        ["triage_deadline"],
        unique=False,
        postgresql_where=sa.text("triage = 'pending'"),
    )
    op.create_index("uq_reading_case_study", "reading_case", ["study_id"], unique=True)
    op.create_table(
        "series",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("site_id", sa.Integer(), nullable=False),
        sa.Column("study_id", sa.BigInteger(), nullable=False),
        sa.Column("series_instance_uid", sa.Text(), nullable=False),
        sa.Column("modality", sa.Text(), nullable=False),
        sa.Column("series_number", sa.Integer(), nullable=True),
        sa.Column("series_description", sa.Text(), nullable=False),
        sa.Column("series_date", sa.Text(), nullable=False),
        sa.Column("series_time", sa.Text(), nullable=False),
        sa.Column("body_part_examined", sa.Text(), nullable=False),
        sa.Column("instance_count", sa.Integer(), server_default="0", nullable=False),
        sa.ForeignKeyConstraint(["site_id"], ["site.site_id"], name=op.f("fk_series_site_id")),
        sa.ForeignKeyConstraint(["study_id"], ["study.id"], name=op.f("fk_series_study_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_series")),
        sa.UniqueConstraint("study_id", "series_instance_uid", name=op.f("uq_series_study_id_series_instance_uid")),
    )
    op.create_table(
        "study_inventory",
        sa.Column("study_id", sa.BigInteger(), nullable=False),
        sa.Column("site_id", sa.Integer(), nullable=False),
        sa.Column("instances", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column(
            "received_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.ForeignKeyConstraint(["site_id"], ["site.site_id"], name=op.f("fk_study_inventory_site_id")),
        sa.ForeignKeyConstraint(["study_id"], ["study.id"], name=op.f("fk_study_inventory_study_id")),
        sa.PrimaryKeyConstraint("study_id", name=op.f("pk_study_inventory")),
    )
    op.create_table(
        "upload",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("site_id", sa.Integer(), nullable=False),
        sa.Column("study_id", sa.BigInteger(), nullable=False),
        sa.Column("gateway_id", sa.BigInteger(), nullable=False),
        sa.Column("pack_id", sa.Text(), nullable=False),
        sa.Column("staging_key", sa.Text(), nullable=False),
        sa.Column("plan", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("state", postgresql.ENUM(name="upload_state", create_type=False), nullable=False),
        sa.Column("attempts", sa.Integer(), server_default="1", nullable=False),
        sa.Column("receipt", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column(
            "offered_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.ForeignKeyConstraint(["gateway_id"], ["gateway.id"], name=op.f("fk_upload_gateway_id")),
        sa.ForeignKeyConstraint(["site_id"], ["site.site_id"], name=op.f("fk_upload_site_id")),
        sa.ForeignKeyConstraint(["study_id"], ["study.id"], name=op.f("fk_upload_study_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_upload")),
        sa.UniqueConstraint("site_id", "pack_id", name=op.f("uq_upload_site_id_pack_id")),
    )
    op.create_index(op.f("ix_upload_study_id"), "upload", ["study_id"], unique=False)
    op.create_table(
        "web_session",
        sa.Column("token_sha256", postgresql.BYTEA(), nullable=False),
        sa.Column("site_id", sa.Integer(), nullable=False),
        sa.Column("account_id", sa.BigInteger(), nullable=False),
        sa.Column("csrf_token", sa.Text(), nullable=False),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["account_id"], ["account.id"], name=op.f("fk_web_session_account_id")),
        sa.ForeignKeyConstraint(["site_id"], ["site.site_id"], name=op.f("fk_web_session_site_id")),
        sa.PrimaryKeyConstraint("token_sha256", name=op.f("pk_web_session")),
    )
    op.create_table(
        "instance",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("site_id", sa.Integer(), nullable=False),
        sa.Column("study_id", sa.BigInteger(), nullable=False),
        sa.Column("series_id", sa.BigInteger(), nullable=False),
        sa.Column("pack_id", sa.BigInteger(), nullable=False),
        sa.Column("sop_instance_uid", sa.Text(), nullable=False),
        sa.Column("sop_class_uid", sa.Text(), nullable=False),
        sa.Column("transfer_syntax_uid", sa.Text(), nullable=False),
        sa.Column("instance_number", sa.Integer(), nullable=True),
        sa.Column("number_of_frames", sa.Integer(), server_default="0", nullable=False),
        sa.Column("sha256", postgresql.BYTEA(), nullable=False),
        sa.Column("header_sha256", postgresql.BYTEA(), nullable=False),
        sa.Column("pixel_sha256", postgresql.BYTEA(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("pack_offset", sa.BigInteger(), nullable=False),
        sa.Column("pack_length", sa.BigInteger(), nullable=False),
        sa.Column("codec", postgresql.ENUM(name="codec", create_type=False), nullable=False),
        sa.Column("codec_version", sa.Integer(), nullable=False),
        sa.Column("is_variant", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("received_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column(
            "archived_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.ForeignKeyConstraint(["pack_id"], ["pack.id"], name=op.f("fk_instance_pack_id")),
        sa.ForeignKeyConstraint(["series_id"], ["series.id"], name=op.f("fk_instance_series_id")),
        sa.ForeignKeyConstraint(["site_id"], ["site.site_id"], name=op.f("fk_instance_site_id")),
        sa.ForeignKeyConstraint(["study_id"], ["study.id"], name=op.f("fk_instance_study_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_instance")),
        sa.UniqueConstraint(
            "site_id", "sop_instance_uid", "sha256", name=op.f("uq_instance_site_id_sop_instance_uid_sha256")
        ),
    )
    op.create_index(op.f("ix_instance_pack_id"), "instance", ["pack_id"], unique=False)
    op.create_index("ix_instance_series", "instance", ["series_id", "instance_number"], unique=False)
    op.create_index(op.f("ix_instance_study_id"), "instance", ["study_id"], unique=False)
    op.create_index(
        "uq_instance_first",
        "instance",
        ["study_id", "sop_instance_uid"],
        unique=True,
        postgresql_where=sa.text("NOT is_variant"),
    )
    op.create_table(
        "report",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("site_id", sa.Integer(), nullable=False),
        sa.Column("study_id", sa.BigInteger(), nullable=False),
        sa.Column("case_id", sa.BigInteger(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("state", postgresql.ENUM(name="report_state", create_type=False), nullable=False),
        sa.Column("author_id", sa.BigInteger(), nullable=False),
        sa.Column("revision", sa.Integer(), server_default="0", nullable=False),
        sa.Column("findings", sa.Text(), server_default="", nullable=False),
        sa.Column("impression", sa.Text(), server_default="", nullable=False),
        sa.Column("conclusion", postgresql.ENUM(name="conclusion", create_type=False), nullable=True),
        sa.Column("language", sa.Text(), server_default="zh", nullable=False),
        sa.Column(
            "updated_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("signed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("pdf_key", sa.Text(), nullable=True),
        sa.Column("pdf_sha256", postgresql.BYTEA(), nullable=True),
        sa.Column("encapsulated_key", sa.Text(), nullable=True),
        sa.Column("encapsulated_sha256", postgresql.BYTEA(), nullable=True),
        sa.Column("sr_key", sa.Text(), nullable=True),
        sa.Column("sr_sha256", postgresql.BYTEA(), nullable=True),
        sa.Column("opened_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("opened_by", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(["author_id"], ["account.id"], name=op.f("fk_report_author_id")),
        sa.ForeignKeyConstraint(["case_id"], ["reading_case.id"], name=op.f("fk_report_case_id")),
        sa.ForeignKeyConstraint(["opened_by"], ["account.id"], name=op.f("fk_report_opened_by")),
        sa.ForeignKeyConstraint(["site_id"], ["site.site_id"], name=op.f("fk_report_site_id")),
        sa.ForeignKeyConstraint(["study_id"], ["study.id"], name=op.f("fk_report_study_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_report")),
        sa.UniqueConstraint("case_id", "version", name=op.f("uq_report_case_id_version")),
    )
    op.create_index(op.f("ix_report_site_id"), "report", ["site_id"], unique=False)
    op.create_index(op.f("ix_report_study_id"), "report", ["study_id"], unique=False)
    op.create_index("uq_report_draft", "report", ["case_id"], unique=True, postgresql_where=sa.text("state = 'draft'"))
    op.create_table(
        "triage_run",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("site_id", sa.Integer(), nullable=False),
        sa.Column("study_id", sa.BigInteger(), nullable=False),
        sa.Column("case_id", sa.BigInteger(), nullable=False),
        sa.Column("study_version", sa.Integer(), nullable=False),
        sa.Column("model_name", sa.Text(), nullable=False),
        sa.Column("model_version", sa.Text(), nullable=False),
        sa.Column("model_sha256", sa.Text(), nullable=False),
        sa.Column("mode", postgresql.ENUM(name="run_mode", create_type=False), nullable=False),
        sa.Column("state", postgresql.ENUM(name="run_state", create_type=False), nullable=False),
        sa.Column("reason", sa.Text(), server_default="", nullable=False),
        sa.Column(
            "findings", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'[]'::jsonb"), nullable=False
        ),
        sa.Column("input_uids", postgresql.ARRAY(sa.Text()), server_default="{}", nullable=False),
        sa.Column("sr_key", sa.Text(), nullable=True),
        sa.Column("heat_map_key", sa.Text(), nullable=True),
        sa.Column("inference_ms", sa.Integer(), nullable=True),
        sa.Column("asked_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.ForeignKeyConstraint(["case_id"], ["reading_case.id"], name=op.f("fk_triage_run_case_id")),
        sa.ForeignKeyConstraint(["site_id"], ["site.site_id"], name=op.f("fk_triage_run_site_id")),
        sa.ForeignKeyConstraint(["study_id"], ["study.id"], name=op.f("fk_triage_run_study_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_triage_run")),
        sa.UniqueConstraint(
            "case_id",
            "model_name",
            "model_version",
            "study_version",
            name=op.f("uq_triage_run_case_id_model_name_model_version_study_version"),
        ),
    )
    op.create_index(op.f("ix_triage_run_case_id"), "triage_run", ["case_id"], unique=False)
    op.create_index(op.f("ix_triage_run_study_id"), "triage_run", ["study_id"], unique=False)
    op.create_table(
        "draft_version",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("site_id", sa.Integer(), nullable=False),
        sa.Column("report_id", sa.BigInteger(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("author_id", sa.BigInteger(), nullable=False),
        sa.Column("text", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("saved_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.ForeignKeyConstraint(["author_id"], ["account.id"], name=op.f("fk_draft_version_author_id")),
        sa.ForeignKeyConstraint(["report_id"], ["report.id"], name=op.f("fk_draft_version_report_id")),
        sa.ForeignKeyConstraint(["site_id"], ["site.site_id"], name=op.f("fk_draft_version_site_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_draft_version")),
        sa.UniqueConstraint("report_id", "revision", name=op.f("uq_draft_version_report_id_revision")),
    )
    op.create_table(
        "feed_entry",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("site_id", sa.Integer(), nullable=False),
        sa.Column("report_id", sa.BigInteger(), nullable=False),
        sa.Column(
            "entered_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.ForeignKeyConstraint(["report_id"], ["report.id"], name=op.f("fk_feed_entry_report_id")),
        sa.ForeignKeyConstraint(["site_id"], ["site.site_id"], name=op.f("fk_feed_entry_site_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_feed_entry")),
        sa.UniqueConstraint("report_id", name=op.f("uq_feed_entry_report_id")),
    )
    op.create_index("ix_feed_entry_site", "feed_entry", ["site_id", "id"], unique=False)
    for table in _TABLES:
        # Scalar subselects are evaluated once a query; without them the ordered index of the worklist is lost.
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
        op.execute(f"CREATE POLICY scope ON {table} USING ({_SCOPE}) WITH CHECK ({_SCOPE})")
        rights = "SELECT, INSERT" if table in _APPEND_ONLY else "SELECT, INSERT, UPDATE, DELETE"
        op.execute(f"GRANT {rights} ON {table} TO yuanzhen_app")
    op.execute("GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO yuanzhen_app")


def downgrade() -> None:
    raise NotImplementedError("Migrations go forward only: clinical rows are not dropped")
