"""Reports going home: the county's feed (long poll), the report objects, and what became of them at the county.

Who may call: an enrolled gateway, for its own site's reports; another site's are not found. A waiting poll holds no
thread and no connection of the pool: it sleeps on the process's LISTEN connection, and looks by itself now and then.
"""

import asyncio
import hashlib
from collections.abc import Callable
from typing import Annotated, Literal

import sqlalchemy as sa
import structlog
from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response
from sqlalchemy.orm import Session

from routing.gateways import Caller, CallingGateway
from storage import transitions
from storage.database import Database
from storage.errors import NotFoundError, ObjectStoreError
from storage.notify import Hub
from storage.objects import Objects
from storage.rows import Event, FeedEntry, Report, Study
from storage.states import Transition
from storage.vocabulary import Conclusion, ReportState
from storage.wire import FEED_WAIT_MAX_S, Acknowledge, AcknowledgeAnswer, Feed, FeedItem

_LOG = structlog.get_logger()
_BATCH = 100
_LOOK_AGAIN_S = 5.0
"""A notification is lost when its connection is: so the tables are asked at least this often."""
_ON_THE_WAY = (ReportState.SIGNED, ReportState.RECEIVED, ReportState.DELIVERED)

ReportKind = Literal["pdf", "encapsulated", "sr"]
_MEDIA_TYPE = {"pdf": "application/pdf", "encapsulated": "application/dicom", "sr": "application/dicom"}

router = APIRouter(prefix="/gateway/v1")


@router.get("/feed")
async def feed(
    caller: CallingGateway,
    request: Request,
    cursor: Annotated[int, Query(ge=0)] = 0,
    wait_s: Annotated[float, Query(ge=0, le=3600)] = FEED_WAIT_MAX_S,
) -> Feed:
    """Signed reports of the caller's site after `cursor`; waits up to `wait_s` (at most 25 s) for one."""
    state = request.app.state
    hub: Hub = state.hub
    loop = asyncio.get_running_loop()
    deadline = loop.time() + min(wait_s, FEED_WAIT_MAX_S)
    async with hub.waiter(f"{caller.site_id} report.") as changed:
        while True:
            changed.clear()
            found = await run_in_threadpool(read_feed, state.database, caller.site_id, cursor)
            left_s = deadline - loop.time()
            if found.cursor != cursor or left_s <= 0 or state.stopping.is_set():
                return found
            try:
                await asyncio.wait_for(changed.wait(), min(left_s, _LOOK_AGAIN_S))
            except TimeoutError:
                continue


def read_feed(database: Database, site_id: int, cursor: int) -> Feed:
    """The next entries of a site's feed. A superseded report is passed over: its successor has an entry of its own."""
    with database.county(site_id) as session:
        newer = sa.select(FeedEntry.id).where(FeedEntry.site_id == site_id, FeedEntry.id > cursor).limit(1)
        if session.execute(newer).one_or_none() is None:
            return Feed(cursor=cursor)
        # Ids are taken before commits: entry 6 may be visible while 5 is not, and a cursor of 6 would pass 5 for ever.
        # This waits for the writers under way, so that all ids below the highest seen are settled.
        session.execute(sa.text("LOCK TABLE feed_entry IN SHARE MODE"))
        rows = session.execute(
            sa.select(FeedEntry.id, Report, Study)
            .join(Report, Report.id == FeedEntry.report_id)
            .join(Study, Study.id == Report.study_id)
            .where(FeedEntry.site_id == site_id, FeedEntry.id > cursor)
            .order_by(FeedEntry.id)
            .limit(_BATCH)
        ).all()
        items = [_item(entry_id, report, study) for entry_id, report, study in rows if report.state in _ON_THE_WAY]
        return Feed(items=tuple(items), cursor=max((row[0] for row in rows), default=cursor))


def _item(entry_id: int, report: Report, study: Study) -> FeedItem:
    digests = (report.pdf_sha256, report.encapsulated_sha256, report.sr_sha256)
    pdf, encapsulated, sr = ((digest or b"").hex() for digest in digests)
    if report.signed_at is None:
        raise NotFoundError(f"Report {report.id} is on the feed and not signed")
    return FeedItem(
        cursor=entry_id,
        report_id=report.id,
        study_instance_uid=study.study_instance_uid,
        accession_number=study.accession_number,
        patient_id=study.patient_id,
        version=report.version,
        signed_at=report.signed_at,
        pdf_sha256=pdf,
        encapsulated_sha256=encapsulated,
        sr_sha256=sr,
        critical=report.conclusion is Conclusion.CRITICAL,
    )


