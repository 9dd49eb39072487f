"""Studies, series, packs and instances as rows; and the way back from a row to the bytes that were received.

Whoever writes here holds the study's row (`transitions` lock order), so counts, series and the duplicate decisions of
one study are made one after another. What a pack's instances are (new, already stored, a variant) is decided by
`routing/commit.py`; here it is written down. Identity is (study, SOP Instance UID) and never crosses sites.
"""

import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import Session

from storage import sidecar, transitions
from storage.errors import DigestMismatchError, RetryableError
from storage.objects import Objects
from storage.packs import PackEntry
from storage.patients import same_patient
from storage.rows import Case, Instance, Pack, Series, Study, Upload
from storage.sidecar import InstanceSidecar
from storage.states import Transition
from storage.vocabulary import CaseState, Priority, StudyState, UploadState
from storage.wire import StudyFacts

IMPLEMENTATION_CLASS_UID = "2.25.231984462709117458120530174398513660471"
"""UUID-derived (PS3.5 B.2): names this software in the file meta information it writes."""
IMPLEMENTATION_VERSION_NAME = "YUANZHEN_1"
_URGENCY = tuple(Priority)  # most urgent first
_INSERT_ROWS = 500


class ChangedMeanwhileError(RetryableError):
    """Another commit stored one of these SOP Instance UIDs first: the decision has to be made again."""


def patient_key(patient_id: str, issuer_of_patient_id: str) -> str:
    """The patient as part of a study's key: PatientID, with the issuer where there is one; case is kept."""
    identifier, issuer = clean(patient_id).strip(), clean(issuer_of_patient_id).strip()
    return f"{identifier}^^^{issuer}" if issuer else identifier


def clean(text: str) -> str:
    """Without NUL, which PostgreSQL text cannot hold."""
    return text.replace("\0", "")


def studies_of(session: Session, site_id: int, study_instance_uid: str, *, lock: bool = False) -> Sequence[Study]:
    """The site's rows of one Study Instance UID: one, or one for each patient that claims it. Locked in id order."""
    query = sa.select(Study).where(Study.site_id == site_id, Study.study_instance_uid == study_instance_uid)
    query = query.order_by(Study.id).execution_options(populate_existing=True)
    return session.scalars(query.with_for_update() if lock else query).all()


def open_study(
    session: Session, site_id: int, facts: StudyFacts, *, actor: str, clock_offset_ms: int | None = None
) -> Study:
    """The row of an offered study, locked; announced if it is new (lifecycle a).

    If another patient has this Study Instance UID already, the new row stands beside the old and all are held (d):
    they are never read as one (PS3.3 C.7.1.1, design §4.8).
    """
    facts = facts.model_copy(update={name: clean(getattr(facts, name)) for name in _STUDY_TEXTS})
    name = f"study {site_id} {facts.study_instance_uid}"
    session.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtextextended(name, 0))))
    rows = studies_of(session, site_id, facts.study_instance_uid, lock=True)
    key, digest = patient_key(facts.patient_id, facts.issuer_of_patient_id), _patient_sha256(facts)
    found = [row for row in rows if (row.patient_key, row.patient_sha256) == (key, digest)]
    found = found or [row for row in rows if same_patient(row, facts)]
    if found:
        return found[0]
    study = Study(
        site_id=site_id,
        study_instance_uid=facts.study_instance_uid,
        patient_key=key,
        patient_sha256=digest,
        priority=facts.priority,
        acquired_at=facts.acquired_at,
        first_received_at=facts.first_received_at,
        state=StudyState.RECEIVING,
        **{name: getattr(facts, name) for name in _STUDY_TEXTS},
    )
    session.add(study)
    session.flush()
    details = {
        "gateway_received_at": facts.first_received_at.isoformat(),
        "acquired_at": facts.acquired_at.isoformat() if facts.acquired_at else None,
        "gateway_clock_offset_ms": clock_offset_ms,
    }
    transitions.born(session, Transition.STUDY_ANNOUNCED, study.id, study.id, actor=actor, details=details)
    if rows:
        ids = [row.id for row in rows] + [study.id]
        for study_id in ids:
            others = [other for other in ids if other != study_id]
            hold(session, study_id, actor=actor, details={"reason": "two patients", "other_studies": others})
        session.refresh(study)
    return study


def _patient_sha256(facts: StudyFacts) -> bytes:
    """What the key needs of a patient beside the Patient ID, in a length that an index can hold."""
    parts = (facts.patient_name, facts.patient_birth_date, facts.patient_sex)
    return hashlib.sha256("\0".join(parts).encode()).digest()


_STUDY_TEXTS = (
    "patient_id",
    "issuer_of_patient_id",
    "patient_name",
    "patient_birth_date",
    "patient_sex",
    "patient_age",
    "accession_number",
    "study_date",
    "study_time",
    "study_description",
    "specific_character_set",
    "repaired_character_set",
    "calling_ae_title",
    "clinical_question",
)


