"""The report's way: draft, conflict, lost lease, signature, a second version; and what must not happen.

Real typst, pyHanko, S3 with object lock. Leaves out how the PDF and the DICOM objects look: test_report_*.py.
"""

import hashlib
import threading
from io import BytesIO

import numpy as np
import pydicom
import pytest
import sqlalchemy as sa
from PIL import Image
from pyhanko.pdf_utils.reader import PdfFileReader

from reading_queue import heat_map
from storage.database import Database
from storage.errors import MalformedDataSetError, ObjectStoreError
from storage.objects import Objects
from storage.rows import Account, Case, DraftVersion, FeedEntry, Report, Study
from storage.states import Transition
from storage.transitions import SYSTEM, move, verify_chain
from storage.vocabulary import CaseState, ReportState
from tests.test_claims import expire
from tests.web import DISPLAY, PIN, Browser, Web, add_finding, heat_map_file, signing_pki, web

__all__ = ["signing_pki", "web"]

TEXT = {
    "findings": "右肺下叶见片状影。",
    "impression": "右肺下叶炎症可能。",
    "conclusion": "positive",
    "language": "zh",
}


@pytest.fixture
def reader(web: Web) -> Browser:
    return web.sign_in("reader-a")


def draft_row(database: Database, case_id: int) -> Report:
    with database.centre() as session:
        return session.scalars(
            sa.select(Report).where(Report.case_id == case_id, Report.state == ReportState.DRAFT)
        ).one()


def save(browser: Browser, case_id: int, lease: str, revision: int, **changes: str) -> tuple[int, dict[str, object]]:
    answer = browser.post(f"/cases/{case_id}/draft", lease=lease, revision=revision, **(TEXT | changes))
    return answer.status_code, answer.json()


def test_every_save_is_kept_and_counted(web: Web, reader: Browser) -> None:
    case_id = web.case()
    lease = reader.claim(case_id)
    assert save(reader, case_id, lease, 0, impression="一")[1]["revision"] == 1
    assert save(reader, case_id, lease, 1, impression="一二")[1]["revision"] == 2
    assert save(reader, case_id, lease, 2, impression="一二")[1]["revision"] == 2  # nothing new
    with web.database.centre() as session:
        kept = session.scalars(sa.select(DraftVersion).order_by(DraftVersion.revision)).all()
    assert [(one.revision, one.text["impression"]) for one in kept] == [(1, "一"), (2, "一二")]
    assert len(web.events("report.drafted")) == 1
    history = reader.get(f"/cases/{case_id}/drafts").text
    assert history.index("一二") < history.rindex("一")


def test_a_second_tab_overwrites_nothing_and_is_shown_what_is_there(web: Web, reader: Browser) -> None:
    case_id = web.case()
    lease = reader.claim(case_id)
    save(reader, case_id, lease, 0, impression="第一个窗口")
    status, problem = save(reader, case_id, lease, 0, impression="第二个窗口")
    assert (status, problem["type"], problem["revision"]) == (409, "revision", 1)
    assert problem["text"]["impression"] == "第一个窗口"  # type: ignore[index]
    assert draft_row(web.database, case_id).impression == "第一个窗口"
    assert save(reader, case_id, lease, 1, impression="第二个窗口")[0] == 200  # the person chose


def test_a_lost_lease_saves_nothing_and_the_text_can_be_saved_after_claiming_again(web: Web, reader: Browser) -> None:
    case_id = web.case()
    lease = reader.claim(case_id)
    save(reader, case_id, lease, 0)
    expire(web, case_id)
    other = web.sign_in("reader-a2")
    taken = other.claim(case_id)
    status, problem = save(reader, case_id, lease, 1, impression="失效之后写的")
    assert (status, problem["type"]) == (409, "lease-lost")
    refused = reader.post(f"/cases/{case_id}/claim")
    assert refused.json()["holder"] == DISPLAY["reader-a2"]
    other.post(f"/cases/{case_id}/hand-back", lease=taken)
    again = reader.claim(case_id)
    assert save(reader, case_id, again, 1, impression="失效之后写的")[0] == 200


