"""The county's page: the five steps, its own studies only, the report opened once."""

import re
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa

from reading_queue.county import steps_of
from reading_queue.turnaround import Choice, studies
from storage.rows import Case, Gateway, Report, Study
from storage.states import Transition
from storage.transitions import SYSTEM, move
from storage.vocabulary import CaseState, ReportState, StudyState
from tests.centre import add_study
from tests.web import Browser, Web, signing_pki, web

__all__ = ["signing_pki", "web"]

NOW = datetime.now(UTC)


def study(state: StudyState, here: int = 0, expected: int | None = None) -> Study:
    return Study(state=state, instance_count=here, expected_count=expected, first_received_at=NOW)


@pytest.mark.parametrize(
    ("of", "case", "report", "announced", "states", "upload"),
    [
        (study(StudyState.RECEIVING, 37), None, None, 64, "done now todo todo todo", "37/64"),
        (study(StudyState.RECEIVING, 37, 70), None, None, 40, "done now todo todo todo", "37/70"),
        (study(StudyState.COMPLETE, 64, 64), None, None, 64, "done done done todo todo", "64/64"),
        (study(StudyState.COMPLETE, 64), Case(state=CaseState.QUEUED), None, 64, "done done done now todo", "64/64"),
        (study(StudyState.COMPLETE, 64), Case(state=CaseState.CLAIMED), None, 64, "done done done now todo", "64/64"),
        (study(StudyState.COMPLETE, 1), Case(state=CaseState.REPORTED), Report(state=ReportState.SIGNED), 1,
         "done done done done now", "1/1"),
        (study(StudyState.COMPLETE, 1), Case(state=CaseState.REPORTED), Report(state=ReportState.RECEIVED), 1,
         "done done done done now", "1/1"),
        (study(StudyState.COMPLETE, 1), Case(state=CaseState.REPORTED), Report(state=ReportState.DELIVERED), 1,
         "done done done done done", "1/1"),
        (study(StudyState.HELD, 1), Case(state=CaseState.SUSPENDED), None, 1, "done done stop todo todo", "1/1"),
        # More images came after the report: it is uploading again, and the first report stays at hand.
        (study(StudyState.RECEIVING, 1), Case(state=CaseState.QUEUED), Report(state=ReportState.DELIVERED), 2,
         "done now todo todo done", "1/2"),
    ],
)  # fmt: skip
def test_the_five_steps(
    of: Study, case: Case | None, report: Report | None, announced: int, states: str, upload: str
) -> None:
    steps = steps_of(of, case, report, announced, None)
    assert " ".join(step.state for step in steps) == states
    assert steps[1].note == upload


def test_a_hospital_sees_its_own_studies_and_no_other(web: Web) -> None:
    for uid, site, name in (("1.1", web.sites.county, "本院"), ("1.1", web.sites.other_county, "他院")):
        web.case(uid, site_id=site, patient_name=f"X={name}", patient_id="SAME")
    for username, own, other in (("clinician-a", "本院", "他院"), ("clinician-b", "他院", "本院")):
        for path in ("/county", "/county/rows", "/county?q=SAME"):
            html = web.sign_in(username).get(path).text
            assert own in html and f"{other} (X)" not in html


def test_an_unfinished_study_of_last_week_stays_on_todays_page_and_a_finished_one_does_not(web: Web) -> None:
    old, done = web.case("1.1", patient_name="A=未完"), web.case("1.2", patient_name="B=已完")
    report_id = web.signed(web.sign_in("reader-a"), done)
    with web.database.centre() as session:
        move(session, Transition.REPORT_RECEIVED, report_id, actor=SYSTEM)
        move(session, Transition.REPORT_DELIVERED, report_id, actor=SYSTEM)
        week = NOW - timedelta(days=7)
        session.execute(sa.update(Study).values(first_received_at=week))
    assert old != done
    browser = web.sign_in("radiographer-a")
    today = browser.get("/county").text
    assert "未完" in today and "已完" not in today
    assert "已完" in browser.get(f"/county?day={week.astimezone().date() + timedelta(days=0)}").text