def raise_priority(session: Session, study: Study, priority: Priority, *, actor: str) -> bool:
    """Take over a more urgent priority; a less urgent one changes nothing. Returns whether it was raised."""
    if _URGENCY.index(priority) >= _URGENCY.index(study.priority):
        return False
    details = {"from": study.priority.value, "to": priority.value}
    study.priority = priority
    session.flush()
    transitions.note(
        session, study.id, "study.priority_raised", subject="study", subject_id=study.id, actor=actor, details=details
    )
    return True


def hold(session: Session, study_id: int, *, actor: str, details: dict[str, Any]) -> None:
    """Take a study out of reading (lifecycle d, l); nothing to do if it is held already."""
    state = session.execute(sa.select(Study.state).where(Study.id == study_id).with_for_update()).scalar_one()
    if state is StudyState.HELD:
        return
    transitions.move(session, Transition.STUDY_HELD, study_id, actor=actor, details=details)
    for case_id in session.scalars(
        sa.select(Case.id).where(Case.study_id == study_id, Case.state != CaseState.SUSPENDED)
    ).all():
        freed = {"claimed_by": None, "lease_token": None, "lease_expires_at": None}
        transitions.move(session, Transition.CASE_SUSPENDED, case_id, actor=actor, values=freed)


@dataclass(frozen=True, slots=True)
class NewInstance:
    """One verified instance to be written: its place in the pack, its metadata, and whether it is a variant."""

    entry: PackEntry
    sidecar: InstanceSidecar
    header_sha256: str
    pixel_sha256: str
    is_variant: bool
    other_studies: tuple[int, ...] = ()  # studies of the site that have this SOP Instance UID with other bytes


@dataclass(frozen=True, slots=True)
class StoredPack:
    """The objects that hold a pack: written, and not yet known to the database."""

    pack_key: str
    sidecar_key: str
    size_bytes: int
    sha256: str


def add_pack(session: Session, study: Study, stored: StoredPack, instances: Sequence[NewInstance]) -> dict[str, int]:
    """Write the rows of an archived pack, in the caller's transaction, which holds the study's row.

    Returns row ids by SHA-256 hex. Raises ChangedMeanwhileError if one of the UIDs was stored by another commit.
    """
    pack_id = session.execute(
        sa.insert(Pack)
        .values(
            site_id=study.site_id,
            study_id=study.id,
            pack_key=stored.pack_key,
            sidecar_key=stored.sidecar_key,
            size_bytes=stored.size_bytes,
            sha256=bytes.fromhex(stored.sha256),
        )
        .returning(Pack.id)
    ).scalar_one()
    series_ids = _series(session, study, instances)
    ids: dict[str, int] = {}
    for start in range(0, len(instances), _INSERT_ROWS):
        some = instances[start : start + _INSERT_ROWS]
        values = [
            _instance_values(study, pack_id, series_ids[new.entry.facts.series_instance_uid], new) for new in some
        ]
        # The same bytes may come under another patient of this Study Instance UID, whose commit came first.
        inserted = session.execute(
            postgresql.insert(Instance).values(values).on_conflict_do_nothing().returning(Instance.id, Instance.sha256)
        ).all()
        if len(inserted) != len(some):
            raise ChangedMeanwhileError("Another commit stored one of these instances first")
        ids |= {digest.hex(): row_id for row_id, digest in inserted}
    _count(session, study, instances)
    return ids


def _series(session: Session, study: Study, instances: Iterable[NewInstance]) -> dict[str, int]:
    """Row id of each series by its UID; made, or completed where an earlier instance could not be read."""
    known = {row.series_instance_uid: row for row in session.scalars(sa.select(Series).filter_by(study_id=study.id))}
    for new in instances:
        uid, metadata = new.entry.facts.series_instance_uid, new.sidecar.metadata
        row = known.get(uid)
        if row is None:
            row = known[uid] = Series(site_id=study.site_id, study_id=study.id, series_instance_uid=uid, modality="")
            row.series_description = row.series_date = row.series_time = row.body_part_examined = ""
            row.instance_count = 0
            session.add(row)
        if not row.modality and (modality := sidecar.text(metadata, "00080060", 16)):
            row.modality = modality
            row.series_number = sidecar.integer(metadata, "00200011")
            row.series_description = sidecar.text(metadata, "0008103E", 256)
            row.series_date = sidecar.text(metadata, "00080021", 16)
            row.series_time = sidecar.text(metadata, "00080031", 32)
            row.body_part_examined = sidecar.text(metadata, "00180015", 16)
        if not new.is_variant:
            row.instance_count += 1
    session.flush()
    return {uid: row.id for uid, row in known.items()}


