"""The two routing jobs: put a complete study in its queue, and move a case earlier when a model found something.

Both decide by the pure modules (`rules`, `priority`) and write rows, event and the job's end in one transaction.
"""

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from routing import priority, rules
from routing.rules_file import load_rules
from storage import jobs, transitions
from storage.actors import Context, actor
from storage.rows import OPEN_CASE_STATES, Case, Event, Gateway, Series, Site, Study, TriageRun, Upload
from storage.states import Subject, Transition
from storage.transitions import SYSTEM
from storage.vocabulary import CaseState, Priority, RunMode, RunState, StudyState, TriageState

TRIAGE_ACTOR = "triage_case"
_RULE = "rule"
_INSTANCES = "instance_count"
"""Key in the details of the events that route a case: how many images it was routed with."""


@actor("route_study", queue="route")
def route_study(context: Context, job: jobs.StartedJob) -> None:
    """A study became complete: its case is queued, renewed with the new images, reopened or resumed.

    A study that is receiving again or held is left alone: its next completion routes it.
    """
    loaded = load_rules(context.settings.rules_file)
    with context.database.centre() as session:
        study = session.get(Study, job.subject_id, with_for_update=True)
        if study is not None and study.state is StudyState.COMPLETE:
            decision = loaded.explain(facts_of(session, study))
            case = session.scalars(sa.select(Case).where(Case.study_id == study.id).with_for_update()).one_or_none()
            if case is None:
                _queue(session, study, decision)
            else:
                _requeue(session, study, case, decision)
        jobs.finish(session, job.id)


@actor("reprioritise_case", queue="route")
def reprioritise_case(context: Context, job: jobs.StartedJob) -> None:
    """Triage found something: place the case again, never later than it stands."""
    with context.database.centre() as session:
        reprioritise(session, job.subject_id, why="triage")
        jobs.finish(session, job.id)


def reprioritise(session: Session, case_id: int, *, why: str) -> bool:
    """Place an open case anew by the policy. Returns whether it moved; a case that is not open is left alone."""
    study_id = session.scalar(sa.select(Case.study_id).where(Case.id == case_id))
    if study_id is None:
        return False
    session.execute(sa.select(Study.id).where(Study.id == study_id).with_for_update())
    case = session.get_one(Case, case_id, with_for_update=True, populate_existing=True)
    if case.state not in OPEN_CASE_STATES:
        return False
    before = priority.Place(case.tier, case.due_at)
    placed = priority.place(
        priority=case.priority,
        clock_started_at=case.clock_started_at,
        contract_due_at=case.contract_due_at,
        now=_now(session),
        findings=_active_findings(session, case_id),
        current=before,
    )
    if placed.order == before.order:
        return False
    rule = [reason for reason in case.due_reasons if reason["code"] == _RULE]
    values: dict[str, Any] = {
        "tier": placed.tier,
        "due_at": placed.due_at,
        "due_reasons": rule + [reason.as_row() for reason in placed.reasons],
    }
    session.execute(sa.update(Case).where(Case.id == case_id).values(**values))
    transitions.note(
        session,
        study_id,
        "case.moved_earlier",
        subject=Subject.CASE,
        subject_id=case_id,
        actor=SYSTEM,
        details={
            "why": why,
            "tier": [before.tier, placed.tier],
            "due_at": [before.due_at.isoformat(), placed.due_at.isoformat()],
            "reasons": [reason.code for reason in placed.reasons],
        },
    )
    return True


def facts_of(session: Session, study: Study) -> rules.StudyFacts:
    """What the rules may ask of this study, from its rows."""
    series = session.execute(
        sa.select(Series.body_part_examined, Series.series_description).where(Series.study_id == study.id)
    ).all()
    site = session.scalars(sa.select(Site.code).where(Site.site_id == study.site_id)).one()
    return rules.StudyFacts(
        site=site,
        modalities=tuple(study.modalities),
        priority=study.priority,
        body_parts=tuple(part for part in {study.body_part_examined, *(row[0] for row in series)} if part),
        calling_ae_title=study.calling_ae_title,
        descriptions=tuple(text for text in (study.study_description, *(row[1] for row in series)) if text),
    )