@pytest.mark.parametrize("day", ["2026-13-99", "x" * 10, "0001-01-01", "9999-12-31", "٢٠٢٦-١١-٢٣"])
def test_a_day_that_is_none_is_today(web: Web, day: str) -> None:
    web.case("1.1")
    assert "张三" in web.sign_in("clinician-a").client.get("/county", params={"day": day}).text


def test_a_report_is_opened_once_and_by_whom(web: Web) -> None:
    case_id = web.case("1.1")
    report_id = web.signed(web.sign_in("reader-a"), case_id, conclusion="critical")
    clinician, colleague = web.sign_in("clinician-a"), web.sign_in("radiographer-a")
    assert "危急值，尚未打开" in clinician.get("/county").text
    first = clinician.get(f"/county/reports/{report_id}/pdf")
    assert first.content.startswith(b"%PDF-") and first.headers["content-disposition"].startswith("inline")
    assert colleague.get(f"/county/reports/{report_id}/pdf").content == first.content
    opened = web.events("report.opened")
    assert [event.actor for event in opened] == [f"account:{web.accounts['clinician-a']}"]
    report = web.report(report_id)
    assert report.opened_by == web.accounts["clinician-a"] and report.opened_at is not None
    assert "危急值，尚未打开" not in clinician.get("/county").text


def test_another_hospitals_report_and_a_draft_are_not_found(web: Web) -> None:
    case_id = web.case("1.1")
    reader = web.sign_in("reader-a")
    report_id = web.signed(reader, case_id)
    assert web.sign_in("clinician-b").get(f"/county/reports/{report_id}/pdf").status_code == 404
    draft_case = web.case("1.2")
    web.report_text(reader, draft_case, reader.claim(draft_case))
    with web.database.centre() as session:
        draft_id = session.execute(sa.select(Report.id).where(Report.state == ReportState.DRAFT)).scalar_one()
    assert web.sign_in("clinician-a").get(f"/county/reports/{draft_id}/pdf").status_code == 404
    assert web.events("report.opened") == []


def test_a_stored_report_that_is_not_what_was_signed_is_not_shown(web: Web) -> None:
    report_id = web.signed(web.sign_in("reader-a"), web.case("1.1"))
    with web.database.centre() as session:
        session.execute(sa.update(Report).values(pdf_sha256=b"\0" * 32))
    answer = web.sign_in("clinician-a").get(f"/county/reports/{report_id}/pdf")
    assert answer.status_code == 503 and not answer.content.startswith(b"%PDF-")
    assert web.events("report.opened") == []


def test_the_gateways_link_and_disk_are_said(web: Web) -> None:
    browser = web.sign_in("radiographer-a")
    assert "还没有应答过" in browser.get("/county").text
    beat = {"unsent_instances": 12, "free_disk_bytes": 4 * 10**9, "quarantined": 1, "out_of_space": True}
    with web.database.centre() as session:
        session.execute(
            sa.update(Gateway)
            .where(Gateway.id == web.sites.gateway)
            .values(heartbeat=beat, last_heartbeat_at=sa.func.clock_timestamp())
        )
    html = browser.get("/county").text
    assert (
        "网关在线" in html
        and "待传 12 幅" in html
        and "磁盘将满" in html
        and "1 项被隔离" in html
        and "从设备重发" in html
    )
    with web.database.centre() as session:
        session.execute(sa.update(Gateway).values(last_heartbeat_at=NOW - timedelta(hours=1)))
    assert "网关失联" in browser.get("/county").text


def test_a_study_without_a_name_can_still_be_found_by_its_number(web: Web) -> None:
    with web.database.centre() as session:
        add_study(session, web.sites.county, "1.1", patient_name="", patient_id="P77")
    html = web.sign_in("radiographer-a").get("/county?q=P77").text
    assert "（无姓名）" in html and len(re.findall(r'id="study-', html)) == 1


def delivered(web: Web, report_id: int) -> None:
    with web.database.centre() as session:
        move(session, Transition.REPORT_RECEIVED, report_id, actor=SYSTEM)
        move(session, Transition.REPORT_DELIVERED, report_id, actor=SYSTEM)


def sent_days_ago(web: Web, days: int = 3) -> str:
    """Every study was received then. The day before, as an address has it."""
    with web.database.centre() as session:
        session.execute(sa.update(Study).values(first_received_at=NOW - timedelta(days=days)))
    return str((NOW - timedelta(days=days + 2)).date())