def _instance_values(study: Study, pack_id: int, series_id: int, new: NewInstance) -> dict[str, Any]:
    facts, metadata = new.entry.facts, new.sidecar.metadata
    frames = sidecar.integer(metadata, "00280008")
    return {
        "site_id": study.site_id,
        "study_id": study.id,
        "series_id": series_id,
        "pack_id": pack_id,
        "sop_instance_uid": facts.sop_instance_uid,
        "sop_class_uid": facts.sop_class_uid,
        "transfer_syntax_uid": facts.transfer_syntax_uid,
        "instance_number": sidecar.integer(metadata, "00200013"),
        "number_of_frames": max(1, frames or 1) if new.sidecar.frames else 0,
        "sha256": bytes.fromhex(facts.sha256),
        "header_sha256": bytes.fromhex(new.header_sha256),
        "pixel_sha256": bytes.fromhex(new.pixel_sha256),
        "size_bytes": facts.size_bytes,
        "pack_offset": new.entry.offset,
        "pack_length": new.entry.length,
        "codec": new.entry.codec,
        "codec_version": new.entry.codec_version,
        "is_variant": new.is_variant,
        "received_at": facts.received_at,
    }


def _count(session: Session, study: Study, instances: Sequence[NewInstance]) -> None:
    """Bring the study's totals up to date. Variants take room, but are not part of what is read."""
    session.refresh(study)
    parts = {sidecar.text(new.sidecar.metadata, "00180015", 16) for new in instances} - {""}
    modalities = {sidecar.text(new.sidecar.metadata, "00080060", 16) for new in instances} - {""}
    study.modalities = sorted(modalities | set(study.modalities))
    study.body_part_examined = study.body_part_examined or min(parts, default="")
    study.instance_count += sum(not new.is_variant for new in instances)
    study.size_bytes += sum(new.entry.facts.size_bytes for new in instances)
    count = sa.select(sa.func.count()).select_from(Series)
    count = count.where(Series.study_id == study.id, Series.instance_count > 0)
    study.series_count = session.execute(count).scalar_one()
    study.last_arrived_at = session.execute(sa.select(sa.func.clock_timestamp())).scalar_one()
    session.flush()


def flag_variants(session: Session, study_ids: Iterable[int]) -> None:
    """Say of these studies, which the caller has locked, that a SOP Instance UID of theirs has other bytes too."""
    session.execute(sa.update(Study).where(Study.id.in_(set(study_ids))).values(has_variants=True))


def line_key(sop_instance_uid: str, sha256_hex: str) -> str:
    """One instance in an inventory: the UID and the digest of its bytes."""
    return f"{sop_instance_uid}/{sha256_hex}"


def unanswered(session: Session, study_id: int, keys: Iterable[str]) -> set[str]:
    """Those line keys the archive does not answer for: neither stored, nor receipted as the same in other encoding."""
    missing = set(keys)
    rows = session.execute(sa.select(Instance.sop_instance_uid, Instance.sha256).where(Instance.study_id == study_id))
    missing -= {line_key(uid, digest.hex()) for uid, digest in rows}
    if missing:
        receipts = sa.select(Upload.receipt).where(
            Upload.study_id == study_id, Upload.state == UploadState.RECEIPTED, Upload.receipt.is_not(None)
        )
        for receipt in session.scalars(receipts):
            lines = (receipt or {}).get("instances", ())
            missing -= {line_key(line["sop_instance_uid"], line["sha256"]) for line in lines}
    return missing


def read_instance(session: Session, objects: Objects, instance: Instance) -> bytes:
    """The data set as it was received, checked against its SHA-256.

    Raises DigestMismatchError if the stored bytes are not those; ObjectMissingError, ObjectStoreError.
    """
    key = session.execute(sa.select(Pack.pack_key).where(Pack.id == instance.pack_id)).scalar_one()
    return read_bytes(objects, key, instance)


def read_bytes(objects: Objects, pack_key: str, instance: Instance) -> bytes:
    """As `read_instance`, outside any transaction: `pack_key` was looked up before."""
    length = instance.pack_length
    data = objects.get(pack_key, offset=instance.pack_offset, length=length) if length else b""
    if hashlib.sha256(data).digest() != instance.sha256:
        raise DigestMismatchError(f"Instance {instance.id}: the archived bytes do not have the digest received")
    return data


def part10(data: bytes, *, sop_class_uid: str, sop_instance_uid: str, transfer_syntax_uid: str) -> bytes:
    """A DICOM file: preamble, file meta information (PS3.10 7.1) and the data set as it is."""

    def uid(element: int, value: str) -> bytes:
        raw = value.encode("ascii")
        raw += b"\0" * (len(raw) % 2)
        return struct.pack("<HH2sH", 2, element, b"UI", len(raw)) + raw

    name = IMPLEMENTATION_VERSION_NAME.encode("ascii")
    meta = (
        struct.pack("<HH2sHL2s", 2, 1, b"OB", 0, 2, b"\0\1")
        + uid(0x02, sop_class_uid)
        + uid(0x03, sop_instance_uid)
        + uid(0x10, transfer_syntax_uid)
        + uid(0x12, IMPLEMENTATION_CLASS_UID)
        + struct.pack("<HH2sH", 2, 0x13, b"SH", len(name))
        + name
    )
    return b"\0" * 128 + b"DICM" + struct.pack("<HH2sHL", 2, 0, b"UL", 4, len(meta)) + meta + data