def _now(session: Session) -> datetime:
    now: datetime = session.scalars(sa.select(sa.func.clock_timestamp())).one()
    return now


def _clock_offset_ms(session: Session, study_id: int) -> int | None:
    """Offset of the sending gateway's clock when it announced the study; if not known then, as it is now."""
    announced: int | None = session.scalar(
        sa.select(Event.details["gateway_clock_offset_ms"].as_integer()).where(
            Event.study_id == study_id, Event.name == Transition.STUDY_ANNOUNCED.event_name
        )
    )
    if announced is not None:
        return announced
    return session.scalar(
        sa.select(Gateway.clock_offset_ms)
        .join(Upload, Upload.gateway_id == Gateway.id)
        .where(Upload.study_id == study_id)
        .order_by(Upload.id)
        .limit(1)
    )


def _active_findings(session: Session, case_id: int) -> list[priority.ActiveFinding]:
    runs = session.execute(
        sa.select(TriageRun.model_name, TriageRun.findings).where(
            TriageRun.case_id == case_id, TriageRun.state == RunState.DONE, TriageRun.mode == RunMode.ACTIVE
        )
    )
    return [
        priority.ActiveFinding(
            model=model,
            code=finding["code"],
            probability=finding["probability"],
            minutes_earlier=finding["minutes_earlier"],
            text_zh=finding.get("text_zh", ""),
            text_en=finding.get("text_en", ""),
        )
        for model, findings in runs
        for finding in findings
        if finding["positive"]
    ]


def _placement(
    decision: rules.Decision,
    clock_started_at: datetime,
    now: datetime,
    findings: list[priority.ActiveFinding],
    current: priority.Place | None = None,
) -> dict[str, Any]:
    """Columns of a case that say where it stands and why."""
    contract_due_at = clock_started_at + timedelta(minutes=decision.contract_minutes)
    placed = priority.place(
        priority=decision.priority,
        clock_started_at=clock_started_at,
        contract_due_at=contract_due_at,
        now=now,
        findings=findings,
        current=current,
    )
    rule = {"code": _RULE, "rule": decision.rule_name, "zh": decision.zh, "en": decision.en}
    return {
        "specialty": decision.specialty,
        "priority": decision.priority,
        "tier": placed.tier,
        "clock_started_at": clock_started_at,
        "contract_due_at": contract_due_at,
        "due_at": placed.due_at,
        "due_reasons": [rule, *(reason.as_row() for reason in placed.reasons)],
        "rule_name": decision.rule_name,
        "rules_version": decision.rules_version,
    }


def _details(study: Study, decision: rules.Decision, contract_due_at: datetime) -> dict[str, Any]:
    """What a routing event says: among it the promise as it stands then, which a later routing may renew."""
    return {
        _INSTANCES: study.instance_count,
        "rule": decision.rule_name,
        "rules_version": decision.rules_version,
        "specialty": decision.specialty,
        "priority": decision.priority,
        "contract_due_at": contract_due_at.isoformat(),
    }


def _enqueue_triage(session: Session, study: Study, case_id: int, tier: int) -> None:
    queue = "triage" if tier == priority.TIER_ROUTINE else "triage-urgent"
    jobs.enqueue(session, site_id=study.site_id, queue=queue, actor=TRIAGE_ACTOR, subject_id=case_id)


def _queue(session: Session, study: Study, decision: rules.Decision) -> None:
    """Lifecycle f: the case is born in its queue; triage runs beside it."""
    now = _now(session)
    started = priority.clock_start(study.first_received_at, _clock_offset_ms(session, study.id), study.first_arrived_at)
    values = _placement(decision, started, now, [])
    deadline = now + timedelta(seconds=decision.triage_deadline_s)
    case_id = session.scalars(
        sa.insert(Case)
        .values(
            site_id=study.site_id,
            study_id=study.id,
            state=CaseState.QUEUED,
            triage=TriageState.PENDING if decision.ask_models else TriageState.NO_MODEL,
            triage_deadline=deadline if decision.ask_models else None,
            **values,
        )
        .returning(Case.id)
    ).one()
    details = _details(study, decision, values["contract_due_at"])
    transitions.born(session, Transition.CASE_QUEUED, study.id, case_id, actor=SYSTEM, details=details)
    if decision.ask_models:
        _enqueue_triage(session, study, case_id, values["tier"])


