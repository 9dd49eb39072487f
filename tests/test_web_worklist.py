"""The worklist: order, who sees what, what of AI is shown and what never is, search, live changes."""

import re
import threading
import unicodedata

import httpx
import pytest
import sqlalchemy as sa

from reading_queue import stream
from reading_queue.i18n import probability
from storage.rows import Account, Case, Study, TriageRun
from storage.visible import visible
from storage.vocabulary import Priority, RunMode, TriageState
from tests.web import Web, add_finding, signing_pki, soon, web

__all__ = ["signing_pki", "web"]


def order_of(html: str) -> list[int]:
    return [int(found) for found in re.findall(r'data-case="(\d+)"', html)]


def words_of(html: str) -> str:
    """The text of a page as it is read, without markup."""
    return " ".join(re.sub(r"<[^>]*>", " ", html).split())


def test_cases_stand_by_tier_then_due_time_then_id(web: Web) -> None:
    due = soon(10)
    overdue = web.case("1.1", tier=2, due_at=soon(-100))
    same_b = web.case("1.2", tier=1, due_at=due)
    same_c = web.case("1.3", tier=1, due_at=due)
    stat = web.case("1.4", tier=0, due_at=soon(60), priority=Priority.STAT)
    assert order_of(web.sign_in("reader-a").get("/worklist").text) == [stat, same_b, same_c, overdue]


def test_variants_of_an_image_are_said_on_the_worklist_and_on_the_case(web: Web) -> None:
    plain, doubtful = web.case("1.1"), web.case("1.2")
    with web.database.centre() as session:
        session.execute(sa.update(Study).where(Study.study_instance_uid == "1.2").values(has_variants=True))
    reader = web.sign_in("reader-a")
    assert words_of(reader.get("/worklist").text).count("同号异像") == 1
    assert "两份均已保存" in reader.get(f"/cases/{doubtful}").text
    assert "两份均已保存" not in reader.get(f"/cases/{plain}").text


def test_a_reader_sees_only_the_sites_and_specialties_granted(web: Web) -> None:
    mine = web.case("1.1")
    web.case("1.2", site_id=web.sites.other_county)
    web.case("1.3", specialty="pathology")
    assert order_of(web.sign_in("reader-a").get("/worklist").text) == [mine]


def test_filters_by_specialty_mine_and_reported(web: Web) -> None:
    imaging, ecg = web.case("1.1"), web.case("1.2", specialty="ecg")
    reader = web.sign_in("reader-a")
    assert order_of(reader.get("/worklist?specialty=ecg").text) == [ecg]
    reader.claim(imaging)
    assert order_of(reader.get("/worklist?view=mine").text) == [imaging]
    web.signed(reader, ecg)
    assert order_of(reader.get("/worklist?view=reported").text) == [ecg]
    assert order_of(reader.get("/worklist").text) == [imaging]
    assert reader.get("/worklist?view=nonsense").status_code == 422


@pytest.mark.parametrize(
    ("words", "found"),
    [("张", True), ("zhang^san", True), ("P100", True), ("A1", True), ("%", False), ("_", False), ("P1_0", False),
     ("' OR 1=1 --", False), ("\\", False), ("\0", True)],
)  # fmt: skip
def test_search_takes_words_as_they_are(web: Web, words: str, found: bool) -> None:
    case_id = web.case("1.1", patient_id="P100")
    answer = web.sign_in("reader-a").client.get("/worklist/rows", params={"q": words})
    assert answer.status_code == 200
    assert order_of(answer.text) == ([case_id] if found else [])


def test_an_active_flag_is_shown_with_its_model_and_that_it_is_for_research(web: Web) -> None:
    case_id = web.case("1.1")
    add_finding(web, case_id)
    with web.database.centre() as session:
        reasons = [{"code": "finding", "minutes": 20, "zh": "提前", "en": "earlier"}]
        session.execute(sa.update(Case).values(due_reasons=reasons))
    html = web.sign_in("reader-a").get("/worklist").text
    assert "疑似房颤 0.97" in words_of(html) and "ecg_rhythm 1.0 · 仅供研究" in html and "提前 20′" in html
    html = web.sign_in("reader-a", "en").get("/worklist").text
    assert "Atrial fibrillation 0.97" in words_of(html) and "research only" in html