def test_whoever_takes_the_case_over_goes_on_with_the_draft(web: Web, reader: Browser) -> None:
    case_id = web.case()
    lease = reader.claim(case_id)
    save(reader, case_id, lease, 0)
    reader.post(f"/cases/{case_id}/hand-back", lease=lease)
    other = web.sign_in("reader-a2")
    lease = other.claim(case_id)
    assert TEXT["impression"] in other.get(f"/cases/{case_id}").text
    assert save(other, case_id, lease, 1, impression="我的意见")[0] == 200
    assert draft_row(web.database, case_id).author_id == web.accounts["reader-a2"]


def test_a_signed_report_is_whole_under_lock_on_the_feed_and_its_case_done(web: Web, reader: Browser) -> None:
    case_id = web.case()
    report_id = web.signed(reader, case_id, **TEXT)
    report, case = web.report(report_id), web.row(case_id)
    assert (report.state, report.version, case.state, case.claimed_by) == (
        ReportState.SIGNED, 1, CaseState.REPORTED, None,
    )  # fmt: skip
    for key, digest in (
        (report.pdf_key, report.pdf_sha256),
        (report.encapsulated_key, report.encapsulated_sha256),
        (report.sr_key, report.sr_sha256),
    ):
        assert key is not None and key.startswith(f"reports/county-a/{report_id}/v1-")
        assert hashlib.sha256(web.objects.get(key, locked=True)).digest() == digest
    pdf = reader.get(f"/reports/{report_id}/pdf")
    assert pdf.headers["content-type"] == "application/pdf"
    signature = PdfFileReader(BytesIO(pdf.content)).embedded_signatures[0]
    assert signature.field_name == "Author"
    assert signature.signer_cert.subject.native["common_name"] == DISPLAY["reader-a"]
    sr = pydicom.dcmread(BytesIO(web.objects.get(str(report.sr_key), locked=True)))
    assert (sr.StudyInstanceUID, sr.PatientID, sr.VerificationFlag) == ("1.2.3", "P1", "VERIFIED")
    with web.database.centre() as session:
        assert session.scalars(sa.select(FeedEntry.report_id)).all() == [report_id]
        assert verify_chain(session, case.study_id) > 4
    names = [e.name for e in web.events("report.drafted", "report.signed", "case.reported")]
    assert names == ["report.drafted", "report.signed", "case.reported"]


def test_a_report_signed_twice_is_refused_in_words(web: Web, reader: Browser) -> None:
    case_id = web.case()
    lease = reader.claim(case_id)
    revision = web.report_text(reader, case_id, lease)
    fields = {"lease": lease, "revision": revision, "images": 0, "pin": PIN}
    assert reader.post(f"/cases/{case_id}/sign", **fields).status_code == 200
    again = reader.post(f"/cases/{case_id}/sign", **fields)
    assert (again.status_code, again.json()["type"]) == (409, "signed")
    assert "已由 阅片医师一 签发" in again.json()["detail"]
    assert len(web.events("report.signed")) == 1
    late = save(reader, case_id, lease, revision, impression="晚到的保存")
    assert late[0] == 409


def test_a_wrong_pin_changes_nothing_and_five_rest(web: Web, reader: Browser) -> None:
    case_id = web.case()
    lease = reader.claim(case_id)
    revision = web.report_text(reader, case_id, lease)
    for _ in range(5):
        wrong = reader.post(f"/cases/{case_id}/sign", lease=lease, revision=revision, images=0, pin="000000")
        assert (wrong.status_code, wrong.json()["detail"][:6]) == (422, "PIN 不对")
    assert draft_row(web.database, case_id).revision == revision
    assert len(web.events("report.pin_refused")) == 5
    rest = reader.post(f"/cases/{case_id}/sign", lease=lease, revision=revision, images=0, pin=PIN)
    assert rest.status_code == 422 and "15 分钟" in rest.json()["detail"]
    assert web.events("report.signed") == []