def second_version(web: Web, reader: Browser, case_id: int, **changes: str) -> int:
    with web.database.centre() as session:
        move(session, Transition.CASE_REOPENED, case_id, actor=SYSTEM)
    return web.signed(reader, case_id, **changes)


def test_an_unopened_critical_report_rings_on_every_day_until_somebody_opens_it(web: Web) -> None:
    case_id = web.case("1.1", patient_name="A=危急")
    report_id = web.signed(web.sign_in("reader-a"), case_id, conclusion="critical")
    delivered(web, report_id)
    another_day = sent_days_ago(web)
    clinician = web.sign_in("clinician-a")
    for path in ("/county", f"/county?day={another_day}", "/county?q=nobody", "/county?q=危急"):
        html = clinician.get(path).text
        assert "危急值，尚未打开" in html and "◆ 1 份危急值报告" in html, path
        assert html.count(f'id="study-{web.row(case_id).study_id}"') == 1, path
    clinician.get(f"/county/reports/{report_id}/pdf")
    assert "危急" not in clinician.get("/county").text
    assert "危急 (A)" not in web.sign_in("clinician-b").get("/county").text


def test_an_unopened_corrected_report_of_any_day_stands_first(web: Web) -> None:
    reader, case_id = web.sign_in("reader-a"), web.case("1.1", patient_name="A=更正")
    first = web.signed(reader, case_id)
    delivered(web, first)
    clinician = web.sign_in("clinician-a")
    clinician.get(f"/county/reports/{first}/pdf")
    second = second_version(web, reader, case_id, impression="更正后的意见")
    delivered(web, second)
    sent_days_ago(web)
    web.case("1.2", patient_name="B=今天")
    html = clinician.get("/county").text
    assert html.index("更正 (A)") < html.index("今天 (B)") and "尚未打开" in html
    clinician.get(f"/county/reports/{second}/pdf")
    assert "更正 (A)" not in clinician.get("/county").text


def test_a_superseded_report_says_so_first_and_counts_as_no_opening(web: Web) -> None:
    reader, case_id = web.sign_in("reader-a"), web.case("1.1")
    first = web.signed(reader, case_id)
    second = second_version(web, reader, case_id, conclusion="critical")
    clinician = web.sign_in("clinician-a")
    instead = clinician.get(f"/county/reports/{first}/pdf")
    assert instead.status_code == 409 and "已被第 2 版替代" in instead.text
    assert f'href="/county/reports/{second}/pdf"' in instead.text
    script = clinician.client.get(f"/county/reports/{first}/pdf")  # the print button of a page that is behind
    assert (script.status_code, script.json()["type"], script.json()["report_id"]) == (409, "superseded", second)
    old = clinician.get(f"/county/reports/{first}/pdf?superseded=1")
    assert old.content.startswith(b"%PDF-") and "superseded" in old.headers["content-disposition"]
    assert web.events("report.opened") == [] and web.report(first).opened_at is None
    ever = Choice(NOW - timedelta(days=1), NOW + timedelta(days=1))
    with web.database.centre() as session:
        assert studies(session, ever, 1)[0]["opened"] is None
    clinician.get(f"/county/reports/{second}/pdf?superseded=1")  # it stands: asking so changes nothing
    assert [event.subject_id for event in web.events("report.opened")] == [second]
    assert web.sign_in("clinician-b").get(f"/county/reports/{first}/pdf").status_code == 404


def test_a_search_covers_all_days(web: Web) -> None:
    case_id = web.case("1.1", patient_id="P88")
    delivered(web, web.signed(web.sign_in("reader-a"), case_id))
    sent_days_ago(web, 40)
    browser = web.sign_in("radiographer-a")
    assert "P88" not in browser.get("/county").text
    html = browser.get("/county?q=p88").text
    assert "P88" in html and "全部日期" in html


def test_a_patient_without_sex_and_age_shows_no_stray_dot(web: Web) -> None:
    case_id = web.case("1.1")
    with web.database.centre() as session:
        session.execute(sa.update(Study).values(patient_sex="", patient_age=""))
    assert '<span class="quiet small">P1</span>' in web.sign_in("clinician-a").get("/county").text
    assert case_id
