"""Turnaround from events: figures against numbers worked out by hand, filters, CSV, the timeline and its chain."""

import csv
import io
import re
from datetime import UTC, datetime, timedelta
from html import unescape

import pytest
import sqlalchemy as sa

from reading_queue.event_words import _CHINESE, state_word
from reading_queue.i18n import duration
from reading_queue.quality import spreadsheet_safe
from reading_queue.turnaround import Choice, figures, slowest, within_contract
from storage.database import Database
from storage.rows import Case, Study
from storage.transitions import SYSTEM, note
from storage.vocabulary import CaseState, Priority, ReportState, RunState, StudyState, TriageState, UploadState
from tests.centre import Sites, add_case, add_study
from tests.web import Web, signing_pki, web

__all__ = ["signing_pki", "web"]

START = datetime(2026, 11, 20, 8, 0, tzinfo=UTC)
EVER = Choice(datetime(2020, 1, 1, tzinfo=UTC), datetime(2030, 1, 1, tzinfo=UTC))
NAMES = (
    "study.announced", "study.completed", "triage.done", "case.claimed", "report.signed", "report.received",
    "report.delivered", "report.opened",
)  # fmt: skip


def add_history(
    database: Database, owner_url: str, site_id: int, uid: str, minutes: tuple[float | None, ...], *,
    modality: str = "CT", priority: Priority = Priority.ROUTINE, offset_ms: int = 0, acquired: float = -10,
) -> int:  # fmt: skip
    """A study whose events lie `minutes` after its receipt at the gateway, in the order of NAMES."""
    with database.centre() as session:
        study_id = add_study(session, site_id, uid, state=StudyState.COMPLETE, modalities=(modality,))
        add_case(session, study_id, priority=priority, due_at=START + timedelta(minutes=60))
        for name in NAMES[1:]:
            note(session, study_id, name, subject="study", subject_id=study_id, actor=SYSTEM)
    engine = sa.create_engine(owner_url)  # only the owner may rewrite history, and the chain then says so
    with engine.begin() as connection:
        connection.execute(sa.text("SET LOCAL app.site = 'all'"))
        for name, minute in zip(NAMES, minutes, strict=True):
            if minute is None:
                statement = "DELETE FROM event WHERE study_id = :study AND name = :name"
                connection.execute(sa.text(statement), {"study": study_id, "name": name})
                continue
            received = START + timedelta(milliseconds=offset_ms)
            details = {
                "gateway_received_at": received.isoformat(),
                "acquired_at": (START + timedelta(minutes=acquired)).isoformat(),
                "gateway_clock_offset_ms": offset_ms,
            }
            connection.execute(
                sa.text("UPDATE event SET at = :at, details = :details WHERE study_id = :study AND name = :name")
                .bindparams(sa.bindparam("details", type_=sa.JSON)),
                {"at": START + timedelta(minutes=minute), "details": details, "study": study_id, "name": name},
            )  # fmt: skip
    engine.dispose()
    return study_id


def figure(database: Database, segment: str, part: str | None = None, **choice: str) -> tuple[int, float, float, float]:
    chosen = Choice(EVER.since, EVER.until, **choice)
    with database.centre() as session:
        one = next(f for f in figures(session, chosen) if (f.segment, f.part) == (segment, part))
    return one.count, one.median_s, one.p90_s, one.max_s


@pytest.fixture
def owner_url(web: Web) -> str:
    return web.app.state.settings.database_owner_url  # type: ignore[no-any-return]


@pytest.fixture
def week(web: Web, database: Database, sites: Sites, owner_url: str) -> None:
    for number, waiting in enumerate((10, 20, 30, 40, 100)):
        add_history(
            database, owner_url, sites.county, f"1.{number}",
            (1, 5, 6, 5 + waiting, 5 + waiting + 10, 5 + waiting + 11, 5 + waiting + 12, 5 + waiting + 42),
        )  # fmt: skip
    add_history(
        database, owner_url, sites.other_county, "2.1", (2, 3, None, 13, 33, None, None, None), modality="ECG",
        priority=Priority.STAT, offset_ms=90_000,
    )  # fmt: skip


@pytest.mark.usefixtures("week")
def test_median_ninetieth_centile_and_maximum_by_hand(database: Database) -> None:
    assert figure(database, "waiting", "county-a") == (5, 30 * 60, 76 * 60, 100 * 60)  # 40 + 0.6 * 60 between
    assert figure(database, "waiting") == (6, 25 * 60, 70 * 60, 100 * 60)
    assert figure(database, "reading", "county-b") == (1, 20 * 60, 20 * 60, 20 * 60)
    assert figure(database, "triage", "county-a") == (5, 60, 60, 60)
    assert figure(database, "at_modality", "county-a")[1] == 600
    assert figure(database, "turnaround", "county-a")[3] == 115 * 60
    assert figure(database, "opening", "county-a")[1] == 30 * 60


@pytest.mark.usefixtures("week")
def test_the_gateways_clock_is_brought_to_the_centres(database: Database) -> None:
    assert figure(database, "uplink", "county-b") == (1, 120, 120, 120)  # 90 s fast, and that does not count


