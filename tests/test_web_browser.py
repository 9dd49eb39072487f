"""The pages in a real browser: a reader's whole path by keyboard in both languages, live rows, faults while typing.

Screenshots of every page go to the folder named by YUANZHEN_SCREENSHOTS, for a person to look at.
"""

import json
import os
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from playwright.sync_api import Browser, BrowserContext, Page, ViewportSize, expect, sync_playwright

from storage.rows import Case, Gateway, Report, Series, Site, Study, WebSession
from storage.states import Transition
from storage.transitions import SYSTEM, move, note
from storage.vocabulary import Priority, ReportState, StudyState, TriageState
from tests.archive_material import archive_files, real_file
from tests.centre import add_case, add_study
from tests.peers import peer
from tests.test_claims import expire
from tests.web import PASSWORD, PIN, Web, add_finding, heat_map_file, signing_pki, soon, web

__all__ = ["signing_pki", "web"]

SIZE: ViewportSize = {"width": 1366, "height": 768}
PHONE: ViewportSize = {"width": 390, "height": 844}
FLAGS = [
    "--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--enable-unsafe-swiftshader",
]  # fmt: skip


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=peer("chromium"), args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def window(chromium: Browser) -> Iterator[BrowserContext]:
    context = chromium.new_context(viewport=SIZE, locale="zh-CN")
    context.set_default_timeout(20_000)
    yield context
    context.close()


def sign_in(context: BrowserContext, web: Web, username: str, language: str = "zh") -> Page:
    page = context.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if "Content Security" in message.text else None)
    page.faults = faults  # type: ignore[attr-defined]
    page.goto(f"{web.url}/language/{language}?next=/sign-in")
    page.fill("input[name=username]", username)
    page.fill("input[name=password]", PASSWORD)
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("/(worklist|county|quality)"))
    return page


