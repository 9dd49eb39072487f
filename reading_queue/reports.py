"""Drafts: every pause saves, every saved text is kept, and nothing is overwritten unseen (lifecycle u).

A save names the lease and the revision it started from. Lease gone: 409 `lease-lost`, the page keeps the text. Another
tab or reader saved since: 409 `revision`, with what is there now, and a person chooses. Routes of the report of a case.
"""

from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from fastapi import APIRouter, Depends, Form, Request, Response
from fastapi.responses import JSONResponse
from sqlalchemy.orm import Session

from reading_queue import claims, sign_off
from reading_queue.auth import Person, require
from reading_queue.i18n import language_of, t
from reading_queue.pages import page
from reading_queue.problems import BadRequestError, ConflictError
from reading_queue.worklist import READER, RowId
from storage.errors import LeaseLostError, NotFoundError
from storage.objects import Objects
from storage.rows import Account, Case, DraftVersion, Report
from storage.states import Transition
from storage.transitions import account_actor, born
from storage.vocabulary import Conclusion, ReportState, Role

router = APIRouter()
MAX_TEXT = 20_000  # characters of each text: some ten printed pages
_LANGUAGES = ("zh", "en", "both")


@dataclass(frozen=True, slots=True)
class DraftText:
    """What a reader writes."""

    findings: str = ""
    impression: str = ""
    conclusion: Conclusion | None = None
    language: str = "zh"

    def as_row(self) -> dict[str, Any]:
        """As kept in `draft_version.text`."""
        return asdict(self) | {"conclusion": self.conclusion.value if self.conclusion else None}


@dataclass(frozen=True, slots=True)
class SavedDraft:
    """The draft as it stands."""

    report_id: int
    version: int
    revision: int
    text: DraftText
    author_id: int
    author_name: str
    updated_at: datetime


def clean(text: str) -> str:
    """Text that PostgreSQL and a PDF can hold: no NUL, no half of a surrogate pair, LF line ends."""
    plain = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")
    return plain.encode("utf-8", "replace").decode("utf-8")


def draft_of(session: Session, case_id: int) -> SavedDraft | None:
    """The case's draft, if there is one."""
    row = session.execute(
        sa.select(Report, Account.display_name)
        .join(Account, Account.id == Report.author_id)
        .where(Report.case_id == case_id, Report.state == ReportState.DRAFT)
    ).one_or_none()
    if row is None:
        return None
    report, author = row
    written = DraftText(report.findings, report.impression, report.conclusion, report.language)
    return SavedDraft(report.id, report.version, report.revision, written, report.author_id, author, report.updated_at)


def save_draft(
    session: Session, case_id: int, person: Person, lease_token: str, revision: int, written: DraftText
) -> SavedDraft:
    """Save a draft; the first save makes it (lifecycle u). `revision` is the one the text was written on, 0 for none.

    Raises LeaseLostError, ConflictError `signed` or `revision` (with the saved text), NotFoundError without a grant.
    """
    study_id = claims.lock_study_of(session, case_id)
    case = session.scalars(sa.select(Case).where(Case.id == case_id, claims.granted(person))).one_or_none()
    if case is None:
        raise NotFoundError("No such case here")
    if session.scalar(sa.select(Case.id).where(claims.held(case_id, person, lease_token))) is None:
        raise LeaseLostError("The case is not in your hands any more")
    saved = draft_of(session, case_id)
    if (saved.revision if saved else 0) != revision:
        raise _conflict(saved)
    if saved is None:
        report_id = _begin(session, case, study_id, person)
        version = session.execute(sa.select(Report.version).where(Report.id == report_id)).scalar_one()
    else:
        report_id, version = saved.report_id, saved.version
        if saved.text == written and saved.author_id == person.account_id:
            return saved
    row = session.execute(
        sa.update(Report)
        .where(Report.id == report_id)
        .values(
            findings=written.findings,
            impression=written.impression,
            conclusion=written.conclusion,
            language=written.language,
            author_id=person.account_id,
            revision=revision + 1,
            updated_at=sa.func.clock_timestamp(),
        )
        .returning(Report.updated_at)
    ).scalar_one()
    session.execute(
        sa.insert(DraftVersion).values(
            site_id=case.site_id,
            report_id=report_id,
            revision=revision + 1,
            author_id=person.account_id,
            text=written.as_row(),
        )
    )
    return SavedDraft(report_id, version, revision + 1, written, person.account_id, person.display_name, row)


def _begin(session: Session, case: Case, study_id: int, person: Person) -> int:
    latest = session.execute(sa.select(sa.func.max(Report.version)).where(Report.case_id == case.id)).scalar_one()
    report_id = session.execute(
        sa.insert(Report)
        .values(
            site_id=case.site_id,
            study_id=study_id,
            case_id=case.id,
            version=(latest or 0) + 1,
            state=ReportState.DRAFT,
            author_id=person.account_id,
        )
        .returning(Report.id)
    ).scalar_one()
    born(session, Transition.REPORT_DRAFTED, study_id, report_id, actor=account_actor(person.account_id))
    return report_id