@pytest.mark.usefixtures("week")
def test_figures_by_modality_and_priority_and_filtered(database: Database) -> None:
    assert figure(database, "waiting", "ECG", by="modality")[0] == 1
    assert figure(database, "waiting", "stat", by="priority")[1] == 600
    assert figure(database, "waiting", None, site="county-b")[0] == 1
    assert figure(database, "waiting", None, modality="CT")[0] == 5
    with database.centre() as session:
        assert figures(session, Choice(EVER.since, EVER.until, priority="urgent")) == []
        assert figures(session, Choice(EVER.since, START)) == []
        assert within_contract(session, EVER) == (5, 6)
        assert [row["seconds"] for row in slowest(session, EVER, "waiting", 2)] == [6000, 2400]


def test_a_study_claimed_twice_counts_the_claim_that_led_to_the_report(
    database: Database, web: Web, owner_url: str
) -> None:
    study_id = add_history(database, owner_url, web.sites.county, "1.1", (1, 2, 3, 50, 60, 61, 62, 63))
    with database.centre() as session:
        note(session, study_id, "case.claimed", subject="study", subject_id=study_id, actor=SYSTEM)  # after the report
    assert figure(database, "waiting")[1] == 48 * 60


def test_a_study_opened_before_the_pacs_had_it_waited_for_nobody(database: Database, web: Web, owner_url: str) -> None:
    add_history(database, owner_url, web.sites.county, "1.1", (1, 2, 3, 4, 5, 6, 20, 10))
    assert figure(database, "opening")[1] == 0


def test_an_old_acquisition_and_a_wrong_clock_are_not_counted(database: Database, web: Web, owner_url: str) -> None:
    for number, acquired in enumerate((-60 * 24 * 365, 30)):
        moments = (1, 2, None, None, None, None, None, None)
        add_history(database, owner_url, web.sites.county, f"1.{number}", moments, acquired=acquired)
    with database.centre() as session:
        assert "at_modality" not in {one.segment for one in figures(session, EVER)}


@pytest.mark.usefixtures("week")
def test_the_page_its_links_and_its_cases_agree(web: Web) -> None:
    officer = web.sign_in("quality")
    html = officer.get("/quality?period=all").text
    assert "<b>83.3%</b>" in html and "（5 / 6 份）" in html and "1:10:00" not in html
    address = "/quality/cases?period=all&amp;site=county-b&amp;by=site&amp;segment=waiting"
    assert address in html
    cases = officer.get(address.replace("&amp;", "&")).text
    assert cases.count("/quality/studies/") == 1
    assert officer.get("/quality/cases?segment=nonsense").status_code == 404
    assert officer.get("/quality?site=%27%3B--").status_code == 422
    assert "乙县医院" in html and "County B Hospital" in web.sign_in("quality", "en").get("/quality?period=all").text


def test_the_csv_is_complete_and_starts_no_formula(
    web: Web, database: Database, sites: Sites, owner_url: str, week: None
) -> None:
    with database.centre() as session:
        session.execute(
            sa.update(Study).where(Study.study_instance_uid == "2.1").values(accession_number='=HYPERLINK("x")')
        )
    answer = web.sign_in("quality").get("/quality/export.csv?period=all")
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    assert "attachment" in answer.headers["content-disposition"]
    text = answer.content.decode("utf-8-sig")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == 6
    ecg = next(row for row in rows if row["modality"] == "ECG")
    assert ecg["accession_number"] == '\'=HYPERLINK("x")'
    assert (ecg["waiting_s"], ecg["reading_s"], ecg["return_s"]) == ("600", "1200", "")
    assert ecg["signed"] == "2026-11-20 16:33"
    assert "张" not in text and "Zhang" not in text
    assert not any(cell.startswith(("=", "+", "-", "@")) for row in rows for cell in row.values())


@pytest.mark.parametrize(
    "text", ["=1+1", "+1", "-1", "@x", "\t=1", "\r=1", "\n=1", "＝1+1", "＋1", "－1", "＠x", " =1", "\u3000＝1"]
)
def test_what_could_start_a_formula_is_quoted(text: str) -> None:
    assert spreadsheet_safe(text) == f"'{text}"
    assert spreadsheet_safe("A1") == "A1"


@pytest.mark.parametrize("modality", ["=1+CR", "c t", "\u202eCT", "';--", "\0"])
def test_the_chip_of_any_modality_leads_to_its_figures(web: Web, modality: str) -> None:
    with web.database.centre() as session:
        study_id = add_study(session, web.sites.county, "1.1", modalities=(modality.replace("\0", "OT"),))
        add_case(session, study_id)
    officer = web.sign_in("quality")
    html = officer.get("/quality?period=all").text
    chips = re.findall(r'href="(/quality\?[^"]*modality=[^"]*)"', html)
    assert chips and all(officer.get(unescape(chip)).status_code == 200 for chip in chips)
    assert officer.client.get("/quality", params={"modality": modality}).status_code == 200
    assert officer.client.get("/quality", params={"modality": "x" * 65}).status_code == 422