def _requeue(session: Session, study: Study, case: Case, decision: rules.Decision) -> None:
    """The study is complete again: with new images, a higher priority, or released; else there is nothing to do."""
    routed = session.execute(
        sa.select(Event.sequence, Event.details[_INSTANCES].as_integer())
        .where(Event.study_id == study.id, Event.subject == Subject.CASE, Event.details.has_key(_INSTANCES))
        .order_by(Event.sequence.desc())
        .limit(1)
    ).one_or_none()
    routed_at, routed_with = (0, None) if routed is None else (routed[0], routed[1])
    grown = routed_with != study.instance_count
    wanted = _not_less_urgent(decision, case)
    if not grown and wanted.priority is case.priority and case.state is not CaseState.SUSPENDED:
        return
    now = _now(session)
    if case.state is CaseState.REPORTED or _reopened_since(session, study.id, routed_at):
        # A new reading with a clock of its own: the first one is answered for by its signature.
        values = _placement(decision, study.last_arrived_at, now, [])
        values |= {"new_images": True, "queued_at": now}
    else:
        current = priority.Place(case.tier, case.due_at)
        values = _placement(wanted, case.clock_started_at, now, _active_findings(session, case.id), current)
        values["new_images"] = case.new_images or (grown and case.state is CaseState.CLAIMED)
    if case.state is CaseState.CLAIMED:
        values.pop("specialty")  # it is in a reader's hands and stays there

    details = _details(study, decision, values["contract_due_at"])
    change = {CaseState.REPORTED: Transition.CASE_REOPENED, CaseState.SUSPENDED: Transition.CASE_RESUMED}
    if case.state in change:
        transitions.move(session, change[case.state], case.id, actor=SYSTEM, details=details, values=values)
    else:
        session.execute(sa.update(Case).where(Case.id == case.id).values(**values))
        transitions.note(
            session, study.id, "case.renewed", subject=Subject.CASE, subject_id=case.id, actor=SYSTEM, details=details
        )
    if grown and decision.ask_models:
        _renew_triage(session, study, case, decision, now, values["tier"])


def _reopened_since(session: Session, study_id: int, sequence: int) -> bool:
    """Whether images that arrived after the signature reopened the case (lifecycle k) since it was routed last."""
    reopened = sa.select(Event.id).where(
        Event.study_id == study_id, Event.name == Transition.CASE_REOPENED.event_name, Event.sequence > sequence
    )
    return session.scalar(sa.select(reopened.exists())) is True


def _not_less_urgent(decision: rules.Decision, case: Case) -> rules.Decision:
    """The decision, at least as urgent as the case is and with a promise not later than the one given."""
    minutes = round((case.contract_due_at - case.clock_started_at).total_seconds() / 60)
    order = list(Priority)
    return replace(
        decision,
        priority=min(decision.priority, case.priority, key=order.index),
        contract_minutes=min(decision.contract_minutes, minutes),
    )


def _renew_triage(
    session: Session, study: Study, case: Case, decision: rules.Decision, now: datetime, tier: int
) -> None:
    """Lifecycle q: the models are asked about the grown study."""
    deadline = {"triage_deadline": now + timedelta(seconds=decision.triage_deadline_s)}
    if case.triage is TriageState.PENDING:
        session.execute(sa.update(Case).where(Case.id == case.id).values(**deadline))
    else:
        transitions.move(session, Transition.TRIAGE_RENEWED, case.id, actor=SYSTEM, values=deadline)
    _enqueue_triage(session, study, case.id, tier)
