"""The actor `triage_case`: asks every model that reads this kind of study, stores what they say, moves a case earlier.

Triage never holds a case: the case is on the worklist before this runs, and a failure leaves it there. It reads in one
transaction, computes outside any, and writes findings, event and the end of the job in another.
"""

from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import sqlalchemy as sa
import structlog
from pydicom.dataset import Dataset
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import Session

from ai_triage.facts import age_years
from ai_triage.images import grey_image
from ai_triage.interface import ModelCard, SeriesFacts, StudyFacts, TriageModel, TriageResult
from ai_triage.registry import load_models
from ai_triage.results import SourceInstance, StudyIdentity, heat_map_image, structured_report
from ai_triage.untrusted import parse_data_set
from storage import archive, jobs, transitions
from storage.actors import Context, actor
from storage.errors import MalformedDataSetError, ObjectMissingError
from storage.rows import Case, Instance, Pack, Series, Site, Study, TriageRun
from storage.states import Transition
from storage.transitions import SYSTEM
from storage.vocabulary import RunMode, RunState, StudyState, TriageState

_LOG = structlog.get_logger()

MAX_INSTANCE_BYTES = 512 * 1024 * 1024
_TIME_LIMIT_S = 300.0
_NO_MODEL_READS_IT = "没有适用于本检查的模型 / no model reads this kind of study"
_SHADOW_ONLY = "本院未启用可用的模型 / no model that could read it is enabled for this hospital"


@dataclass(frozen=True, slots=True)
class _Asked:
    """What one job is about, read in one transaction."""

    case_id: int
    study_id: int
    site_id: int
    site_code: str
    study_version: int
    facts: StudyFacts
    identity: StudyIdentity
    enabled_models: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Answer:
    """What came of one run."""

    run_id: int
    card: ModelCard
    mode: RunMode
    state: RunState
    reason: str = ""
    result: TriageResult | None = None
    sr_key: str | None = None
    heat_map_key: str | None = None


@dataclass(slots=True)
class _Inputs:
    """Data sets of one study for one model, with the rows they come from."""

    datasets: list[Dataset] = field(default_factory=list)
    sources: dict[str, SourceInstance] = field(default_factory=dict)


@cache
def models(directory: Path) -> tuple[TriageModel, ...]:
    """The models of this process, loaded once. Raises ConfigurationError."""
    return load_models(directory)


@actor("triage_case", queue="triage", time_limit_s=_TIME_LIMIT_S)
def triage_case(context: Context, job: jobs.StartedJob) -> None:
    """Triage the case `job.subject_id`. A case that is gone, or whose study is held, is nothing to do."""
    with context.database.centre() as session:
        asked = _read(session, job.subject_id)
        if asked is None:
            jobs.finish(session, job.id)
            return
    readers = [model for model in models(context.settings.models_dir) if model.card.accepts.asks_for(asked.facts)]
    runs = _open_runs(context, asked, [model.card for model in readers])
    answers = [
        _ask(context, asked, model, run_id, mode)
        for model, (run_id, mode, state) in zip(readers, runs, strict=True)
        if state is RunState.PENDING
    ]
    with context.database.centre() as session:
        _write(session, asked, answers)
        jobs.finish(session, job.id)
    _LOG.info("triage.answered", case_id=asked.case_id, runs=len(answers))


def _read(session: Session, case_id: int) -> _Asked | None:
    row = session.execute(
        sa.select(Case, Study, Site)
        .join(Study, Study.id == Case.study_id)
        .join(Site, Site.site_id == Case.site_id)
        .where(Case.id == case_id)
    ).one_or_none()
    if row is None:
        return None
    case, study, site = row
    if study.state is StudyState.HELD:
        return None
    series = session.scalars(sa.select(Series).where(Series.study_id == study.id).order_by(Series.id))
    return _Asked(
        case_id=case.id,
        study_id=study.id,
        site_id=study.site_id,
        site_code=site.code,
        study_version=study.instance_count,
        facts=StudyFacts(
            site_code=site.code,
            modalities=tuple(study.modalities),
            body_part_examined=study.body_part_examined,
            age_years=age_years(study.patient_age, study.patient_birth_date, study.study_date),
            series=tuple(
                SeriesFacts(
                    series_instance_uid=one.series_instance_uid,
                    modality=one.modality,
                    body_part_examined=one.body_part_examined,
                    series_description=one.series_description,
                    instance_count=one.instance_count,
                )
                for one in series
            ),
        ),
        identity=StudyIdentity(
            study_instance_uid=study.study_instance_uid,
            patient_id=study.patient_id,
            issuer_of_patient_id=study.issuer_of_patient_id,
            patient_name=study.patient_name,
            patient_birth_date=study.patient_birth_date,
            patient_sex=study.patient_sex,
            accession_number=study.accession_number,
            study_date=study.study_date,
            study_time=study.study_time,
        ),
        enabled_models=frozenset(site.enabled_models),
    )