@pytest.mark.parametrize(
    ("changes", "words"), [({"impression": "  \n "}, "诊断意见是空的"), ({"conclusion": ""}, "没有选结论")]
)
def test_an_unfinished_report_is_not_signed(web: Web, reader: Browser, changes: dict[str, str], words: str) -> None:
    case_id = web.case()
    lease = reader.claim(case_id)
    revision = web.report_text(reader, case_id, lease, 0, **changes)
    answer = reader.post(f"/cases/{case_id}/sign", lease=lease, revision=revision, images=0, pin=PIN)
    assert answer.status_code == 422 and words in answer.json()["detail"]


def test_an_older_revision_and_a_lost_lease_are_not_signed(web: Web, reader: Browser) -> None:
    case_id = web.case()
    lease = reader.claim(case_id)
    web.report_text(reader, case_id, lease)
    stale = reader.post(f"/cases/{case_id}/sign", lease=lease, revision=0, images=0, pin=PIN)
    assert (stale.status_code, stale.json()["type"]) == (409, "revision")
    expire(web, case_id)
    web.sign_in("reader-a2").claim(case_id)
    lost = reader.post(f"/cases/{case_id}/sign", lease=lease, revision=1, images=0, pin=PIN)
    assert (lost.status_code, lost.json()["type"]) == (409, "lease-lost")
    assert web.events("report.signed") == []


def test_a_reader_without_a_key_is_told_so(web: Web) -> None:
    case_id = web.case(site_id=web.sites.other_county)
    reader = web.sign_in("reader-b", "en")
    lease = reader.claim(case_id)
    revision = web.report_text(reader, case_id, lease)
    answer = reader.post(f"/cases/{case_id}/sign", lease=lease, revision=revision, images=0, pin=PIN)
    assert answer.status_code == 422 and "no signing certificate" in answer.json()["detail"]


def test_images_after_the_signature_make_a_second_version_that_supersedes(web: Web, reader: Browser) -> None:
    case_id = web.case()
    first = web.signed(reader, case_id, **TEXT)
    with web.database.centre() as session:
        move(session, Transition.CASE_REOPENED, case_id, actor=SYSTEM, values={"new_images": True})
    lease = reader.claim(case_id)
    page = reader.get(f"/cases/{case_id}").text
    assert TEXT["findings"] in page and "第 1 版" in page
    revision = web.report_text(reader, case_id, lease, impression="新图像后的意见", conclusion="critical")
    assert reader.post(f"/cases/{case_id}/sign", lease=lease, revision=revision, images=0, pin=PIN).status_code == 200
    with web.database.centre() as session:
        rows = session.scalars(sa.select(Report).order_by(Report.version)).all()
        assert [(row.version, row.state) for row in rows] == [(1, ReportState.SUPERSEDED), (2, ReportState.SIGNED)]
        assert session.scalars(sa.select(Case.new_images)).one() is False
    sr = pydicom.dcmread(BytesIO(web.objects.get(str(rows[1].sr_key), locked=True)))
    assert "PredecessorDocumentsSequence" in sr
    assert reader.get(f"/reports/{first}/pdf").status_code == 200  # kept, and marked as superseded


def test_markup_bidi_and_nul_are_text_and_nothing_else(web: Web, reader: Browser) -> None:
    evil = "<script>alert(1)</script>\u202eabc\0&amp; \"'{{7*7}}"
    case_id = web.case(patient_name=evil.replace("\0", ""))
    lease = reader.claim(case_id)
    assert save(reader, case_id, lease, 0, findings=evil, impression=evil)[0] == 200
    for path in (f"/cases/{case_id}", f"/cases/{case_id}/drafts", "/worklist"):
        html = reader.get(path).text
        assert "<script>alert" not in html and "&lt;script&gt;" in html and "49" not in html.split("abc")[1][:20], path
    assert "\0" not in draft_row(web.database, case_id).findings
    assert "[U+202E]" in reader.get(f"/cases/{case_id}/checks").json()["unprintable"]
    assert reader.post(f"/cases/{case_id}/sign", lease=lease, revision=1, images=0, pin=PIN).status_code == 200


def test_a_text_of_200_kilobytes_is_refused_in_words_and_nothing_is_lost(web: Web, reader: Browser) -> None:
    case_id = web.case()
    lease = reader.claim(case_id)
    save(reader, case_id, lease, 0)
    status, problem = save(reader, case_id, lease, 1, findings="长" * 70_000)
    assert (status, problem["type"]) == (422, "bad-request") and "20000" in str(problem["detail"])
    assert draft_row(web.database, case_id).findings == TEXT["findings"]


