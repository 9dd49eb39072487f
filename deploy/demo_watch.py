"""What the demonstration sees of a study, read from the centre's rows: states with times, triage, place, receipt."""

from collections.abc import Iterator
from datetime import datetime
from itertools import pairwise
from typing import Any

import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from sqlalchemy.orm import Session

from storage import receipts
from storage.database import Database
from storage.errors import SignatureInvalidError
from storage.rows import OPEN_CASE_STATES, Case, Event, Instance, Job, Report, Site, Study, TriageRun, Upload
from storage.transitions import verify_chain
from storage.vocabulary import TriageState, UploadState
from storage.wire import Receipt

# The milestones between which time is told (design §9), in order; each is an event's name.
MILESTONES = (
    "study.announced",
    "study.completed",
    "case.queued",
    "triage.done",
    "triage.not_for_model",
    "case.claimed",
    "report.signed",
    "report.received",
    "report.delivered",
)


def study_row(session: Session, site_id: int, study_instance_uid: str) -> Study | None:
    """The study of that site, if it has arrived."""
    return session.execute(
        sa.select(Study).where(Study.site_id == site_id, Study.study_instance_uid == study_instance_uid)
    ).scalar_one_or_none()


def case_row(session: Session, study_id: int) -> Case | None:
    """The study's case, if it is routed."""
    return session.execute(sa.select(Case).where(Case.study_id == study_id)).scalar_one_or_none()


def is_ordered(database: Database, site_id: int, study_instance_uid: str) -> bool:
    """Whether the study has its place in a queue, triage has spoken, and the place follows what it said."""
    with database.centre() as session:
        study = study_row(session, site_id, study_instance_uid)
        case = case_row(session, study.id) if study else None
        if case is None or case.triage is TriageState.PENDING:
            return False
        open_jobs = sa.select(Job.id).where(
            Job.actor.in_(("triage_case", "reprioritise_case")),
            Job.subject_id == case.id,
            Job.finished_at.is_(None),
            Job.parked_at.is_(None),
        )
        return session.execute(open_jobs.limit(1)).first() is None


def report_state(database: Database, case_id: int) -> str:
    """State of the newest report of a case; empty when there is none."""
    with database.centre() as session:
        state = session.execute(
            sa.select(Report.state).where(Report.case_id == case_id).order_by(Report.version.desc()).limit(1)
        ).scalar_one_or_none()
    return state.value if state else ""


def facts(database: Database, site_id: int, study_instance_uid: str, key: Ed25519PublicKey) -> dict[str, Any]:
    """All there is to say of one study, as JSON values."""
    with database.centre() as session:
        study = study_row(session, site_id, study_instance_uid)
        if study is None:
            return {"state": "not arrived"}
        case = case_row(session, study.id)
        events = session.execute(
            sa.select(Event.name, Event.at, Event.actor, Event.details)
            .where(Event.study_id == study.id)
            .order_by(Event.sequence)
        ).all()
        milestones = _milestones(study.first_received_at, [(event.name, event.at) for event in events])
        site = session.execute(sa.select(Site.code).where(Site.site_id == site_id)).scalar_one()
        return {
            "state": study.state.value,
            "case_id": case.id if case else None,
            "instances": session.execute(sa.select(sa.func.count()).where(Instance.study_id == study.id)).scalar_one(),
            "archived_sha256": {
                uid: digest.hex()
                for uid, digest in session.execute(
                    sa.select(Instance.sop_instance_uid, Instance.sha256).where(Instance.study_id == study.id)
                )
            },
            "case": _case(session, case) if case else None,
            "triage": _triage(session, case) if case else [],
            "receipts_valid": list(_receipts(session, study.id, site, key)),
            "events_in_chain": verify_chain(session, study.id),
            "timeline": [{"event": e.name, "at": e.at.isoformat(), "by": e.actor} for e in events],
            "milestones": {name: at.isoformat() for name, at in milestones},
            "segments_s": {
                f"{start} > {end}": round((then - before).total_seconds(), 3)
                for (start, before), (end, then) in pairwise(milestones)
            },
        }


def _case(session: Session, case: Case) -> dict[str, Any]:
    ahead = session.execute(
        sa.select(sa.func.count()).where(
            Case.specialty == case.specialty,
            Case.state.in_(OPEN_CASE_STATES),
            sa.tuple_(Case.tier, Case.due_at, Case.id) < sa.tuple_(case.tier, case.due_at, case.id),
        )
    ).scalar_one()
    return {
        "state": case.state.value,
        "specialty": case.specialty,
        "rule": case.rule_name,
        "queue_position": ahead + 1 if case.state in OPEN_CASE_STATES else None,
        "contract_due_at": case.contract_due_at.isoformat(),
        "due_at": case.due_at.isoformat(),
        "due_reasons": case.due_reasons,
        "triage": case.triage.value,
    }


def _triage(session: Session, case: Case) -> list[dict[str, Any]]:
    runs = session.execute(sa.select(TriageRun).where(TriageRun.case_id == case.id).order_by(TriageRun.id)).scalars()
    return [
        {
            "model": run.model_name,
            "version": run.model_version,
            "sha256": run.model_sha256,
            "mode": run.mode.value,
            "state": run.state.value,
            "reason": run.reason,
            "findings": run.findings,
            "inference_ms": run.inference_ms,
        }
        for run in runs
    ]


def _receipts(session: Session, study_id: int, site: str, key: Ed25519PublicKey) -> Iterator[bool]:
    rows = session.execute(
        sa.select(Upload.receipt).where(Upload.study_id == study_id, Upload.state == UploadState.RECEIPTED)
    ).scalars()
    for row in rows:
        try:
            receipts.verify(Receipt.model_validate(row), key, site=site)
        except SignatureInvalidError:
            yield False
        else:
            yield True


def _milestones(received_at: datetime, events: list[tuple[str, datetime]]) -> list[tuple[str, datetime]]:
    """Each milestone's first time, in order of time; the first is receipt at the gateway, by the gateway's clock."""
    first: dict[str, datetime] = {}
    for name, at in events:
        if name in MILESTONES:
            first.setdefault(name, at)
    return [("gateway.received", received_at), *sorted(first.items(), key=lambda item: item[1])]
