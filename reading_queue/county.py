"""The county's page: what was sent, how far each study is, and its report. Own hospital only, by row-level security.

The five steps are those a radiographer asks about on the telephone. A critical or corrected report that nobody has
opened stands first on every day's page until somebody does. Opening a report is written down once: when and by whom
(the last segment of the turnaround); a version that was replaced is shown only to who asks for it knowing that.
"""

from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Any, Literal
from zoneinfo import ZoneInfo

import sqlalchemy as sa
from fastapi import APIRouter, Depends, Query, Request, Response
from sqlalchemy.orm import Session

from reading_queue.auth import Person, require
from reading_queue.i18n import language_of, t
from reading_queue.pages import page
from reading_queue.problems import ConflictError, wants_page
from reading_queue.reports import pdf_response
from reading_queue.worklist import RowId
from storage.rows import Case, Event, Gateway, Report, Site, Study, Upload
from storage.states import Transition
from storage.transitions import account_actor, note
from storage.vocabulary import CaseState, Conclusion, Priority, ReportState, Role, StudyState, UploadState

router = APIRouter()
COUNTY = require(Role.RADIOGRAPHER, Role.CLINICIAN)
_STANDING = (ReportState.SIGNED, ReportState.RECEIVED, ReportState.DELIVERED)
_MAX_ROWS = 200
_SILENT = timedelta(minutes=5)  # a gateway says something every half minute
_LOW_DISK_BYTES = 10 * 1000**3

StepState = Literal["done", "now", "todo", "stop"]


@dataclass(frozen=True, slots=True)
class Step:
    """One of the five steps: its text's key, where it stands, and what stands below it."""

    key: str
    state: StepState
    at: datetime | None = None
    note: str = ""  # plain text, or a text's key


@dataclass(frozen=True, slots=True)
class CountyRow:
    """One study as the county sees it."""

    study: Study
    case: Case | None
    report: Report | None  # the newest signed
    steps: list[Step]

    @property
    def priority(self) -> Priority:
        """As the rules have it, once they have spoken."""
        return self.case.priority if self.case is not None else self.study.priority

    @property
    def critical(self) -> bool:
        """A critical value that nobody here has opened yet."""
        return (
            self.report is not None and self.report.conclusion is Conclusion.CRITICAL and self.report.opened_at is None
        )

    @property
    def rings(self) -> bool:
        """A critical value or a corrected report that nobody here has opened yet."""
        return self.critical or (self.report is not None and self.report.version > 1 and self.report.opened_at is None)


def steps_of(
    study: Study, case: Case | None, report: Report | None, announced: int, completed_at: datetime | None
) -> list[Step]:
    """The five steps of a study. `announced` is how many instances its gateway says there are, as far as known."""
    total = max(announced, study.expected_count or 0, study.instance_count)
    upload = f"{study.instance_count}/{total}"
    received = Step("county.step_received", "done", study.first_received_at)
    if study.state is StudyState.HELD:
        held = Step("county.step_centre", "stop", note="county.held")
        return [
            received, Step("county.step_upload", "done", note=upload), held,
            Step("county.step_reading", "todo"), Step("county.step_report", "todo"),
        ]  # fmt: skip
    complete = study.state is StudyState.COMPLETE
    reading: StepState = "todo"
    if case is not None and complete:
        reading = "done" if case.state is CaseState.REPORTED else "now"
    waits = case is not None and case.state is CaseState.QUEUED
    report_state: StepState = "todo"
    report_note = ""
    if report is not None:
        back = report.state is ReportState.DELIVERED or report.opened_at is not None
        report_state = "done" if back else "now"
        report_note = f"common.report_{report.state.value}"
    return [
        received,
        Step("county.step_upload", "done" if complete else "now", note=upload),
        Step("county.step_centre", "done" if complete else "todo", completed_at if complete else None),
        Step("county.step_reading", reading, note="county.waiting" if reading == "now" and waits else ""),
        Step("county.step_report", report_state, report.signed_at if report else None, report_note),
    ]


