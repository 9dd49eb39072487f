"""Reports going home: the feed, the objects, the acknowledgements, and that a county sees its own alone.

The reports here are rows and objects as signing leaves them; signing itself has its own tests.
"""

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import httpx
import psycopg
import pytest
import sqlalchemy as sa

from storage import transitions, wire
from storage.database import Database, psycopg_dsn
from storage.objects import Objects
from storage.rows import Account, Event, FeedEntry, Report
from storage.states import Transition
from storage.transitions import SYSTEM, verify_chain
from storage.vocabulary import CaseState, Conclusion, ReportState, Role
from tests.centre import Sites, add_case, add_study
from tests.ingest_peer import Ingest, Peer, county, ingest, ingest_server, other_county

__all__ = ["county", "ingest", "ingest_server", "other_county"]

OBJECTS = {"pdf": b"%PDF-1.7 report", "encapsulated": b"encapsulated", "sr": b"structured report"}


@pytest.fixture
def author(database: Database, sites: Sites) -> int:
    with database.centre() as session:
        account = Account(
            site_id=sites.centre, username="reader", display_name="Reader", role=Role.READER, password_hash=""
        )
        session.add(account)
        session.flush()
        return account.id


def signed_report(
    database: Database, objects: Objects, site_id: int, author: int, study_instance_uid: str = "1.2.3"
) -> int:
    """A report as signing leaves it: objects under lock, row signed, entry on the feed, event written."""
    with database.centre() as session:
        study_id = add_study(session, site_id, study_instance_uid)
        case_id = add_case(session, study_id, state=CaseState.REPORTED)
        report = Report(
            site_id=site_id, study_id=study_id, case_id=case_id, version=1, state=ReportState.DRAFT, author_id=author
        )
        session.add(report)
        session.flush()
        transitions.born(session, Transition.REPORT_DRAFTED, study_id, report.id, actor=SYSTEM)
        values: dict[str, object] = {"signed_at": datetime.now(UTC), "conclusion": Conclusion.CRITICAL}
        for kind, content in OBJECTS.items():
            key = f"reports/{site_id}/{report.id}/v1-{kind}"
            objects.put_locked(key, content)
            values |= {f"{kind}_key": key, f"{kind}_sha256": hashlib.sha256(content).digest()}
        session.add(FeedEntry(site_id=site_id, report_id=report.id))
        transitions.move(session, Transition.REPORT_SIGNED, report.id, actor=SYSTEM, values=values)
        return report.id


def read(answer: httpx.Response) -> wire.Feed:
    assert answer.status_code == 200, answer.text
    return wire.Feed.model_validate_json(answer.content)


def poll(peer: Peer, cursor: int = 0, wait_s: float = 0) -> wire.Feed:
    return read(peer.http.get("/gateway/v1/feed", params={"cursor": cursor, "wait_s": wait_s}))


def acknowledge(peer: Peer, report_id: int, step: str, **values: object) -> httpx.Response:
    message = wire.Acknowledge.model_validate(
        {"report_id": report_id, "step": step, "at": datetime(2026, 11, 23, 9, tzinfo=UTC), **values}
    )
    return peer.post("acknowledge", message)


def events(database: Database, report_id: int) -> list[str]:
    with database.centre() as session:
        study_id = session.scalars(sa.select(Report.study_id).where(Report.id == report_id)).one()
        verify_chain(session, study_id)
        query = sa.select(Event.name).where(Event.subject == "report", Event.subject_id == report_id)
        return list(session.scalars(query.order_by(Event.sequence)))


def test_a_signed_report_comes_home_with_its_objects_and_the_countys_own_identifiers(
    county: Peer, database: Database, objects: Objects, sites: Sites, author: int
) -> None:
    report_id = signed_report(database, objects, sites.county, author)
    feed = poll(county)
    item = feed.items[0]
    assert (item.report_id, item.study_instance_uid, item.patient_id, item.accession_number, item.critical) == (
        report_id,
        "1.2.3",
        "P1",
        "A1",
        True,
    )
    for kind, content in OBJECTS.items():
        answer = county.http.get(f"/gateway/v1/reports/{report_id}/{kind}")
        assert answer.content == content
        assert hashlib.sha256(content).hexdigest() == getattr(item, f"{kind}_sha256")
    assert poll(county, feed.cursor) == wire.Feed(cursor=feed.cursor)


def test_another_hospitals_report_is_not_found_and_not_on_the_feed(
    other_county: Peer, database: Database, objects: Objects, sites: Sites, author: int
) -> None:
    report_id = signed_report(database, objects, sites.county, author)
    assert poll(other_county).items == ()
    for kind in OBJECTS:
        assert other_county.http.get(f"/gateway/v1/reports/{report_id}/{kind}").status_code == 404
    for step in ("received", "delivered", "failed", "opened"):
        assert acknowledge(other_county, report_id, step).status_code == 404
    assert events(database, report_id) == ["report.drafted", "report.signed"]


def test_a_draft_is_not_found(county: Peer, database: Database, sites: Sites, author: int) -> None:
    with database.centre() as session:
        study_id = add_study(session, sites.county)
        case_id = add_case(session, study_id, state=CaseState.CLAIMED)
        values = {"case_id": case_id, "version": 1, "state": ReportState.DRAFT, "author_id": author}
        session.add(Report(site_id=sites.county, study_id=study_id, **values))
    assert county.http.get("/gateway/v1/reports/1/pdf").status_code == 404
    assert acknowledge(county, 1, "opened").status_code == 404