@router.get("/reports/{report_id}/{kind}")
def report_object(report_id: int, kind: ReportKind, caller: CallingGateway, request: Request) -> Response:
    """One object of a signed report of the caller's site (else 404), its digest checked."""
    state = request.app.state
    with state.database.county(caller.site_id) as session:
        key, digest = _object_of(session, caller, report_id, kind)
    objects: Objects = state.objects
    content = objects.get(key, locked=True)
    if hashlib.sha256(content).digest() != digest:
        _LOG.error("feed.damaged", site_id=caller.site_id, report_id=report_id, kind=kind)
        raise ObjectStoreError("The stored report does not have the digest it was signed with")
    return Response(content, media_type=_MEDIA_TYPE[kind])


def _object_of(session: Session, caller: Caller, report_id: int, kind: ReportKind) -> tuple[str, bytes]:
    report = _report(session, caller, report_id)
    places = {
        "pdf": (report.pdf_key, report.pdf_sha256),
        "encapsulated": (report.encapsulated_key, report.encapsulated_sha256),
        "sr": (report.sr_key, report.sr_sha256),
    }
    key, digest = places[kind]
    if key is None or digest is None:
        raise NotFoundError("No such report object")
    return key, digest


def _report(session: Session, caller: Caller, report_id: int, *, lock: bool = False) -> Report:
    """A signed report of the caller's site, with `lock` its study's row locked first. Raises NotFoundError."""
    query = sa.select(Report).where(
        Report.id == report_id, Report.site_id == caller.site_id, Report.state != ReportState.DRAFT
    )
    report = session.scalars(query).one_or_none()
    if report is None:
        raise NotFoundError("No such report")
    if lock:
        session.execute(sa.select(Study.id).where(Study.id == report.study_id).with_for_update())
        session.refresh(report, with_for_update=True)
    return report


@router.post("/acknowledge")
def acknowledge(message: Acknowledge, caller: CallingGateway, request: Request) -> AcknowledgeAnswer:
    """A step of a report at the county, of the caller's site (else 404). The same step again changes nothing."""
    with request.app.state.database.county(caller.site_id) as session:
        report = _report(session, caller, message.report_id, lock=True)
        return AcknowledgeAnswer(recorded=_STEPS[message.step](session, caller, report, message))


def _details(message: Acknowledge) -> dict[str, str]:
    """The gateway's clock and words; the event's own time is the centre's."""
    return {"gateway_at": message.at.isoformat(), "detail": message.detail.replace("\0", "")}


def _received(session: Session, caller: Caller, report: Report, message: Acknowledge) -> bool:
    if report.state is ReportState.SIGNED:
        details = _details(message)
        transitions.move(session, Transition.REPORT_RECEIVED, report.id, actor=caller.actor, details=details)
    return True


def _delivered(session: Session, caller: Caller, report: Report, message: Acknowledge) -> bool:
    """A superseded report that reached the PACS all the same is noted, not moved: its successor is on the way."""
    if report.state is ReportState.DELIVERED:
        return True
    if report.state is ReportState.SUPERSEDED:
        return _once(session, caller, report, message, "report.superseded_delivered")
    _received(session, caller, report, message)  # delivered includes received, whose message may be lost
    transitions.move(session, Transition.REPORT_DELIVERED, report.id, actor=caller.actor, details=_details(message))
    return True


def _failed(session: Session, caller: Caller, report: Report, message: Acknowledge) -> bool:
    return _once(session, caller, report, message, "report.delivery_failed")


def _opened(session: Session, caller: Caller, report: Report, message: Acknowledge) -> bool:
    if report.opened_at is None:
        session.execute(sa.update(Report).where(Report.id == report.id).values(opened_at=message.at))
        transitions.note(
            session,
            report.study_id,
            "report.opened",
            subject="report",
            subject_id=report.id,
            actor=caller.actor,
            details=_details(message),
        )
    return True


def _once(session: Session, caller: Caller, report: Report, message: Acknowledge, name: str) -> bool:
    """Note an event unless the very same one was noted before."""
    details = _details(message)
    before = sa.select(Event.id).where(
        Event.study_id == report.study_id,
        Event.name == name,
        Event.subject_id == report.id,
        Event.details == details,
    )
    if session.execute(before.limit(1)).one_or_none() is None:
        transitions.note(
            session,
            report.study_id,
            name,
            subject="report",
            subject_id=report.id,
            actor=caller.actor,
            details=details,
        )
    return True


_STEPS: dict[str, Callable[[Session, Caller, Report, Acknowledge], bool]] = {
    "received": _received,
    "delivered": _delivered,
    "failed": _failed,
    "opened": _opened,
}
