"""Rows for one kept data set, in the caller's transaction: its study as one patient's, the instance, word of a variant.

Used when an instance arrives, and again when the database is built from the files (dicom_gateway/sweep.py).
"""

import hashlib
import sqlite3
from enum import StrEnum

from dicom_gateway.quarantine import note_quarantine
from storage.patients import same_patient
from storage.vocabulary import Lane, Priority
from storage.wire import InstanceFacts, Message, StudyFacts

LANE_OF = {Priority.STAT: Lane.STAT, Priority.URGENT: Lane.URGENT, Priority.ROUTINE: Lane.ROUTINE}
_LANE_RANK = {lane: rank for rank, lane in enumerate(Lane)}


class StoreOutcome(StrEnum):
    """What became of one C-STORE that is answered with Success."""

    STORED = "stored"
    ALREADY_STORED = "already_stored"  # the same bytes, or the same content in another encoding: nothing to add
    VARIANT = "variant"  # the UID is known with other content: stored beside the first, a person is told


class KeptFacts(Message):
    """All that the rows of one instance are made of, as kept beside its bytes: the database can be built from it."""

    study: StudyFacts
    instance: InstanceFacts


def enrol(connection: sqlite3.Connection, kept: KeptFacts, quiet_s: float) -> StoreOutcome:
    """Write the rows of an instance that has none. The study is open again, its inventory due in `quiet_s`."""
    study, instance = kept.study, kept.instance
    study_id = _study_row(connection, study, instance.received_at.timestamp(), quiet_s)
    others = connection.execute(
        "SELECT count(*) FROM instance WHERE sop_instance_uid = ?", (instance.sop_instance_uid,)
    ).fetchone()[0]
    connection.execute(
        "INSERT INTO instance (study_id, sop_instance_uid, sha256, series_instance_uid, size_bytes, facts, variant,"
        " received_at_s) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (
            study_id,
            instance.sop_instance_uid,
            instance.sha256,
            instance.series_instance_uid,
            instance.size_bytes,
            instance.model_dump_json(),
            int(others > 0),
            instance.received_at.timestamp(),
        ),
    )
    if not others:
        return StoreOutcome.STORED
    note_quarantine(
        connection,
        kind="variant",
        subject=instance.sop_instance_uid,
        reason="The same SOP Instance UID came again with other content; both are kept",
        sha256=instance.sha256,
        size_bytes=instance.size_bytes,
        calling_ae_title=study.calling_ae_title,
    )
    return StoreOutcome.VARIANT


def _study_row(connection: sqlite3.Connection, study: StudyFacts, received_at_s: float, quiet_s: float) -> int:
    """The study's row, new or open again. Two patients under one Study Instance UID are two rows."""
    key = _patient_key(study)
    rows = connection.execute(
        "SELECT id, patient_key, facts FROM study WHERE study_instance_uid = ? ORDER BY id", (study.study_instance_uid,)
    ).fetchall()
    found = [row["id"] for row in rows if row["patient_key"] == key] or [
        row["id"] for row in rows if same_patient(StudyFacts.model_validate_json(row["facts"]), study)
    ]
    if found:
        connection.execute(
            "UPDATE study SET complete_at = NULL, inventory_tries = 0, inventory_due_at_s = ?,"
            " last_received_at_s = max(last_received_at_s, ?) WHERE id = ?",
            (received_at_s + quiet_s, received_at_s, found[0]),
        )
        return int(found[0])
    lane = LANE_OF[study.priority]
    inserted = connection.execute(
        "INSERT INTO study (study_instance_uid, patient_key, facts, lane, lane_rank, first_received_at,"
        " last_received_at_s, inventory_due_at_s) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (
            study.study_instance_uid,
            key,
            study.model_dump_json(),
            lane,
            _LANE_RANK[lane],
            study.first_received_at.isoformat(),
            received_at_s,
            received_at_s + quiet_s,
        ),
    )
    return int(inserted.lastrowid or 0)


def _patient_key(study: StudyFacts) -> str:
    """All that is said of the patient, exactly, as one short string."""
    said = (
        study.patient_id, study.issuer_of_patient_id, study.patient_name, study.patient_birth_date, study.patient_sex,
    )  # fmt: skip
    return hashlib.sha256("\0".join(said).encode()).hexdigest()