def _conflict(saved: SavedDraft | None) -> ConflictError:
    if saved is None:  # the draft was signed, or never was
        return ConflictError("There is no draft of that revision: the report was signed", "signed")
    extra = {
        "revision": saved.revision,
        "author": saved.author_name,
        "saved_at": saved.updated_at.isoformat(),
        "text": saved.text.as_row(),
    }
    return ConflictError("The draft was saved elsewhere since", "revision", **extra)


def text_of(
    request: Request,
    findings: str = Form(""),
    impression: str = Form(""),
    conclusion: str = Form(""),
    language: str = Form("zh"),
) -> DraftText:
    """The text of a form. Raises BadRequestError for one that is too long or a choice that is none."""
    written = DraftText(clean(findings), clean(impression), None, language)
    if max(len(written.findings), len(written.impression)) > MAX_TEXT:
        raise BadRequestError(t("reports.too_long", language_of(request), most=MAX_TEXT))
    if language not in _LANGUAGES or conclusion not in {"", *Conclusion}:
        raise BadRequestError("conclusion, language")
    return replace(written, conclusion=Conclusion(conclusion) if conclusion else None)


@router.post("/cases/{case_id}/draft")
def save(
    case_id: RowId,
    request: Request,
    person: Person = Depends(READER),
    written: DraftText = Depends(text_of),
    lease: str = Form(max_length=64),
    revision: int = Form(ge=0, le=2**31 - 1),
) -> Response:
    """Save the draft: JSON with the new revision."""
    with request.app.state.database.centre() as session:
        saved = save_draft(session, case_id, person, clean(lease), revision, written)
    return JSONResponse({"revision": saved.revision, "saved_at": saved.updated_at.isoformat()})


@router.get("/cases/{case_id}/drafts")
def earlier_texts(case_id: RowId, request: Request, person: Person = Depends(READER)) -> Response:
    """Earlier texts of the case's draft, newest first, for taking a sentence back."""
    with request.app.state.database.centre() as session:
        claims.check_granted(session, case_id, person)
        rows = session.execute(
            sa.select(DraftVersion, Account.display_name)
            .join(Report, Report.id == DraftVersion.report_id)
            .join(Account, Account.id == DraftVersion.author_id)
            .where(Report.case_id == case_id, Report.state == ReportState.DRAFT)
            .order_by(DraftVersion.revision.desc())
            .limit(50)
        ).all()
    return page(request, "drafts.html", versions=rows)


@router.post("/cases/{case_id}/sign")
def sign(
    case_id: RowId,
    request: Request,
    person: Person = Depends(READER),
    lease: str = Form(max_length=64),
    revision: int = Form(ge=0, le=2**31 - 1),
    images: int = Form(ge=0, le=2**31 - 1),
    incomplete: bool = Form(default=False),
    pin: str = Form(max_length=128),
) -> Response:
    """Sign the saved draft. JSON says where the report is; problem details say why not, and then nothing changed.

    `images` is how many the page showed, `incomplete` that the reader signs although more are on their way.
    """
    state = request.app.state
    order = sign_off.Order(case_id, clean(lease), revision, images, incomplete, language_of(request))
    report_id = sign_off.sign(state.database, state.objects, state.settings, person, order, clean(pin))
    return JSONResponse({"report_id": report_id, "location": f"/cases/{case_id}"})


@router.get("/reports/{report_id}/pdf")
def signed_pdf(
    report_id: RowId, request: Request, person: Person = Depends(require(Role.READER, Role.QUALITY))
) -> Response:
    """The signed PDF, for the reader who may read the case and for the quality officer."""
    allowed = sa.true() if person.role is Role.QUALITY else claims.granted(person)
    with request.app.state.database.centre() as session:
        report = session.scalars(
            sa.select(Report)
            .join(Case, Case.id == Report.case_id)
            .where(Report.id == report_id, Report.state != ReportState.DRAFT, allowed)
        ).one_or_none()
    return pdf_response(request.app.state.objects, report)


def pdf_response(objects: Objects, report: Report | None) -> Response:
    """The PDF of a signed report, its digest checked. Raises NotFoundError, ObjectStoreError."""
    if report is None:
        raise NotFoundError("No such report here")
    data = sign_off.signed_object(objects, report.pdf_key, report.pdf_sha256)
    replaced = "-superseded" if report.state is ReportState.SUPERSEDED else ""
    headers = {
        "Cache-Control": "no-store",
        "Content-Disposition": f'inline; filename="report-{report.id}-v{report.version}{replaced}.pdf"',
        # Of a policy's directives a PDF needs none; `sandbox` or object-src would keep the browser's viewer away.
        "Content-Security-Policy": "frame-ancestors 'self'",
    }
    return Response(data, headers=headers, media_type="application/pdf")