@pytest.mark.parametrize(
    "fields",
    [{"conclusion": "maybe"}, {"language": "xx"}, {"revision": "-1"}, {"revision": "x"}, {"revision": str(2**40)},
     {"lease": "x" * 65}],
)  # fmt: skip
def test_choices_that_are_none_are_refused(web: Web, reader: Browser, fields: dict[str, str]) -> None:
    case_id = web.case()
    lease = reader.claim(case_id)
    answer = reader.post(f"/cases/{case_id}/draft", **({"lease": lease, "revision": "0"} | TEXT | fields))
    assert answer.status_code == 422


@pytest.mark.parametrize("case_id", ["0", "-1", "99999999999999999999", "abc", "1e3", "٣"])
def test_ids_that_name_nothing_are_not_found(reader: Browser, case_id: str) -> None:
    assert reader.get(f"/cases/{case_id}").status_code == 404
    assert reader.post(f"/cases/{case_id}/claim").status_code == 404


def test_a_sign_in_that_ended_while_typing_is_said_and_the_draft_goes_on_after_it(web: Web, reader: Browser) -> None:
    case_id = web.case()
    lease = reader.claim(case_id)
    save(reader, case_id, lease, 0)
    reader.post("/sign-out")
    status, problem = save(reader, case_id, lease, 1, impression="过期之后")
    assert (status, problem["type"]) == (401, "sign-in")
    again = web.sign_in("reader-a")  # in another window: a new token, the same lease
    assert save(again, case_id, lease, 1, impression="过期之后")[0] == 200