def _ringing() -> sa.ColumnElement[bool]:
    """Condition on Study: its standing report is critical or a correction, and nobody has opened it. Of any day."""
    return sa.exists().where(
        Report.study_id == Study.id,
        Report.state.in_(_STANDING),
        Report.opened_at.is_(None),
        sa.or_(Report.conclusion == Conclusion.CRITICAL, Report.version > 1),
    )


def _of_day(since: datetime, until: datetime) -> sa.ColumnElement[bool]:
    """Condition on Study: received on the day; today's page also has every older one without a report at home."""
    unfinished = ~sa.exists().where(Report.study_id == Study.id, Report.state == ReportState.DELIVERED)
    still_open = sa.and_(unfinished, until > sa.func.clock_timestamp())
    return sa.and_(Study.first_received_at < until, sa.or_(Study.first_received_at >= since, still_open))


def _matching(search: str) -> sa.ColumnElement[bool]:
    """Condition on Study: of any day, with these words in the name or a number."""
    columns = (Study.patient_name, Study.patient_id, Study.accession_number)
    return sa.or_(*(sa.func.strpos(sa.func.lower(one), search.lower()) > 0 for one in columns))


def _rows(session: Session, condition: sa.ColumnElement[bool]) -> list[CountyRow]:
    """What rings first, critical before corrected; then newest first. At most 200."""
    found = session.execute(
        sa.select(Study, Case)
        .outerjoin(Case, Case.study_id == Study.id)
        .where(condition)
        .order_by(Study.first_received_at.desc(), Study.id.desc())
        .limit(_MAX_ROWS)
    ).all()
    ids = [study.id for study, _ in found]
    reports = {
        report.study_id: report
        for report in session.scalars(
            sa.select(Report)
            .where(Report.study_id.in_(ids), Report.state.in_(_STANDING))
            .order_by(Report.version)
        )
    }  # fmt: skip
    waiting = session.execute(
        sa.select(Upload.study_id, sa.func.sum(sa.func.jsonb_array_length(Upload.plan["digests"])))
        .where(Upload.study_id.in_(ids), Upload.state != UploadState.RECEIPTED)
        .group_by(Upload.study_id)
    )
    on_the_way: dict[int, int] = {row[0]: row[1] for row in waiting}
    completions = session.execute(
        sa.select(Event.study_id, sa.func.max(Event.at))
        .where(Event.study_id.in_(ids), Event.name == Transition.STUDY_COMPLETED.event_name)
        .group_by(Event.study_id)
    )
    completed: dict[int | None, datetime] = {row[0]: row[1] for row in completions}
    rows = [
        CountyRow(
            study,
            case,
            reports.get(study.id),
            steps_of(
                study, case, reports.get(study.id), study.instance_count + int(on_the_way.get(study.id, 0)),
                completed.get(study.id),
            ),
        )
        for study, case in found
    ]  # fmt: skip
    return sorted(rows, key=lambda row: (not row.critical, not row.rings))  # keeps the order of equals


def _gateways(session: Session, now: datetime) -> list[dict[str, Any]]:
    """Link and disk of the hospital's gateways, as they last said."""
    shown = []
    for gateway in session.scalars(sa.select(Gateway).order_by(Gateway.id)):
        beat = gateway.heartbeat or {}
        low_disk = beat.get("out_of_space", False) or beat.get("free_disk_bytes", _LOW_DISK_BYTES) < _LOW_DISK_BYTES
        shown.append(
            {
                "name": gateway.name,
                "last": gateway.last_heartbeat_at,
                "online": gateway.last_heartbeat_at is not None and now - gateway.last_heartbeat_at < _SILENT,
                "unsent": beat.get("unsent_instances"),
                "free_gb": round(beat["free_disk_bytes"] / 1000**3) if "free_disk_bytes" in beat else None,
                "low_disk": low_disk,
                "quarantined": beat.get("quarantined", 0),
            }
        )  # fmt: skip
    return shown


