"""The worklist: order, who sees what, what of AI is shown and what never is, search, live changes."""

import re
import threading

import httpx
import pytest
import sqlalchemy as sa

from storage.rows import Case, Study
from storage.vocabulary import Priority, RunMode, TriageState
from tests.web import Web, add_finding, signing_pki, soon, web

__all__ = ["signing_pki", "web"]


def order_of(html: str) -> list[int]:
    return [int(found) for found in re.findall(r'data-case="(\d+)"', html)]


def test_cases_stand_by_tier_then_due_time_then_id(web: Web) -> None:
    due = soon(10)
    overdue = web.case("1.1", tier=2, due_at=soon(-100))
    same_b = web.case("1.2", tier=1, due_at=due)
    same_c = web.case("1.3", tier=1, due_at=due)
    stat = web.case("1.4", tier=0, due_at=soon(60), priority=Priority.STAT)
    assert order_of(web.sign_in("reader-a").get("/worklist").text) == [stat, same_b, same_c, overdue]


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
    assert "疑似房颤 0.97" in html and "ecg_rhythm 1.0 · 仅供研究" in html and "提前 20′" in html
    html = web.sign_in("reader-a", "en").get("/worklist").text
    assert "Atrial fibrillation 0.97" in html and "research only" in html


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


def test_the_page_answers_in_words_when_the_database_is_away(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = web.sign_in("reader-a")

    def away(*_: object) -> None:
        raise sa.exc.OperationalError("select", {}, Exception("server closed the connection"))

    monkeypatch.setattr(type(web.app.state.database), "centre", away)
    page: httpx.Response = reader.get("/worklist")
    assert page.status_code == 503 and page.headers["retry-after"] and "都安全" in page.text
    assert reader.post("/cases/1/claim").json()["type"] == "unavailable"