@pytest.mark.parametrize("hidden", [{"mode": RunMode.SHADOW}, {"positive": False}])
def test_shadow_results_and_reassuring_normals_are_never_shown(web: Web, hidden: dict[str, object]) -> None:
    case_id = web.case("1.1")
    run_id = add_finding(web, case_id, heat_map_key="results/x", **hidden)  # type: ignore[arg-type]
    reader = web.sign_in("reader-a")
    for path in ("/worklist", f"/cases/{case_id}"):
        html = reader.get(path).text
        assert "房颤" not in html and "ecg_rhythm" not in html, path
        assert "正常" not in re.sub(r'title="没有提示不等于正常"', "", html), path
    if hidden.get("mode") is RunMode.SHADOW:
        assert reader.get(f"/cases/{case_id}/runs/{run_id}/heat-map.png").status_code == 404


def test_of_two_runs_of_a_model_the_newest_counts(web: Web) -> None:
    case_id = web.case("1.1")
    add_finding(web, case_id)
    with web.database.centre() as session:
        session.execute(sa.text("UPDATE triage_run SET study_version = 0"))
    add_finding(web, case_id, positive=False)
    assert "房颤" not in web.sign_in("reader-a").get("/worklist").text


@pytest.mark.parametrize("state", list(TriageState))
def test_every_state_of_triage_has_words(web: Web, state: TriageState) -> None:
    web.case("1.1", triage=state)
    assert web.sign_in("reader-a").get("/worklist").status_code == 200


def test_the_order_is_explained_in_sentences(web: Web) -> None:
    web.case("1.1", tier=0)
    case_id = web.case("1.2")
    with web.database.centre() as session:
        reasons = [{"code": "contract", "minutes": 60, "zh": "收到后 60 分钟内报告", "en": "report within 60 min"}]
        session.execute(sa.update(Case).where(Case.id == case_id).values(due_reasons=reasons))
    html = web.sign_in("reader-a").get(f"/worklist/{case_id}/order").text
    assert "收到后 60 分钟内报告" in html and "排在它前面的有 1 例" in html
    assert "report within 60 min" in web.sign_in("reader-a", "en").get(f"/worklist/{case_id}/order").text


def test_an_empty_worklist_teaches_and_a_read_one_says_so(web: Web) -> None:
    reader = web.sign_in("reader-a")
    assert "11112" in reader.get("/worklist").text
    case_id = web.case("1.1")
    web.signed(reader, case_id)
    assert "都读完了" in reader.get("/worklist").text
    assert "没有符合条件" in reader.client.get("/worklist?q=nobody").text


def test_a_name_of_markup_and_directions_is_only_text(web: Web) -> None:
    with web.database.centre() as session:
        pass
    web.case("1.1", patient_name="<img src=x onerror=alert(1)>^\u202e\"'")
    with web.database.centre() as session:
        session.execute(sa.update(Study).values(study_description="<b>x</b>" * 20))
    html = web.sign_in("reader-a").get("/worklist").text
    assert "<img src=x" not in html and "<b>x</b>" not in html and "&lt;img" in html


EVIL_NAME, EVIL_ID = "张三\u202e四李^\u2066X\u2069", "B\u202e321"


def hidden_characters(text: str) -> set[str]:
    return {one for one in text if unicodedata.category(one) in {"Cc", "Cf"} and one not in "\n\t"}