def _context(request: Request, person: Person, day: date | None, search: str) -> dict[str, Any]:
    zone = ZoneInfo(request.app.state.settings.timezone)
    today = datetime.now(UTC).astimezone(zone).date()
    chosen = min(day or today, today)
    since = datetime.combine(chosen, time.min, zone)
    words = " ".join(search.replace("\0", "").split())
    with request.app.state.database.county(person.site_id) as session:
        now: datetime = session.execute(sa.select(sa.func.clock_timestamp())).scalar_one()
        day_rows = sa.and_(_of_day(since, since + timedelta(days=1)), ~_ringing())
        # What rings stands above all; what was searched for stands once, among what was found.
        ringing = _rows(session, sa.and_(_ringing(), ~_matching(words)) if words else _ringing())
        rows = _rows(session, _matching(words) if words else day_rows)
        return {
            "ringing": ringing,
            "rows": rows,
            "full": _MAX_ROWS,
            "site": session.scalars(sa.select(Site).where(Site.site_id == person.site_id)).one(),
            "gateways": _gateways(session, now),
            "day": chosen,
            "today": today,
            "day_before": chosen - timedelta(days=1),
            "day_after": chosen + timedelta(days=1),
            "search": words,
            "critical": sum(row.critical for row in ringing + rows),
        }


def _day(day: str = Query("", max_length=10)) -> date | None:
    try:
        chosen = date.fromisoformat(day)
    except ValueError:
        return None  # as if none was given: today
    return chosen if chosen.year > 1900 else None


@router.get("/county")
def county_page(
    request: Request,
    person: Person = Depends(COUNTY),
    day: date | None = Depends(_day),
    q: str = Query("", max_length=64),
) -> Response:
    """The page of one day; today's also has what is not reported yet. With words to search for: of all days."""
    return page(request, "county.html", **_context(request, person, day, q))


@router.get("/county/rows")
def county_rows(
    request: Request,
    person: Person = Depends(COUNTY),
    day: date | None = Depends(_day),
    q: str = Query("", max_length=64),
) -> Response:
    """Its changing part alone."""
    return page(request, "county_rows.html", **_context(request, person, day, q))


@router.get("/county/reports/{report_id}/pdf")
def open_report(
    report_id: RowId, request: Request, person: Person = Depends(COUNTY), superseded: bool = False
) -> Response:
    """The signed report as PDF. The first time it is opened is written down.

    For a version that was replaced: a page that says so (409), and the PDF only with `superseded`; nothing is written
    down then, because what stands has not been opened.
    """
    state = request.app.state
    with state.database.county(person.site_id) as session:
        report = session.scalars(
            sa.select(Report).where(Report.id == report_id, Report.state != ReportState.DRAFT)
        ).one_or_none()
        standing = _standing_instead_of(session, report)
    if standing is not None and not superseded:
        return _replaced(request, report_id, standing)
    answer = pdf_response(state.objects, report)  # first the bytes: what could not be shown was not opened
    assert report is not None  # noqa: S101 - pdf_response raised
    if report.opened_by is None and standing is None:
        with state.database.county(person.site_id) as session:
            _note_opened(session, report, person)
    return answer


def _standing_instead_of(session: Session, report: Report | None) -> Report | None:
    """The version that replaced this one; None if it stands itself."""
    if report is None or report.state is not ReportState.SUPERSEDED:
        return None
    return session.scalars(
        sa.select(Report).where(Report.case_id == report.case_id, Report.state.in_(_STANDING))
    ).one_or_none()


def _replaced(request: Request, report_id: int, standing: Report) -> Response:
    if not wants_page(request):  # the page's script, about to print
        words = t("county.replaced_by", language_of(request), version=standing.version)
        raise ConflictError(words, "superseded", report_id=standing.id)
    return page(request, "county_replaced.html", status=409, report_id=report_id, standing=standing)


def _note_opened(session: Session, report: Report, person: Person) -> None:
    session.execute(sa.select(Study.id).where(Study.id == report.study_id).with_for_update())
    first = session.execute(
        sa.update(Report)
        .where(Report.id == report.id, Report.opened_by.is_(None), Report.state.in_(_STANDING))
        .values(opened_at=sa.func.coalesce(Report.opened_at, sa.func.clock_timestamp()), opened_by=person.account_id)
        .returning(Report.id)
    ).scalar_one_or_none()
    if first is not None:
        actor = account_actor(person.account_id)
        note(session, report.study_id, "report.opened", subject=Report.__tablename__, subject_id=report.id, actor=actor)