def test_when_the_object_store_is_away_nothing_is_signed_and_signing_again_works(
    web: Web, reader: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    case_id = web.case()
    lease = reader.claim(case_id)
    revision = web.report_text(reader, case_id, lease)
    fields = {"lease": lease, "revision": revision, "images": 0, "pin": PIN}

    def away(*_: object) -> None:
        raise ObjectStoreError("Object store did not answer")

    with monkeypatch.context() as patch:
        patch.setattr(Objects, "put_locked", away)
        answer = reader.post(f"/cases/{case_id}/sign", **fields)
    assert (answer.status_code, answer.json()["type"], answer.headers["retry-after"]) == (503, "unavailable", "5")
    assert "报告没有签发，文字已保存" in answer.json()["detail"] and "Object store" not in answer.text
    assert draft_row(web.database, case_id).revision == revision and web.row(case_id).state is CaseState.CLAIMED
    assert reader.post(f"/cases/{case_id}/sign", **fields).status_code == 200


def test_a_case_that_leaves_the_readers_hands_while_signing_stays_unsigned(
    web: Web, reader: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    case_id = web.case()
    lease = reader.claim(case_id)
    revision = web.report_text(reader, case_id, lease)
    other = web.sign_in("reader-a2")
    put = Objects.put_locked

    def slow(store: Objects, key: str, data: bytes) -> None:
        if key.endswith(".pdf"):
            expire(web, case_id)
            other.claim(case_id)
        put(store, key, data)

    monkeypatch.setattr(Objects, "put_locked", slow)
    answer = reader.post(f"/cases/{case_id}/sign", lease=lease, revision=revision, images=0, pin=PIN)
    assert (answer.status_code, answer.json()["type"]) == (409, "lease-lost")
    assert web.events("report.signed") == [] and draft_row(web.database, case_id).pdf_key is None
    with web.database.centre() as session:
        assert session.scalars(sa.select(FeedEntry)).all() == []


def test_a_heat_map_is_shown_as_a_picture_and_what_is_none_is_refused(web: Web, reader: Browser) -> None:
    case_id = web.case()
    web.objects.put("results/county-a/h1", heat_map_file())
    run_id = add_finding(web, case_id, heat_map_key="results/county-a/h1")
    picture = reader.get(f"/cases/{case_id}/runs/{run_id}/heat-map.png")
    assert picture.headers["content-type"] == "image/png"
    shown = np.asarray(Image.open(BytesIO(picture.content)))
    assert shown.shape == (256, 256, 3) and shown[170, 90, 0] > 240
    with pytest.raises(MalformedDataSetError):
        heat_map.encode(np.zeros((2, 2), np.uint16))


def test_a_draft_saved_by_two_tabs_at_once_is_saved_by_one(web: Web, reader: Browser) -> None:
    case_id = web.case()
    lease = reader.claim(case_id)
    answers: list[int] = []

    def once(text: str) -> None:
        answers.append(save(reader, case_id, lease, 0, impression=text)[0])

    threads = [threading.Thread(target=once, args=(f"第{n}份",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [200, 409, 409, 409]


def arrive(web: Web, case_id: int, count: int, *transitions: Transition) -> None:
    """The study has `count` images now, and takes these transitions."""
    study_id = web.row(case_id).study_id
    with web.database.centre() as session:
        session.execute(sa.update(Study).where(Study.id == study_id).values(instance_count=count))
        for transition in transitions:
            move(session, transition, study_id, actor=SYSTEM)


def test_images_that_the_page_did_not_show_are_not_signed_for(web: Web, reader: Browser) -> None:
    case_id = web.case()
    arrive(web, case_id, 2)
    lease = reader.claim(case_id)
    assert 'data-images="2"' in reader.get(f"/cases/{case_id}").text
    revision = web.report_text(reader, case_id, lease)
    arrive(web, case_id, 3)
    with web.database.centre() as session:
        session.execute(sa.update(Case).values(new_images=True))
    fields = {"lease": lease, "revision": revision, "pin": PIN}
    for incomplete in ("false", "true"):
        refused = reader.post(f"/cases/{case_id}/sign", images=2, incomplete=incomplete, **fields)
        assert (refused.status_code, refused.json()["type"]) == (409, "new-images")
        assert "没有签发" in refused.json()["detail"]
    assert web.events("report.signed") == [] and web.row(case_id).new_images
    assert reader.get(f"/cases/{case_id}/checks").json()["images"] == 3
    assert 'data-images="3"' in reader.get(f"/cases/{case_id}").text  # reloaded
    assert reader.post(f"/cases/{case_id}/sign", images=3, **fields).status_code == 200


def test_a_page_that_does_not_say_how_many_images_it_showed_signs_nothing(web: Web, reader: Browser) -> None:
    case_id = web.case()
    lease = reader.claim(case_id)
    revision = web.report_text(reader, case_id, lease)
    assert reader.post(f"/cases/{case_id}/sign", lease=lease, revision=revision, pin=PIN).status_code == 422


def test_a_study_whose_images_are_still_arriving_is_signed_only_by_who_says_so(web: Web, reader: Browser) -> None:
    case_id = web.case()
    lease = reader.claim(case_id)
    revision = web.report_text(reader, case_id, lease)
    arrive(web, case_id, 1, Transition.STUDY_EXTENDED)
    fields = {"lease": lease, "revision": revision, "images": 1, "pin": PIN}
    refused = reader.post(f"/cases/{case_id}/sign", **fields)
    assert (refused.status_code, refused.json()["type"]) == (409, "new-images")
    assert "图像还没有到齐" in reader.get(f"/cases/{case_id}").text
    assert reader.get(f"/cases/{case_id}/checks").json()["complete"] is False
    assert reader.post(f"/cases/{case_id}/sign", incomplete="true", **fields).status_code == 200


def test_an_image_that_lands_while_the_report_is_being_signed_stops_the_signature(
    web: Web, reader: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    case_id = web.case()
    arrive(web, case_id, 2)
    lease = reader.claim(case_id)
    revision = web.report_text(reader, case_id, lease)
    put = Objects.put_locked

    def slow(store: Objects, key: str, data: bytes) -> None:
        if key.endswith(".pdf"):
            arrive(web, case_id, 3)
        put(store, key, data)

    monkeypatch.setattr(Objects, "put_locked", slow)
    answer = reader.post(f"/cases/{case_id}/sign", lease=lease, revision=revision, images=2, pin=PIN)
    assert (answer.status_code, answer.json()["type"], answer.json()["images"]) == (409, "new-images", 3)
    assert web.events("report.signed") == [] and draft_row(web.database, case_id).pdf_key is None


def test_the_recorded_author_is_who_signed_and_not_who_wrote_last(web: Web, reader: Browser) -> None:
    case_id = web.case()
    lease = reader.claim(case_id)
    revision = web.report_text(reader, case_id, lease)
    reader.post(f"/cases/{case_id}/hand-back", lease=lease)
    other = web.sign_in("reader-a2")
    lease = other.claim(case_id)
    answer = other.post(f"/cases/{case_id}/sign", lease=lease, revision=revision, images=0, pin=PIN)
    report = web.report(answer.json()["report_id"])
    assert report.author_id == web.accounts["reader-a2"]
    pdf = PdfFileReader(BytesIO(web.objects.get(str(report.pdf_key), locked=True)))
    assert pdf.embedded_signatures[0].signer_cert.subject.native["common_name"] == DISPLAY["reader-a2"]
    page = reader.get(f"/cases/{case_id}").text
    assert f"{DISPLAY['reader-a2']} 签发于" in page and f"{DISPLAY['reader-a']} 签发于" not in page


def test_two_readers_of_one_name_are_two_authors(web: Web, reader: Browser) -> None:
    case_id = web.case()
    with web.database.centre() as session:
        session.execute(sa.update(Account).values(display_name="阅片医师"))
    lease = reader.claim(case_id)
    save(reader, case_id, lease, 0)
    reader.post(f"/cases/{case_id}/hand-back", lease=lease)
    other = web.sign_in("reader-a2")
    assert save(other, case_id, other.claim(case_id), 1)[1]["revision"] == 2
    assert draft_row(web.database, case_id).author_id == web.accounts["reader-a2"]


def test_many_pins_at_once_are_tried_no_oftener_than_one_after_another(web: Web, reader: Browser) -> None:
    case_id = web.case()
    lease = reader.claim(case_id)
    revision = web.report_text(reader, case_id, lease)
    answers: list[str] = []

    def guess(pin: str) -> None:
        fields = {"lease": lease, "revision": revision, "images": 0, "pin": pin}
        answers.append(reader.post(f"/cases/{case_id}/sign", **fields).json()["detail"])

    threads = [threading.Thread(target=guess, args=(f"{n:06}",)) for n in range(14)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum("PIN 不对" in answer for answer in answers) == 5
    assert sum("15 分钟" in answer for answer in answers) == 9
    assert len(web.events("pin.tried")) == len(web.events("report.pin_refused")) == 5


def test_a_right_pin_whose_report_could_not_be_stored_does_not_count_as_wrong(
    web: Web, reader: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    case_id = web.case()
    lease = reader.claim(case_id)
    fields = {"lease": lease, "revision": web.report_text(reader, case_id, lease), "images": 0, "pin": PIN}

    def away(*_: object) -> None:
        raise ObjectStoreError("Object store did not answer")

    with monkeypatch.context() as patch:
        patch.setattr(Objects, "put_locked", away)
        for _ in range(6):
            assert reader.post(f"/cases/{case_id}/sign", **fields).status_code == 503
    assert reader.post(f"/cases/{case_id}/sign", **fields).status_code == 200


def test_the_check_before_signing_names_what_is_printed_as_codes_in_any_field(web: Web, reader: Browser) -> None:
    case_id = web.case(patient_id="B\u202e321")
    with web.database.centre() as session:
        session.execute(sa.update(Study).values(accession_number="A\u2066"))
        session.execute(sa.update(Account).values(display_name="阅\u200f片"))
    lease = reader.claim(case_id)
    assert reader.get(f"/cases/{case_id}/checks").json()["unprintable"] == ""  # nothing written
    save(reader, case_id, lease, 0, findings="𠮷", conclusion="")
    codes = reader.get(f"/cases/{case_id}/checks").json()["unprintable"].split()
    assert {"[U+202E]", "[U+2066]", "[U+200F]"} <= set(codes)
    assert all(code.startswith("[U+") and code.isascii() for code in codes)