def test_a_long_poll_wakes_when_a_report_is_signed(
    county: Peer, ingest: Ingest, database: Database, objects: Objects, sites: Sites, author: int
) -> None:
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(poll, county, 0, wire.FEED_WAIT_MAX_S)
        other = ingest.peer("b")
        assert poll(other, 0, 0).items == ()
        report_id = signed_report(database, objects, sites.county, author)
        assert [item.report_id for item in waiting.result(timeout=wire.FEED_WAIT_MAX_S).items] == [report_id]


def test_an_entry_committed_after_a_later_one_is_not_passed_over(
    county: Peer, database: Database, objects: Objects, sites: Sites, author: int
) -> None:
    """Ids are given before commit: the feed must wait for the slow writer of the lower id."""
    early = signed_report(database, objects, sites.county, author, "1.2.3")
    late = signed_report(database, objects, sites.county, author, "1.2.4")
    with database.centre() as session:
        session.execute(sa.delete(FeedEntry))
    slow = psycopg.connect(psycopg_dsn(database.engine.url.render_as_string(hide_password=False)))
    insert = "INSERT INTO feed_entry (site_id, report_id) VALUES (%s, %s)"
    slow.execute("SELECT set_config('app.site', 'all', true)")
    slow.execute(insert, (sites.county, early))
    with database.centre() as session:
        session.add(FeedEntry(site_id=sites.county, report_id=late))
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(poll, county)
        # The poll is held by the slow writer's lock; only when PostgreSQL says so does the writer commit.
        blocked = sa.text("SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'feed_entry'::regclass")
        while True:
            with database.centre() as session:
                if session.execute(blocked).scalar_one():
                    break
        slow.commit()
        slow.close()
        assert [item.report_id for item in waiting.result(timeout=30).items] == [early, late]


def test_a_superseded_report_is_passed_over_and_the_cursor_with_it(
    county: Peer, database: Database, objects: Objects, sites: Sites, author: int
) -> None:
    report_id = signed_report(database, objects, sites.county, author)
    with database.centre() as session:
        transitions.move(session, Transition.REPORT_SUPERSEDED, report_id, actor=SYSTEM)
    feed = poll(county)
    assert feed.items == () and feed.cursor > 0


def test_every_step_home_is_recorded_once_however_often_it_is_told(
    county: Peer, database: Database, objects: Objects, sites: Sites, author: int
) -> None:
    report_id = signed_report(database, objects, sites.county, author)
    steps = ("received", "received", "failed", "failed", "delivered", "delivered", "received", "opened", "opened")
    for step in steps:
        answer = acknowledge(county, report_id, step, detail="PACS answered A700")
        assert wire.AcknowledgeAnswer.model_validate_json(answer.content).recorded
    acknowledge(county, report_id, "failed", detail="another reason\0")
    assert events(database, report_id) == [
        "report.drafted",
        "report.signed",
        "report.received",
        "report.delivery_failed",
        "report.delivered",
        "report.opened",
        "report.delivery_failed",
    ]
    with database.centre() as session:
        report = session.get_one(Report, report_id)
        assert report.state is ReportState.DELIVERED
        assert report.opened_at == datetime(2026, 11, 23, 9, tzinfo=UTC)


def test_delivered_without_received_counts_as_both(
    county: Peer, database: Database, objects: Objects, sites: Sites, author: int
) -> None:
    report_id = signed_report(database, objects, sites.county, author)
    acknowledge(county, report_id, "delivered")
    assert events(database, report_id)[-2:] == ["report.received", "report.delivered"]


def test_a_superseded_report_that_was_delivered_all_the_same_is_noted(
    county: Peer, database: Database, objects: Objects, sites: Sites, author: int
) -> None:
    report_id = signed_report(database, objects, sites.county, author)
    with database.centre() as session:
        transitions.move(session, Transition.REPORT_SUPERSEDED, report_id, actor=SYSTEM)
    for _ in range(2):
        assert acknowledge(county, report_id, "delivered").status_code == 200
    assert events(database, report_id)[-1] == "report.superseded_delivered"
    with database.centre() as session:
        assert session.get_one(Report, report_id).state is ReportState.SUPERSEDED


def test_two_acknowledgements_at_once_make_one_event(
    county: Peer, database: Database, objects: Objects, sites: Sites, author: int
) -> None:
    report_id = signed_report(database, objects, sites.county, author)
    gate = threading.Barrier(4)

    def tell(_: int) -> int:
        gate.wait()
        return acknowledge(county, report_id, "delivered").status_code

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(tell, range(4))) == {200}
    assert events(database, report_id)[-2:] == ["report.received", "report.delivered"]


def test_a_damaged_report_object_is_not_handed_out(
    county: Peer, database: Database, objects: Objects, sites: Sites, author: int
) -> None:
    report_id = signed_report(database, objects, sites.county, author)
    with database.centre() as session:
        session.execute(sa.update(Report).where(Report.id == report_id).values(pdf_sha256=bytes(32)))
    answer = county.http.get(f"/gateway/v1/reports/{report_id}/pdf")
    assert answer.status_code == 503 and answer.headers["retry-after"]


def test_only_the_three_kinds_of_object_exist(county: Peer) -> None:
    assert county.http.get("/gateway/v1/reports/1/docx").status_code == 400
    assert county.http.get("/gateway/v1/feed?cursor=-1").status_code == 400