@pytest.mark.parametrize("language", ["zh", "en"])
def test_a_name_that_reorders_its_neighbours_is_shown_by_its_code_points_on_every_page(web: Web, language: str) -> None:
    case_id = web.case("1.1", patient_name=EVIL_NAME, patient_id=EVIL_ID)
    web.case("1.2", patient_name=EVIL_NAME, patient_id=EVIL_ID)  # a prior
    with web.database.centre() as session:
        session.execute(
            sa.update(Study).values(
                study_description="胸部\u202e位正", accession_number="A\u200b1", patient_age="045Y", patient_sex="M",
                clinical_question="\u2067咳嗽", modalities=["C\u202eT"],
            )
        )  # fmt: skip
    reader, county, officer = (web.sign_in(who, language) for who in ("reader-a", "clinician-a", "quality"))
    study = f"/quality/studies/{web.row(case_id).study_id}"
    for browser, path in (
        (reader, "/worklist"), (reader, "/worklist/rows"), (reader, f"/cases/{case_id}"), (county, "/county"),
        (county, "/county/rows"), (officer, study), (officer, "/quality?period=all"),
    ):  # fmt: skip
        answer = browser.get(path)
        assert answer.status_code == 200 and hidden_characters(answer.text) == set(), path
        assert "[U+202E]" in answer.text, path
    for browser, path in ((reader, "/worklist"), (reader, f"/cases/{case_id}"), (county, "/county")):
        html = browser.get(path).text
        assert "张三[U+202E]四李[U+2066]X[U+2069]" in html and "B[U+202E]321" in html, path


def test_a_holder_whose_name_reorders_is_named_by_code_points_to_the_pages_script(web: Web) -> None:
    case_id = web.case("1.1")
    with web.database.centre() as session:
        session.execute(
            sa.update(Account).where(Account.username == "reader-a2").values(display_name="王\u202e五\u2069")
        )
    web.sign_in("reader-a2").claim(case_id)
    problem = web.sign_in("reader-a").post(f"/cases/{case_id}/claim").json()
    assert problem["holder"] == "王[U+202E]五[U+2069]" and hidden_characters(problem["detail"]) == set()


@pytest.mark.parametrize(
    ("text", "shown"),
    [("张三", "张三"), ("a\tb\nc\r\nd", "a\tb\nc\nd"), ("a\rb\0", "a[U+000D]b[U+0000]"), ("\u200fאב", "[U+200F]אב"),
     ("x\u2028y\u2029", "x[U+2028]y[U+2029]"), ("\u3000空格\u00a0", "\u3000空格\u00a0"), ("\ud800", "[U+D800]")],
)  # fmt: skip
def test_hidden_characters_are_shown_and_layout_and_every_script_stay(text: str, shown: str) -> None:
    assert visible(text) == shown and visible(shown) == shown


def test_what_was_only_one_file_is_not_counted_for_it_may_hold_many_frames(web: Web) -> None:
    for number, (modality, count) in enumerate((("CT", 1), ("ECG", 3), ("CT", 64)), start=1):
        case_id = web.case(f"1.{number}", modalities=(modality,))
        with web.database.centre() as session:
            session.execute(sa.update(Study).where(Study.id == web.row(case_id).study_id).values(instance_count=count))
    assert re.findall(r"(\d+) 幅", web.sign_in("reader-a").get("/worklist").text) == ["64"]


def test_a_model_that_found_nothing_is_a_dash(web: Web) -> None:
    case_id = web.case("1.1")
    add_finding(web, case_id, positive=False)
    for language, words in (("zh", "无提示"), ("en", "no flag")):
        html = web.sign_in("reader-a", language).get("/worklist").text
        assert words not in html and re.search(r'<span class="quiet" title="[^"]+">—</span>', html)


@pytest.mark.parametrize(
    ("value", "shown"), [(0.97, "0.97"), (0.9949, "0.99"), (0.9975, ">0.99"), (1.0, ">0.99"), (0.001, "<0.01")]
)
def test_no_model_is_shown_as_certain(value: float, shown: str) -> None:
    assert probability(value) == shown


