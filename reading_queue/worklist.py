"""The worklist: open cases this reader may read, in the policy's order (tier, due time, id), live.

The order is the database's (an index on exactly these columns); this page only shows it and can say why. Search words
are compared as they are: `%` and `_` are letters.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Literal

import sqlalchemy as sa
from fastapi import APIRouter, Depends, Form, Path, Query, Request, Response
from fastapi.responses import JSONResponse
from sqlalchemy.orm import Session

from reading_queue import claims
from reading_queue.auth import Person, require
from reading_queue.findings import ShownFinding, shown_findings
from reading_queue.i18n import language_of, t
from reading_queue.pages import page
from storage.errors import NotFoundError
from storage.rows import OPEN_CASE_STATES, Account, Case, Gateway, ReaderGrant, Site, Study
from storage.vocabulary import CaseState, Role, TriageState

router = APIRouter()
READER = require(Role.READER)
RowId = Annotated[int, Path(ge=1, le=2**63 - 1)]
View = Literal["open", "mine", "reported"]
_MAX_ROWS = 300
_MAX_SEARCH = 64
_AMBER_S = 15 * 60


@dataclass(frozen=True, slots=True)
class WorklistRow:
    """One line of the table."""

    case: Case
    study: Study
    site: Site
    holder_name: str | None
    mine: bool
    findings: list[ShownFinding]
    minutes_earlier: int  # by which triage moved the due time

    @property
    def modality(self) -> str:
        """What was made; reports and notes that came along are not counted."""
        return "/".join(self.study.modalities) or "?"

    @property
    def image_count(self) -> int | None:
        """How many images, where the number says something: not of one file (it may hold many frames) nor of ECGs."""
        return self.study.instance_count if self.study.instance_count > 1 and self.modality != "ECG" else None


@dataclass(frozen=True, slots=True)
class Filter:
    """What of the worklist is asked for."""

    view: View = "open"
    specialty: str = ""
    search: str = ""


def filter_of(
    view: View = "open",
    specialty: str = Query("", max_length=32),
    q: str = Query("", max_length=_MAX_SEARCH),
) -> Filter:
    """The filter in the address."""
    return Filter(view, specialty.replace("\0", ""), " ".join(q.replace("\0", "").split()))


def _conditions(person: Person, chosen: Filter) -> list[sa.ColumnElement[bool]]:
    conditions = [claims.granted(person)]
    if chosen.view == "reported":
        conditions.append(Case.state == CaseState.REPORTED)
    else:
        conditions.append(Case.state.in_(OPEN_CASE_STATES))
    if chosen.view == "mine":
        conditions.append(Case.claimed_by == person.account_id)
    if chosen.specialty:
        conditions.append(Case.specialty == chosen.specialty)
    if chosen.search:
        columns = (Study.patient_name, Study.patient_id, Study.accession_number)
        found = (sa.func.strpos(sa.func.lower(column), chosen.search.lower()) > 0 for column in columns)
        conditions.append(sa.or_(*found))
    return conditions


def rows_of(session: Session, person: Person, chosen: Filter) -> list[WorklistRow]:
    """At most 300 rows: open cases by (tier, due_at, id), reported ones newest first."""
    order = (Case.id.desc(),) if chosen.view == "reported" else (Case.tier, Case.due_at, Case.id)
    found = session.execute(
        sa.select(Case, Study, Site, Account.display_name)
        .join(Study, Study.id == Case.study_id)
        .join(Site, Site.site_id == Case.site_id)
        .outerjoin(Account, Account.id == Case.claimed_by)
        .where(*_conditions(person, chosen))
        .order_by(*order)
        .limit(_MAX_ROWS)
    ).all()
    flags = shown_findings(session, (case.id for case, *_ in found))
    return [
        WorklistRow(
            case=case,
            study=study,
            site=site,
            holder_name=holder,
            mine=case.claimed_by == person.account_id,
            findings=flags.get(case.id, []),
            minutes_earlier=moved_by_triage(case),
        )
        for case, study, site, holder in found
    ]


def moved_by_triage(case: Case) -> int:
    """Minutes by which a model's flag moved the due time, as the policy wrote it down."""
    return max((reason.get("minutes", 0) for reason in case.due_reasons if reason.get("code") == "finding"), default=0)


def _counts(session: Session, person: Person) -> dict[str, int]:
    row = session.execute(
        sa.select(
            sa.func.count().filter(Case.state == CaseState.QUEUED),
            sa.func.count().filter(Case.due_at < sa.func.clock_timestamp()),
            sa.func.count().filter(Case.tier == 0),
            sa.func.count().filter(Case.claimed_by == person.account_id),
        ).where(claims.granted(person), Case.state.in_(OPEN_CASE_STATES))
    ).one()
    return dict(zip(("waiting", "overdue", "first", "mine"), row, strict=True))