def _open_runs(context: Context, asked: _Asked, cards: list[ModelCard]) -> list[tuple[int, RunMode, RunState]]:
    """A run row per model, in the models' order; those of an earlier start of this job are found again."""
    opened = []
    with context.database.centre() as session:
        for card in cards:
            shown = not card.research_only or card.name in asked.enabled_models
            session.execute(
                postgresql.insert(TriageRun)
                .values(
                    site_id=asked.site_id,
                    study_id=asked.study_id,
                    case_id=asked.case_id,
                    study_version=asked.study_version,
                    model_name=card.name,
                    model_version=card.version,
                    model_sha256=card.sha256,
                    mode=RunMode.ACTIVE if shown else RunMode.SHADOW,
                    state=RunState.PENDING,
                )
                .on_conflict_do_nothing()
            )
            row = session.execute(
                sa.select(TriageRun.id, TriageRun.mode, TriageRun.state).where(
                    TriageRun.case_id == asked.case_id,
                    TriageRun.model_name == card.name,
                    TriageRun.model_version == card.version,
                    TriageRun.study_version == asked.study_version,
                )
            ).one()
            opened.append((row[0], row[1], row[2]))
    return opened


def _ask(context: Context, asked: _Asked, model: TriageModel, run_id: int, mode: RunMode) -> _Answer:
    """One model on one study. Errors of the study are its answer; errors of servers are raised: the job retries."""
    answer = _Answer(run_id, model.card, mode, RunState.FAILED)
    try:
        inputs = _inputs(context, asked, model.card)
        suitability = model.suits(asked.facts, inputs.datasets)
        if not suitability.accepted:
            return replace(answer, state=RunState.UNSUITABLE, reason=suitability.reason)
        result = model.run(inputs.datasets)
        return _stored(context, asked, replace(answer, state=RunState.DONE, result=result), inputs)
    except (MalformedDataSetError, ObjectMissingError) as error:
        _LOG.warning("triage.failed", run_id=run_id, model=model.card.name, error=type(error).__name__)
        return replace(answer, reason=error.reason)


def _inputs(context: Context, asked: _Asked, card: ModelCard) -> _Inputs:
    """The first data sets of the SOP classes the model accepts, in series and instance order."""
    with context.database.centre() as session:
        rows = session.execute(
            sa.select(Instance, Pack.pack_key, Series.series_instance_uid, Series.modality)
            .join(Pack, Pack.id == Instance.pack_id)
            .join(Series, Series.id == Instance.series_id)
            .where(
                Instance.study_id == asked.study_id,
                Instance.is_variant.is_(False),
                Instance.sop_class_uid.in_(card.accepts.sop_class_uids),
            )
            .order_by(Series.series_number, Series.id, Instance.instance_number, Instance.id)
            .limit(card.accepts.max_instances)
        ).all()
    inputs = _Inputs()
    for instance, pack_key, series_instance_uid, modality in rows:
        if instance.size_bytes > MAX_INSTANCE_BYTES:
            raise MalformedDataSetError(f"An instance of {instance.size_bytes} bytes is too large for triage")
        inputs.datasets.append(
            parse_data_set(
                archive.read_bytes(context.objects, pack_key, instance),
                sop_class_uid=instance.sop_class_uid,
                sop_instance_uid=instance.sop_instance_uid,
                transfer_syntax_uid=instance.transfer_syntax_uid,
            )
        )
        inputs.sources[instance.sop_instance_uid] = SourceInstance(
            instance.sop_class_uid, instance.sop_instance_uid, series_instance_uid, modality
        )
    return inputs