def test_an_all_but_certain_flag_is_never_shown_as_one(web: Web) -> None:
    case_id = web.case("1.1")
    add_finding(web, case_id)
    with web.database.centre() as session:
        run = session.scalars(sa.select(TriageRun)).one()
        run.findings = [run.findings[0] | {"probability": 0.9975}]
    reader = web.sign_in("reader-a")
    for path in ("/worklist", f"/cases/{case_id}"):
        html = reader.get(path).text
        assert "&gt;0.99" in html and "1.00" not in html, path


def test_the_counts_stand_in_the_bar_before_any_script_runs(web: Web) -> None:
    web.case("1.1")
    html = web.sign_in("reader-a").get("/worklist").text
    assert re.search(r'<div class="counts" id="counts">\s*<span>待阅<b>1</b>', html)
    assert "<div data-counts hidden>" in html


def test_priors_are_the_same_patients_of_the_same_hospital_only(web: Web) -> None:
    case_id = web.case("1.1", patient_id="P7")
    prior = web.case("1.2", patient_id="P7")
    web.case("1.3", patient_id="P8")
    same_number_elsewhere = web.case("1.4", patient_id="P7", site_id=web.sites.other_county)
    html = web.sign_in("reader-a").get(f"/cases/{case_id}").text
    assert f"/cases/{prior}" in html and f"/cases/{same_number_elsewhere}" not in html
    assert "(1)" in html


def listen(web: Web, username: str, until: int, ready: threading.Event, heard: list[str]) -> None:
    with web.sign_in(username).client.stream("GET", "/stream", timeout=20) as answer:
        for line in answer.iter_lines():
            if line.startswith("event:"):
                heard.append(line.removeprefix("event:").strip())
                ready.set()
                if len(heard) == until:
                    return


def test_the_stream_tells_a_reader_of_every_change_and_a_county_of_its_own(web: Web) -> None:
    ready, county_ready = threading.Event(), threading.Event()
    heard: list[str] = []
    county: list[str] = []
    threads = [
        threading.Thread(target=listen, args=(web, "reader-a", 3, ready, heard)),
        threading.Thread(target=listen, args=(web, "clinician-b", 2, county_ready, county)),
    ]
    for thread in threads:
        thread.start()
    assert ready.wait(15) and county_ready.wait(15)
    web.case("1.1")  # of county A
    while len(heard) < 2 and threads[0].is_alive():
        threads[0].join(0.05)
    assert county == ["ready"]
    web.case("1.2", site_id=web.sites.other_county)
    for thread in threads:
        thread.join(20)
    assert heard == ["ready", "changed", "changed"] and county == ["ready", "changed"]


def test_the_stream_ends_with_the_sign_in_also_while_there_is_news(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_KEEP_ALIVE_S", 1.0)
    monkeypatch.setattr(stream, "_GATHER_S", 0.01)
    reader, other = web.sign_in("reader-a"), web.sign_in("reader-a2")
    case_id = web.case("1.1")
    listener = web.anonymous()
    listener.cookies.set("yuanzhen_session", reader.client.cookies["yuanzhen_session"])
    over = threading.Event()

    def news() -> None:
        while not over.is_set():
            other.post(f"/cases/{case_id}/hand-back", lease=other.claim(case_id))

    busy = threading.Thread(target=news)
    heard = []
    try:
        with listener.stream("GET", "/stream", timeout=20) as answer:
            for line in answer.iter_lines():
                if line == "event: ready":
                    assert reader.post("/sign-out").status_code == 303
                    busy.start()
                if line.startswith("event:"):
                    heard.append(line.removeprefix("event: "))
    finally:
        over.set()
        busy.join(20)
    assert heard[-1] == "signed-out" and "changed" in heard


def test_the_page_answers_in_words_when_the_database_is_away(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = web.sign_in("reader-a")

    def away(*_: object) -> None:
        raise sa.exc.OperationalError("select", {}, Exception("server closed the connection"))

    monkeypatch.setattr(type(web.app.state.database), "centre", away)
    page: httpx.Response = reader.get("/worklist")
    assert page.status_code == 503 and page.headers["retry-after"] and "都安全" in page.text
    assert reader.post("/cases/1/claim").json()["type"] == "unavailable"