def _context(request: Request, person: Person, chosen: Filter) -> dict[str, Any]:
    with request.app.state.database.centre() as session:
        now: datetime = session.execute(sa.select(sa.func.clock_timestamp())).scalar_one()
        specialties = session.scalars(
            sa.select(ReaderGrant.specialty)
            .where(ReaderGrant.account_id == person.account_id)
            .distinct()
            .order_by(ReaderGrant.specialty)
        ).all()
        rows = rows_of(session, person, chosen)
        nothing_yet = not rows and session.execute(sa.select(sa.func.count()).select_from(Study)).scalar_one() == 0
        return {
            "rows": rows,
            "counts": _counts(session, person),
            "specialties": specialties,
            "chosen": chosen,
            "full": len(rows) == _MAX_ROWS,
            "centre_now": now,
            "amber_s": _AMBER_S,
            "nothing_yet": nothing_yet,
            "gateways": session.execute(sa.select(sa.func.count(Gateway.id))).scalar_one(),
            "triage_words": TRIAGE_WORDS,
        }


TRIAGE_WORDS = {
    # DONE without a flag shows nothing: neither "normal" nor "no finding" (design §6).
    TriageState.PENDING: "worklist.triage_pending",
    TriageState.DONE: "worklist.triage_none_shown",
    TriageState.NO_MODEL: "worklist.triage_no_model",
    TriageState.NOT_FOR_MODEL: "worklist.triage_not_for_model",
    TriageState.NOT_TRIAGED: "worklist.triage_not_triaged",
}


@router.get("/worklist")
def worklist_page(request: Request, person: Person = Depends(READER), chosen: Filter = Depends(filter_of)) -> Response:
    """The page."""
    return page(request, "worklist.html", **_context(request, person, chosen))


@router.get("/worklist/rows")
def worklist_rows(request: Request, person: Person = Depends(READER), chosen: Filter = Depends(filter_of)) -> Response:
    """Counts and table body alone, for live changes and for search."""
    return page(request, "worklist_rows.html", **_context(request, person, chosen))


@router.get("/worklist/{case_id}/order")
def explain_order(case_id: RowId, request: Request, person: Person = Depends(READER)) -> Response:
    """Why the case stands where it stands, in sentences."""
    with request.app.state.database.centre() as session:
        case = session.scalars(sa.select(Case).where(Case.id == case_id, claims.granted(person))).one_or_none()
        if case is None:
            raise NotFoundError("No such case here")
        before = session.execute(
            sa.select(sa.func.count()).where(
                claims.granted(person),
                Case.state.in_(OPEN_CASE_STATES),
                Case.specialty == case.specialty,
                sa.tuple_(Case.tier, Case.due_at, Case.id) < sa.tuple_(case.tier, case.due_at, case.id),
            )
        ).scalar_one()
    return page(request, "order.html", case=case, before=before)


@router.post("/cases/{case_id}/claim")
def claim_case(case_id: RowId, request: Request, person: Person = Depends(READER)) -> Response:
    """Take the case: JSON with the lease and where to read it. 409 `taken` says who has it."""
    state = request.app.state
    return _claimed(claims.claim(state.database, case_id, person, lease_s=state.settings.lease_s))


@router.post("/worklist/next")
def claim_next(
    request: Request, person: Person = Depends(READER), specialty: str = Form("", max_length=32)
) -> Response:
    """Take the case that comes first. 404 when nothing waits."""
    state = request.app.state
    won = claims.next_case(
        state.database, person, lease_s=state.settings.lease_s, specialty=specialty.replace("\0", "")
    )
    if won is None:
        raise NotFoundError(t("worklist.nothing_waits", language_of(request)))
    return _claimed(won)


@router.post("/cases/{case_id}/heartbeat")
def keep_lease(
    case_id: RowId, request: Request, person: Person = Depends(READER), lease: str = Form(max_length=64)
) -> Response:
    """Keep the lease alive. 409 `lease-lost`."""
    state = request.app.state
    until, new_images = claims.heartbeat(
        state.database, case_id, person, lease.replace("\0", ""), lease_s=state.settings.lease_s
    )
    return JSONResponse({"expires_at": until.isoformat(), "new_images": new_images})


@router.post("/cases/{case_id}/hand-back")
def hand_back(
    case_id: RowId, request: Request, person: Person = Depends(READER), lease: str = Form(max_length=64)
) -> Response:
    """Give the case back. 409 `lease-lost`."""
    claims.hand_back(request.app.state.database, case_id, person, lease.replace("\0", ""))
    return JSONResponse({"location": "/worklist"})


def _claimed(won: claims.Claim) -> Response:
    content = {
        "case_id": won.case_id,
        "lease": won.lease_token,
        "expires_at": won.expires_at.isoformat(),
        "location": f"/cases/{won.case_id}",
    }
    return JSONResponse(content)