def _stored(context: Context, asked: _Asked, answer: _Answer, inputs: _Inputs) -> _Answer:
    """The answer with its DICOM objects in the store: always the report, the heat map only where something is flagged.

    The keys name the run, and the same run gives the same objects: a run done twice is stored once.
    """
    result = answer.result
    if result is None:
        return answer
    prefix = f"results/{asked.site_code}/{asked.identity.study_instance_uid}/{answer.run_id}"
    sources = [inputs.sources[uid] for uid in result.input_uids]
    run_key = f"{asked.site_code}/{answer.run_id}/{answer.card.sha256}"
    context.objects.put(f"{prefix}.sr.dcm", structured_report(asked.identity, answer.card, result, sources, run_key))
    answer = replace(answer, sr_key=f"{prefix}.sr.dcm")
    if result.heat_map is None or not any(finding.positive for finding in result.findings):
        return answer
    shown = next(one for one in inputs.datasets if str(one.SOPInstanceUID) == result.input_uids[0])
    context.objects.put(
        f"{prefix}.heat.dcm",
        heat_map_image(asked.identity, answer.card, grey_image(shown), result.heat_map, sources[0], run_key),
    )
    return replace(answer, heat_map_key=f"{prefix}.heat.dcm")


_END_OF_RUN = {
    RunState.DONE: Transition.RUN_DONE,
    RunState.UNSUITABLE: Transition.RUN_UNSUITABLE,
    RunState.FAILED: Transition.RUN_FAILED,
}


def _write(session: Session, asked: _Asked, answers: list[_Answer]) -> None:
    for answer in answers:
        result = answer.result
        values = {
            "reason": answer.reason,
            "sr_key": answer.sr_key,
            "heat_map_key": answer.heat_map_key,
            "findings": [finding.as_row() for finding in result.findings] if result else [],
            "input_uids": list(result.input_uids) if result else [],
            "inference_ms": round(result.seconds * 1000) if result else None,
        }
        transitions.move(
            session,
            _END_OF_RUN[answer.state],
            answer.run_id,
            actor=SYSTEM,
            values=values,
            details={
                "model": answer.card.name,
                "version": answer.card.version,
                "sha256": answer.card.sha256,
                "mode": answer.mode.value,
                "positive": [f.code for f in result.findings if f.positive] if result else [],
                "reason": answer.reason,
            },
        )
    runs = list(
        session.scalars(
            sa.select(TriageRun)
            .where(TriageRun.case_id == asked.case_id, TriageRun.study_version == asked.study_version)
            .order_by(TriageRun.id)
            .execution_options(populate_existing=True)
        )
    )
    transition, details = _conclusion(runs)
    # The state is read under the study's lock: a deadline, or a study that grew, may have moved it meanwhile.
    session.execute(sa.select(Study.id).where(Study.id == asked.study_id).with_for_update())
    triage: TriageState = session.execute(
        sa.select(Case.triage).where(Case.id == asked.case_id).with_for_update()
    ).scalar_one()
    if transition.allows(triage):
        transitions.move(session, transition, asked.case_id, actor=SYSTEM, details=details)
    if any(_minutes_earlier(run) for run in runs):
        jobs.enqueue(session, site_id=asked.site_id, queue="route", actor="reprioritise_case", subject_id=asked.case_id)


def _minutes_earlier(run: TriageRun) -> int:
    """The most that an active, positive finding asks for; 0: nothing moves."""
    if run.mode is not RunMode.ACTIVE or run.state is not RunState.DONE:
        return 0
    return max((int(finding["minutes_earlier"]) for finding in run.findings if finding["positive"]), default=0)


def _conclusion(runs: list[TriageRun]) -> tuple[Transition, dict[str, str]]:
    """What triage as a whole has to say. Only active runs speak; a shadow run is for comparison alone."""
    if not runs:
        return Transition.TRIAGE_NOT_FOR_MODEL, {"reason": _NO_MODEL_READS_IT}
    active = [run for run in runs if run.mode is RunMode.ACTIVE]
    if not active:
        return Transition.TRIAGE_NOT_FOR_MODEL, {"reason": _SHADOW_ONLY}
    done = [run for run in active if run.state is RunState.DONE]
    if done:
        return Transition.TRIAGE_DONE, {"models": ", ".join(run.model_name for run in done)}
    failed = [run for run in active if run.state is RunState.FAILED]
    if failed:
        return Transition.TRIAGE_EXPIRED, {"reason": failed[0].reason}
    return Transition.TRIAGE_NOT_FOR_MODEL, {"reason": active[0].reason}