@pytest.mark.parametrize(
    ("language", "said"),
    [("zh", ["原因 已到期", "层级 2 → 1", "到期 2026-11-20 16:00:00 → 2026-11-20 15:30:00", "理由 急诊, AI 提示",
             "没有模型", "待阅 → 已领取"]),
     ("en", ["why come due", "tier 2 → 1", "due 2026-11-20 16:00:00 → 2026-11-20 15:30:00", "reasons stat, AI flag",
             "no model", "queued → claimed"])],
)  # fmt: skip
def test_the_timeline_says_details_in_words_and_in_the_centres_time(web: Web, language: str, said: list[str]) -> None:
    case_id = web.case("1.1")
    web.sign_in("reader-a").claim(case_id)
    details = {
        "why": "ageing", "tier": [2, 1], "due_at": ["2026-11-20T08:00:00+00:00", "2026-11-20T07:30:00+00:00"],
        "reasons": ["stat", "finding"], "reason": "没有模型 / no model", "unheard_of": "as it is", "empty": None,
    }  # fmt: skip
    with web.database.centre() as session:
        study_id = web.row(case_id).study_id
        note(session, study_id, "case.moved_earlier", subject="x", subject_id=1, actor=SYSTEM, details=details)
    html = web.sign_in("quality", language).get(f"/quality/studies/{study_id}").text
    words = " ".join(re.sub(r"<[^>]*>", " ", html).split())
    for one in [*said, "unheard of as it is"]:
        assert one in words, one
    assert "+00:00" not in words and "[&#39;" not in words and "None" not in words and "moved_earlier" not in words
    assert ("没有模型" in words) != ("no model" in words)


def test_every_state_has_a_word() -> None:
    for kind in (StudyState, CaseState, ReportState, UploadState, TriageState, RunState):
        for state in kind:
            assert _CHINESE.search(state_word(state.value, "zh")), state


def test_the_timeline_names_every_event_and_verifies_the_chain(web: Web) -> None:
    case_id = web.case("1.1")
    web.signed(web.sign_in("reader-a"), case_id)
    study_id = web.row(case_id).study_id
    officer = web.sign_in("quality")
    html = officer.get(f"/quality/studies/{study_id}").text
    assert "事件链前后一致：6 条" in html and "报告已签发" in html and "阅片医师一" in html
    assert officer.get("/quality/studies/99999").status_code == 404


def test_a_timeline_that_somebody_altered_says_so(web: Web, owner_url: str) -> None:
    case_id = web.case("1.1")
    study_id = web.row(case_id).study_id
    engine = sa.create_engine(owner_url)
    with engine.begin() as connection:
        connection.execute(sa.text("SET LOCAL app.site = 'all'"))
        connection.execute(sa.text("UPDATE event SET at = at - interval '1 hour' WHERE name = 'case.queued'"))
    engine.dispose()
    html = web.sign_in("quality").get(f"/quality/studies/{study_id}").text
    assert "事件链不完整" in html and "事件链前后一致" not in html


def test_a_case_without_a_contract_in_time_is_a_broken_promise(web: Web, database: Database, owner_url: str) -> None:
    add_history(database, owner_url, web.sites.county, "1.1", (1, 2, 3, 4, 61, 62, 63, 64))
    with database.centre() as session:
        assert within_contract(session, EVER) == (0, 1)
        session.execute(sa.update(Case).values(contract_due_at=START + timedelta(minutes=61)))
        assert within_contract(session, EVER) == (1, 1)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(None, "–"), (0, "0.0 s"), (0.26, "0.3 s"), (18, "18 s"), (185, "3:05"), (7500, "2 h 05"), (273600, "3 d 04 h"),
     (-90, "−1:30")],
)  # fmt: skip
def test_lengths_of_time_are_written_short(seconds: float | None, words: str) -> None:
    assert duration(seconds) == words


def test_images_after_the_signature_do_not_mend_a_broken_promise(web: Web, database: Database, owner_url: str) -> None:
    study_id = add_history(database, owner_url, web.sites.county, "1.1", (1, 2, 3, 4, 61, 62, 63, 64))
    promised = {"contract_due_at": (START + timedelta(minutes=60)).isoformat()}
    renewed = {"contract_due_at": (START + timedelta(days=2)).isoformat()}
    with database.centre() as session:
        note(session, study_id, "case.renewed", subject="study", subject_id=study_id, actor=SYSTEM, details=renewed)
        session.execute(sa.update(Case).values(contract_due_at=START + timedelta(days=2)))
    engine = sa.create_engine(owner_url)
    with engine.begin() as connection:
        connection.execute(sa.text("SET LOCAL app.site = 'all'"))
        statement = sa.text("UPDATE event SET details = :promised WHERE name = 'case.queued'")
        connection.execute(statement.bindparams(sa.bindparam("promised", promised, sa.JSON)))
    engine.dispose()
    with database.centre() as session:
        assert within_contract(session, EVER) == (0, 1)
