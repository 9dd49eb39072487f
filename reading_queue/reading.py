"""The reading screen of one case: patient, question, report on the left, the viewer on the right.

One address in three states: mine (write and sign), nobody's or another's (look), reported (the signed report).
"""

from typing import Any

import sqlalchemy as sa
from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from sqlalchemy.orm import Session

from reading_queue import claims, heat_map, sign_off
from reading_queue.auth import Person
from reading_queue.findings import shown_findings
from reading_queue.i18n import language_of, t
from reading_queue.pages import page
from reading_queue.reports import MAX_TEXT, DraftText, draft_of
from reading_queue.viewer import viewer_path
from reading_queue.worklist import READER, TRIAGE_WORDS, RowId, moved_by_triage
from storage.errors import NotFoundError
from storage.patients import names_somebody, same_patient
from storage.rows import Account, Case, Instance, Report, Site, Study, TriageRun
from storage.visible import code_point
from storage.vocabulary import CaseState, Conclusion, ReportState, RunMode, StudyState

router = APIRouter()
_MAX_PRIORS = 20


@router.get("/cases/{case_id}")
def reading_page(case_id: RowId, request: Request, person: Person = Depends(READER)) -> Response:
    """The page."""
    with request.app.state.database.centre() as session:
        row = session.execute(
            sa.select(Case, Study, Site, Account.display_name)
            .join(Study, Study.id == Case.study_id)
            .join(Site, Site.site_id == Case.site_id)
            .outerjoin(Account, Account.id == Case.claimed_by)
            .where(Case.id == case_id, claims.granted(person))
        ).one_or_none()
        if row is None:
            raise NotFoundError(t("reading.no_such_case", language_of(request)))
        case, study, site, holder = row
        values = {
            "case": case,
            "study": study,
            "site": site,
            "holder": holder,
            "complete": study.state is StudyState.COMPLETE,
            "frames": _frames(session, study.id),
            "mine": case.state is CaseState.CLAIMED and case.claimed_by == person.account_id,
            "findings": shown_findings(session, [case_id]).get(case_id, []),
            "minutes_earlier": moved_by_triage(case),
            "priors": _priors(session, person, study),
            "reports": _reports(session, case_id),
            "conclusions": list(Conclusion),
            "viewer": viewer_path(case_id, study.study_instance_uid),
            "lease_s": request.app.state.settings.lease_s,
            "max_text": MAX_TEXT,
            "triage_words": TRIAGE_WORDS,
        }
        values |= _draft(session, case_id, values["reports"])
    return page(request, "reading.html", **values)


def _frames(session: Session, study_id: int) -> int:
    """Pictures in the study: a trace or a report that came along is none, an instance of many frames is many."""
    count = sa.select(sa.func.coalesce(sa.func.sum(Instance.number_of_frames), 0))
    frames: int = session.execute(
        count.where(Instance.study_id == study_id, Instance.is_variant.is_(False))
    ).scalar_one()
    return frames


def _reports(session: Session, case_id: int) -> list[tuple[Report, str]]:
    rows = session.execute(
        sa.select(Report, Account.display_name)
        .join(Account, Account.id == Report.author_id)
        .where(Report.case_id == case_id, Report.state != ReportState.DRAFT)
        .order_by(Report.version.desc())
    )
    return [(report, author) for report, author in rows]


def _draft(session: Session, case_id: int, reports: list[tuple[Report, str]]) -> dict[str, Any]:
    """The text to begin with: the draft, else the last signed version's (images came after it), else nothing."""
    saved = draft_of(session, case_id)
    if saved is not None:
        return {"draft": saved.text, "revision": saved.revision, "saved": saved}
    if reports:
        last = reports[0][0]
        begun = DraftText(last.findings, last.impression, last.conclusion, last.language)
        return {"draft": begun, "revision": 0, "saved": None}
    return {"draft": DraftText(), "revision": 0, "saved": None}


def _priors(session: Session, person: Person, study: Study) -> list[Any]:
    """Other studies of the same patient at the same hospital that this reader may read, newest first.

    A Patient ID that names nobody (empty, noughts) has no priors: they would be somebody else's.
    """
    if not names_somebody(study.patient_id):
        return []
    rows = session.execute(
        sa.select(Study, Case)
        .join(Case, Case.study_id == Study.id)
        .where(
            Study.site_id == study.site_id,
            Study.patient_key == study.patient_key,
            Study.id != study.id,
            claims.granted(person),
        )
        .order_by(Study.study_date.desc(), Study.id.desc())
        .limit(_MAX_PRIORS)
    )
    return [row for row in rows if same_patient(study, row[0])]


@router.get("/cases/{case_id}/checks")
def checks(case_id: RowId, request: Request, person: Person = Depends(READER)) -> Response:
    """Before signing: how many images are here, whether all announced ones are, and what will be printed as codes."""
    state = request.app.state
    with state.database.centre() as session:
        claims.check_granted(session, case_id, person)
        study = session.scalars(sa.select(Study).join(Case, Case.study_id == Study.id).where(Case.id == case_id)).one()
        characters = sign_off.unprintable_in_draft(session, state.settings, person, case_id)
        content = {
            "images": study.instance_count,
            "complete": study.state is StudyState.COMPLETE,
            "unprintable": " ".join(map(code_point, characters)),  # as codes: some would re-order the sentence
        }
    return JSONResponse(content, headers={"Cache-Control": "no-store"})


@router.get("/cases/{case_id}/runs/{run_id}/heat-map.png")
def heat_map_image(case_id: RowId, run_id: RowId, request: Request, person: Person = Depends(READER)) -> Response:
    """A run's heat map as a picture. A shadow run's is not found."""
    with request.app.state.database.centre() as session:
        key = session.execute(
            sa.select(TriageRun.heat_map_key)
            .join(Case, Case.id == TriageRun.case_id)
            .where(
                TriageRun.id == run_id,
                Case.id == case_id,
                TriageRun.mode == RunMode.ACTIVE,
                claims.granted(person),
            )
        ).scalar_one_or_none()
    if key is None:
        raise NotFoundError("No such heat map here")
    picture = heat_map.png(request.app.state.objects.get(key))
    return Response(picture, headers={"Cache-Control": "no-store"}, media_type="image/png")