def shot(page: Page, name: str) -> None:
    if folder := os.environ.get("YUANZHEN_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.evaluate("document.fonts.ready")
        page.screenshot(path=f"{folder}/{name}.png")


# patient, sex, age, modality, description, images, priority, tier, minutes to due
PATIENTS = (
    ("Yan^Shi Yi=演示^一", "M", "063Y", "ECG", "12导联心电图", 1, Priority.STAT, 0, 12),
    ("Yan^Shi Er=演示^二", "F", "004Y", "DX", "胸部正位", 1, Priority.ROUTINE, 1, -16),
    ("Yan^Shi San=演示^三", "M", "071Y", "CT", "头颅平扫", 64, Priority.URGENT, 1, 41),
    ("Yan^Shi Si=演示^四", "F", "035Y", "MR", "腰椎平扫", 120, Priority.ROUTINE, 2, 95),
    ("Yan^Shi Wu=演示^五", "M", "052Y", "CT", "胸部平扫＋增强", 312, Priority.ROUTINE, 2, 115),
    ("Yan^Shi Liu=演示^六", "F", "028Y", "DX", "左踝正侧位", 2, Priority.ROUTINE, 2, 131),
    ("Yan^Shi Qi=演示^七", "O", "006M", "CR", "腹部立位", 1, Priority.ROUTINE, 2, 178),
)
QUESTION = "咳嗽、发热 3 天，听诊右下肺湿啰音，除外肺炎。"


def furnish(web: Web) -> dict[str, int]:
    """A working day: cases of all kinds, one with real images. Case ids by patient number, `real` among them."""
    cases: dict[str, int] = {}
    with web.database.centre() as session:
        for number, (name, sex, age, modality, text, images, priority, tier, minutes) in enumerate(PATIENTS, start=1):
            study_id = add_study(
                session, web.sites.county, f"1.2.3.{number}", state=StudyState.COMPLETE, patient_id=f"P{number:05}",
                patient_name=name, modalities=(modality,),
            )  # fmt: skip
            session.execute(
                sa.update(Study)
                .where(Study.id == study_id)
                .values(
                    patient_sex=sex, patient_age=age, study_description=text, instance_count=images,
                    accession_number=f"A20261123{number:04}", priority=priority, expected_count=images,
                )
            )  # fmt: skip
            cases[str(number)] = add_case(
                session, study_id, priority=priority, tier=tier, due_at=soon(minutes + 0.5),
                specialty="ecg" if modality == "ECG" else "imaging",
                triage=TriageState.NOT_FOR_MODEL if modality == "CR" else TriageState.NO_MODEL,
            )  # fmt: skip
        real = archive_files(session, web.objects, web.sites.county, [real_file("RG1_UNCR.dcm")])
        session.execute(
            sa.update(Study)
            .where(Study.id == real)
            .values(
                patient_name="Yan^Shi Ba=演示^八", patient_sex="M", patient_age="003Y", study_description="胸部正位",
                clinical_question=QUESTION, state=StudyState.COMPLETE, patient_id="P00008",
            )
        )  # fmt: skip
        cases["real"] = add_case(session, real, tier=1, due_at=soon(33), priority=Priority.URGENT)
        reasons = [
            {"code": "rule", "zh": "X 线平片两小时内报告", "en": "radiographs are reported within two hours"},
            {"code": "contract", "zh": "加急病例：收到后 60 分钟内报告", "en": "urgent: report within 60 min"},
            {"code": "finding", "minutes": 60, "zh": "cxr_pneumonia 提示“疑似肺炎征象”，提前 60 分钟",
             "en": "cxr_pneumonia flagged “Signs of pneumonia”: 60 min earlier"},
        ]  # fmt: skip
        for case_id in (cases["real"], cases["1"]):
            session.execute(sa.update(Case).where(Case.id == case_id).values(due_reasons=reasons))
    add_finding(web, cases["1"])
    web.objects.put("results/county-a/heat.dcm", heat_map_file())
    add_finding(
        web, cases["real"], model="cxr_pneumonia", text_zh="疑似肺炎征象", text_en="Signs of pneumonia",
        heat_map_key="results/county-a/heat.dcm",
    )  # fmt: skip
    web.sign_in("reader-a2").claim(cases["3"])
    return cases


def image_is_visible(page: Page) -> None:
    """The viewer's canvas has a picture on it, not one colour."""
    page.wait_for_function(
        """() => {
            const inner = document.querySelector("#viewer").contentDocument;
            const canvas = inner && inner.querySelector("canvas.cornerstone-canvas");
            if (!canvas || !canvas.width) return false;
            const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
            return new Set(pixels.filter((_, at) => at % 4 === 0)).size > 10;
        }""",
        timeout=90_000,
    )


WORDS = {
    "zh": (
        "双肺纹理增多，右下肺野见斑片状模糊影，边缘不清。心影大小形态正常，双侧膈面光整。",
        "右下肺炎症，请结合临床。",
    ),
    "en": ("Patchy opacity in the right lower zone.", "Right lower lobe pneumonia."),
}


@pytest.mark.parametrize("language", ["zh", "en"])
def test_a_reader_goes_from_sign_in_to_signed_report_by_keyboard(
    web: Web, window: BrowserContext, language: str
) -> None:
    cases = furnish(web)
    page = sign_in(window, web, "reader-a", language)
    expect(page.locator("tbody tr")).to_have_count(8)
    expect(page.locator("tbody tr").first).to_have_class(re.compile("selected"))
    shot(page, f"worklist-{language}")

    page.keyboard.press("?")
    expect(page.locator("#keys")).to_be_visible()
    shot(page, f"keys-{language}")
    page.keyboard.press("Escape")
    while page.locator("tr.selected").get_attribute("data-case") != str(cases["real"]):
        page.keyboard.press("j")
    page.keyboard.press("e")
    expect(page.locator("#order-body")).to_contain_text("60")
    shot(page, f"order-{language}")
    page.keyboard.press("Escape")
    expect(page.locator("#order")).to_be_hidden()
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/cases/{cases['real']}", wait_until="commit")
    image_is_visible(page)
    findings, impression = WORDS[language]
    page.keyboard.press("r")
    page.keyboard.insert_text(findings)
    page.keyboard.press("Escape")
    page.keyboard.press("i")
    page.keyboard.insert_text(impression)
    page.keyboard.press("Escape")
    page.locator("input[value=positive]").focus()
    page.keyboard.press("Space")
    expect(page.locator("#save-state")).to_have_text(re.compile("已保存|Saved"))
    shot(page, f"reading-{language}")
    page.locator("#findings").blur()
    page.keyboard.press("h")
    expect(page.locator("#heat img")).to_be_visible()
    page.wait_for_function("document.querySelector('#heat img').naturalWidth === 256")
    shot(page, f"reading-heat-{language}")
    page.keyboard.press("h")
    page.keyboard.press("p")
    expect(page.locator("#priors")).to_have_attribute("open", "")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#sign-dialog")).to_be_visible()
    expect(page.locator("#sign-dialog .who-is")).to_contain_text("演示八")
    page.keyboard.type("111111")
    page.keyboard.press("Enter")
    expect(page.locator("#sign-trouble")).to_contain_text("PIN")
    shot(page, f"sign-{language}")
    page.keyboard.type(PIN)
    page.keyboard.press("Enter")
    expect(page.locator(".message.good")).to_contain_text("阅片医师一")
    page.wait_for_load_state("networkidle")
    shot(page, f"signed-{language}")
    with web.database.centre() as session:
        report = session.scalars(sa.select(Report).where(Report.case_id == cases["real"])).one()
    assert (report.state, report.findings, report.impression) == (ReportState.SIGNED, findings, impression)
    page.keyboard.press("n")
    page.wait_for_url(f"**/cases/{cases['1']}", wait_until="commit")
    page.locator("#hand-back").wait_for()
    page.keyboard.press("b")
    page.wait_for_url("**/worklist", wait_until="commit")
    assert page.faults == []  # type: ignore[attr-defined]


@pytest.mark.parametrize("language", ["zh", "en"])
def test_nothing_that_matters_is_cut_off_in_the_worklist_at_1366_pixels(
    web: Web, window: BrowserContext, language: str
) -> None:
    cases = furnish(web)
    names = ("示范县第一人民医院（一区）", "Demonstration County Hospital A")
    with web.database.centre() as session:
        session.execute(sa.update(Site).where(Site.code == "county-a").values(name_zh=names[0], name_en=names[1]))
        session.execute(
            sa.update(Study)
            .where(Study.id == web.row(cases["1"]).study_id)
            .values(patient_name="Maximiliana Alexandra von Hohenstein und Lichtenberg^Theodora")
        )
    page = sign_in(window, web, "reader-a", language)
    expect(page.locator("tbody tr")).to_have_count(8)
    shot(page, f"worklist-wide-{language}")
    for selector in ("td:nth-child(1)", "td:nth-child(2)", ".two-lines", ".flag", ".flag b", "td small"):
        cut = page.eval_on_selector_all(
            f".worklist {selector}",
            "all => all.filter(e => e.clientWidth && e.scrollWidth > e.clientWidth + 1"
            " || e.clientHeight && e.scrollHeight > e.clientHeight + 1).map(e => e.textContent)",
        )
        assert cut == [], selector
    first = page.locator("tbody tr").first.locator("td").nth(3)
    expect(first).to_have_attribute("title", re.compile("Theodora"))
    second_line = first.locator(".small").bounding_box()
    assert second_line is not None and second_line["x"] + second_line["width"] < SIZE["width"]
    expect(first.locator(".small")).to_contain_text(re.compile("63岁|63 y"))


def test_a_name_that_reorders_reads_the_same_left_to_right_in_the_guard(web: Web, window: BrowserContext) -> None:
    case_id = web.case("1.1", patient_name="张三\u202e四李", patient_id="B\u202e321")
    arabic = web.case("1.2", patient_name="ئابدۇللا", patient_id="C7")
    with web.database.centre() as session:
        session.execute(sa.update(Study).values(patient_age="045Y", patient_sex="M"))
    page = sign_in(window, web, "reader-a")
    expect(page.locator(f"#case-{case_id}")).to_contain_text("张三[U+202E]四李")
    shot(page, "worklist-reordering-zh")
    page.goto(f"{web.url}/cases/{arabic}")
    name, facts = page.locator(".guard .name").bounding_box(), page.locator(".guard .name span").bounding_box()
    assert name is not None and facts is not None and facts["x"] > name["x"] + 30  # sex and age stay behind the name
    page.goto(f"{web.url}/cases/{case_id}")
    expect(page.locator(".guard .name")).to_contain_text("张三[U+202E]四李 男 45岁")
    shot(page, "reading-reordering-zh")


def test_new_cases_wait_behind_a_bar_while_the_pointer_is_over_the_table(web: Web, window: BrowserContext) -> None:
    furnish(web)
    page = sign_in(window, web, "reader-a")
    rows = page.locator("tbody tr")
    expect(rows).to_have_count(8)
    page.mouse.move(400, 300)
    page.mouse.move(420, 310)
    before = rows.first.get_attribute("id")
    web.case("9.1", tier=0, due_at=soon(1), patient_name="Xin=新到")
    expect(page.locator(".newbar")).to_contain_text("新到 1 例")
    expect(rows).to_have_count(8)
    assert rows.first.get_attribute("id") == before
    shot(page, "worklist-new-zh")
    other = web.sign_in("reader-a2")
    other.claim(int(str(before).removeprefix("case-")))
    expect(rows.first).to_contain_text("阅片医师二")  # what is there changes in its place
    page.locator(".newbar").click()
    expect(rows).to_have_count(9)
    page.mouse.move(5, 5)
    web.case("9.2", tier=0, due_at=soon(2))
    expect(rows).to_have_count(10)  # without the pointer nothing waits
    assert page.faults == []  # type: ignore[attr-defined]


def test_the_case_another_reader_has_just_taken_is_said_and_not_opened(web: Web, window: BrowserContext) -> None:
    case_id = web.case("1.1")
    page = sign_in(window, web, "reader-a")
    page.route("**/stream", lambda route: route.abort())  # the news has not arrived yet
    page.reload()
    web.sign_in("reader-a2").claim(case_id)
    page.keyboard.press("Enter")
    expect(page.locator("#notice")).to_contain_text("阅片医师二 刚刚领取")
    expect(page.locator("tbody tr").first).to_contain_text("阅片医师二 在阅")


def write(page: Page, web: Web, case_id: int, text: str) -> None:
    page.goto(f"{web.url}/cases/{case_id}")
    page.keyboard.press("Enter")
    page.locator("#impression").wait_for()
    page.fill("#impression", text)
    page.locator("#impression").blur()
    expect(page.locator("#save-state")).to_have_text(re.compile("已保存"))


def test_a_lease_lost_while_typing_keeps_the_text_and_offers_the_case_back(web: Web, window: BrowserContext) -> None:
    case_id = web.case("1.1")
    page = sign_in(window, web, "reader-a")
    write(page, web, case_id, "第一句。")
    expire(web, case_id)
    other = web.sign_in("reader-a2")
    lease = other.claim(case_id)
    page.fill("#impression", "第一句。第二句。")
    page.locator("#impression").blur()
    expect(page.locator("#trouble")).to_contain_text("领取已失效")
    shot(page, "reading-lease-lost-zh")
    page.locator("#trouble button").click()
    expect(page.locator("#trouble")).to_contain_text("阅片医师二")
    assert page.input_value("#impression") == "第一句。第二句。"
    other.post(f"/cases/{case_id}/hand-back", lease=lease)


def test_an_image_that_lands_while_the_pin_is_typed_must_be_looked_at_first(web: Web, window: BrowserContext) -> None:
    case_id = web.case("1.1")
    page = sign_in(window, web, "reader-a")
    write(page, web, case_id, "未见异常。")
    page.locator("input[value=negative]").check()
    page.keyboard.press("Control+Enter")
    expect(page.locator("#sign-dialog")).to_be_visible()
    study_id = web.row(case_id).study_id
    with web.database.centre() as session:
        session.execute(sa.update(Study).where(Study.id == study_id).values(instance_count=1))
        move(session, Transition.STUDY_EXTENDED, study_id, actor=SYSTEM)
    page.fill("#pin", PIN)
    page.keyboard.press("Enter")
    expect(page.locator("#trouble")).to_contain_text("又到了新图像")
    expect(page.locator("#sign-dialog")).to_be_hidden()
    shot(page, "reading-new-images-zh")
    page.locator("#trouble [data-tool=reload]").click()
    expect(page.locator("#reading")).to_have_attribute("data-images", "1")
    page.locator("#sign").click()
    page.fill("#pin", PIN)
    page.keyboard.press("Enter")  # the browser keeps the form until the box is ticked
    shot(page, "reading-incomplete-zh")
    assert web.events("report.signed") == []
    page.locator("#incomplete").check()
    page.locator("#sign-now").click()
    expect(page.locator("#reading")).to_have_attribute("data-state", "reported")
    assert page.faults == []  # type: ignore[attr-defined]


def test_two_tabs_with_the_same_draft_show_the_conflict_and_overwrite_nothing(web: Web, window: BrowserContext) -> None:
    case_id = web.case("1.1")
    first = sign_in(window, web, "reader-a")
    write(first, web, case_id, "开头。")
    second = window.new_page()
    second.goto(f"{web.url}/cases/{case_id}")
    second.fill("#impression", "第二个窗口的话。")
    second.locator("#impression").blur()
    expect(second.locator("#save-state")).to_have_text(re.compile("已保存"))
    first.fill("#impression", "第一个窗口的话。")
    first.locator("#impression").blur()
    expect(first.locator("#trouble .theirs")).to_contain_text("第二个窗口的话。")
    shot(first, "reading-conflict-zh")
    assert first.input_value("#impression") == "第一个窗口的话。"
    first.locator("#trouble [data-tool=mine]").click()
    expect(first.locator("#trouble")).to_be_hidden()
    expect(first.locator("#save-state")).to_have_text(re.compile("已保存"))
    with web.database.centre() as session:
        assert session.scalars(sa.select(Report.impression)).one() == "第一个窗口的话。"


def test_a_sign_in_that_ends_while_typing_keeps_the_text_until_the_next_sign_in(
    web: Web, window: BrowserContext
) -> None:
    case_id = web.case("1.1")
    page = sign_in(window, web, "reader-a")
    write(page, web, case_id, "开头。")
    with web.database.centre() as session:
        session.execute(sa.update(WebSession).values(expires_at=sa.func.clock_timestamp()))
    page.fill("#impression", "开头。过期之后写的。")
    page.locator("#impression").blur()
    expect(page.locator("#trouble")).to_contain_text("登录已过期")
    shot(page, "reading-signed-out-zh")
    again = sign_in(window, web, "reader-a")
    again.close()
    page.locator("#trouble [data-tool=go-on]").click()
    expect(page.locator("#trouble")).to_be_hidden()
    expect(page.locator("#save-state")).to_have_text(re.compile("已保存"))
    with web.database.centre() as session:
        assert session.scalars(sa.select(Report.impression)).one() == "开头。过期之后写的。"


def test_single_keys_are_off_while_typing_and_composing(web: Web, window: BrowserContext) -> None:
    case_id = web.case("1.1")
    page = sign_in(window, web, "reader-a")
    page.goto(f"{web.url}/cases/{case_id}")
    page.keyboard.press("Enter")
    page.locator("#findings").click()
    page.keyboard.type("bnpchi?")
    assert page.input_value("#findings") == "bnpchi?"
    assert page.url.endswith(f"/cases/{case_id}")
    page.evaluate(
        """() => document.querySelector("#findings").dispatchEvent(
            new KeyboardEvent("keydown", {key: "Escape", isComposing: true, bubbles: true}))"""
    )
    assert page.evaluate("document.activeElement.id") == "findings"  # Esc belongs to the input method


def deliver(web: Web, report_id: int, *, to_pacs: bool) -> None:
    with web.database.centre() as session:
        move(session, Transition.REPORT_RECEIVED, report_id, actor=SYSTEM)
        if to_pacs:
            move(session, Transition.REPORT_DELIVERED, report_id, actor=SYSTEM)


def a_day_at_the_county(web: Web) -> None:
    """Studies at every step, and two reports back, one of them critical."""
    cases = furnish(web)
    reader = web.sign_in("reader-a")
    deliver(web, web.signed(reader, cases["2"]), to_pacs=True)
    deliver(web, web.signed(reader, cases["1"], conclusion="critical"), to_pacs=True)
    web.signed(reader, cases["6"])
    with web.database.centre() as session:
        arriving = add_study(
            session,
            web.sites.county,
            "1.2.3.50",
            patient_name="Yan^Shi Jiu=演示^九",
            modalities=("CT",),
            patient_id="P9",
        )
        held = add_study(
            session, web.sites.county, "1.2.3.51", patient_name="Yan^Shi Shi=演示^十", modalities=("DX",),
            patient_id="P10", state=StudyState.HELD,
        )  # fmt: skip
        session.execute(
            sa.update(Study)
            .where(Study.id == arriving)
            .values(instance_count=37, expected_count=64, study_description="胸部平扫")
        )
        session.execute(sa.update(Study).where(Study.id == held).values(study_description="骨盆正位", instance_count=1))
        beat = {"unsent_instances": 27, "free_disk_bytes": 112 * 10**9, "quarantined": 0, "out_of_space": False}
        session.execute(
            sa.update(Gateway)
            .where(Gateway.id == web.sites.gateway)
            .values(heartbeat=beat, last_heartbeat_at=datetime.now(UTC))
        )
        assert session.scalars(sa.select(Series.id)).first() is not None


@pytest.mark.parametrize("language", ["zh", "en"])
def test_the_county_follows_its_studies_and_opens_its_report(web: Web, window: BrowserContext, language: str) -> None:
    a_day_at_the_county(web)
    page = sign_in(window, web, "clinician-a", language)
    expect(page.locator(".study")).to_have_count(10)
    expect(page.locator(".message.bad")).to_be_visible()
    shot(page, f"county-{language}")
    page.set_viewport_size(PHONE)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    shot(page, f"county-phone-{language}")
    page.set_viewport_size(SIZE)
    critical = page.locator(".study.critical")
    address = critical.locator("a.main").get_attribute("href")
    assert address is not None
    assert page.request.get(f"{web.url}{address}").body().startswith(b"%PDF-")
    expect(page.locator(".study.critical")).to_have_count(0)  # by itself: the event came
    assert [event.actor for event in web.events("report.opened")] == [f"account:{web.accounts['clinician-a']}"]
    assert page.faults == []  # type: ignore[attr-defined]


def history(web: Web) -> None:
    """Forty reports of two hospitals with times as they come in a week."""
    rng = np.random.default_rng(3)
    start = datetime.now(UTC) - timedelta(hours=2)
    names = (
        "case.claimed", "report.signed", "report.received", "report.delivered", "report.opened",
    )  # fmt: skip
    owner = sa.create_engine(web.app.state.settings.database_owner_url)
    with web.database.centre() as session:
        for number in range(40):
            site = web.sites.county if number % 3 else web.sites.other_county
            modality = ("CT", "DX", "ECG", "MR")[number % 4]
            study_id = add_study(session, site, f"5.{number}", state=StudyState.COMPLETE, modalities=(modality,))
            case_id = add_case(session, study_id, priority=list(Priority)[number % 3], due_at=start)
            for name in ("study.completed", *names):
                note(session, study_id, name, subject="study", subject_id=study_id, actor=SYSTEM)
            session.execute(
                sa.update(Case).where(Case.id == case_id).values(contract_due_at=start + timedelta(minutes=75))
            )
    with owner.begin() as connection:
        connection.execute(sa.text("SET LOCAL app.site = 'all'"))
        for study_id in connection.execute(
            sa.text("SELECT id FROM study WHERE study_instance_uid LIKE '5.%'")
        ).scalars():
            scale = 1.6 if study_id % 3 == 0 else 1.0
            steps = np.cumsum(rng.gamma(2, [0.2, 4 * scale, 14 * scale, 9, 0.3, 0.4, 12]))
            at = [start + timedelta(minutes=float(step)) for step in steps]
            for name, moment in zip(("study.announced", "study.completed", *names), at, strict=True):
                acquired = start - timedelta(minutes=float(rng.gamma(2, 2)))
                details = json.dumps({"gateway_received_at": start.isoformat(), "acquired_at": acquired.isoformat()})
                connection.execute(
                    sa.text("UPDATE event SET at = :at, details = cast(:d AS jsonb) WHERE study_id = :s AND name = :n"),
                    {"at": moment, "d": details, "s": study_id, "n": name},
                )
    owner.dispose()


@pytest.mark.parametrize("language", ["zh", "en"])
def test_the_quality_officer_sees_segments_cases_and_a_timeline(
    web: Web, window: BrowserContext, language: str
) -> None:
    history(web)
    case_id = web.case("1.9")
    web.signed(web.sign_in("reader-a"), case_id)
    page = sign_in(window, web, "quality", language)
    expect(page.locator(".headline b")).to_be_visible()
    expect(page.locator("#chart svg")).to_be_visible()
    shot(page, f"quality-{language}")
    page.locator(".figures tbody tr").first.locator("a").last.click()
    expect(page.locator("tbody tr").first).to_be_visible()
    shot(page, f"quality-cases-{language}")
    page.goto(f"{web.url}/quality/studies/{web.row(case_id).study_id}")
    expect(page.locator(".message.good")).to_be_visible()
    assert page.evaluate("document.querySelector('main').scrollWidth <= document.querySelector('main').clientWidth")
    shot(page, f"timeline-{language}")
    assert page.faults == []  # type: ignore[attr-defined]


@pytest.mark.parametrize("language", ["zh", "en"])
def test_the_first_pages_teach(web: Web, window: BrowserContext, language: str) -> None:
    page = window.new_page()
    page.goto(f"{web.url}/language/{language}?next=/sign-in")
    shot(page, f"sign-in-{language}")
    page.close()
    page = sign_in(window, web, "reader-a", language)
    expect(page.locator(".empty")).to_contain_text("YUANZHEN")
    shot(page, f"worklist-empty-{language}")
    page.goto(f"{web.url}/cases/123")
    expect(page.locator("h1")).to_be_visible()
    shot(page, f"not-found-{language}")
    window.clear_cookies()
    page = sign_in(window, web, "radiographer-a", language)
    expect(page.locator(".empty")).to_contain_text("YUANZHEN")
    shot(page, f"county-empty-{language}")
