"""Sign-in: who gets in, lock-out, the session, language. Also the pages' words."""

import re
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from reading_queue import i18n
from reading_queue.auth import local_path
from storage.rows import Account, WebSession
from storage.vocabulary import Role
from tests.web import PASSWORD, PEOPLE, Web, signing_pki, web

__all__ = ["signing_pki", "web"]

REFUSED = "用户名或密码不对"


def attempt(web: Web, username: str, password: str) -> tuple[int, str]:
    with web.anonymous() as client:
        answer = client.post("/sign-in", data={"username": username, "password": password})
        return answer.status_code, answer.text


def test_wrong_name_and_wrong_password_get_the_same_answer(web: Web) -> None:
    unknown = attempt(web, "nobody", PASSWORD)
    wrong = attempt(web, "reader-a", "guess")
    assert unknown[0] == wrong[0] == 401
    assert REFUSED in wrong[1]
    assert unknown[1].replace("nobody", "reader-a") == wrong[1]


def test_after_five_failures_the_right_password_is_refused_too_until_the_rest_is_over(web: Web) -> None:
    for _ in range(5):
        assert attempt(web, "reader-a", "guess")[0] == 401
    assert attempt(web, "reader-a", PASSWORD)[0] == 401
    with web.database.centre() as session:
        session.execute(
            sa.update(Account)
            .where(Account.username == "reader-a")
            .values(locked_until=sa.func.clock_timestamp() - timedelta(seconds=1))
        )
    assert attempt(web, "reader-a", PASSWORD)[0] == 303


def test_guesses_at_once_get_no_more_tries_than_five(web: Web) -> None:
    threads = [threading.Thread(target=attempt, args=(web, "reader-a", f"guess {n}")) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with web.database.centre() as session:
        row = session.execute(
            sa.select(Account.failed_logins, Account.locked_until).where(Account.username == "reader-a")
        ).one()
    assert row.failed_logins == 5 and row.locked_until is not None


def test_a_success_forgets_the_failures(web: Web) -> None:
    for _ in range(4):
        attempt(web, "reader-a", "guess")
    assert attempt(web, "reader-a", PASSWORD)[0] == 303
    assert attempt(web, "reader-a", "guess")[0] == 401
    assert attempt(web, "reader-a", PASSWORD)[0] == 303


def test_sign_ins_and_refusals_are_events_without_what_was_typed(web: Web) -> None:
    attempt(web, "reader-a", PASSWORD)
    attempt(web, "reader-a", "my secret guess")
    attempt(web, "typed-password-here", "x")
    events = web.events("user.signed_in", "user.refused")
    assert [(e.name, e.subject_id) for e in events] == [
        ("user.signed_in", web.accounts["reader-a"]), ("user.refused", web.accounts["reader-a"]), ("user.refused", 0),
    ]  # fmt: skip
    assert all(event.details == {} for event in events)


def test_only_the_digest_of_the_session_is_stored_and_the_cookie_is_guarded(web: Web) -> None:
    with web.anonymous() as client:
        answer = client.post("/sign-in", data={"username": "reader-a", "password": PASSWORD})
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=lax" in cookie
    token = re.search(r"yuanzhen_session=([^;]+)", cookie)[1]  # type: ignore[index]
    with web.database.centre() as session:
        row = session.scalars(sa.select(WebSession)).one()
    assert len(row.token_sha256) == 32 and token.encode() not in row.token_sha256


def test_signing_out_ends_the_session_for_good(web: Web) -> None:
    reader = web.sign_in("reader-a")
    token = reader.client.cookies["yuanzhen_session"]
    assert reader.post("/sign-out").status_code == 303
    with web.anonymous() as client:
        client.cookies.set("yuanzhen_session", token)
        assert client.get("/session", headers={"Accept": "application/json"}).status_code == 401


def test_signing_in_as_somebody_else_ends_the_session_that_the_browser_had(web: Web) -> None:
    reader = web.sign_in("reader-a")
    token = reader.client.cookies["yuanzhen_session"]
    answer = reader.client.post("/sign-in", data={"username": "reader-a2", "password": PASSWORD})
    assert answer.status_code == 303
    assert reader.client.get("/session").json()["account_id"] == web.accounts["reader-a2"]
    with web.anonymous() as client:
        client.cookies.set("yuanzhen_session", token)
        assert client.get("/session", headers={"Accept": "application/json"}).status_code == 401
    assert [event.subject_id for event in web.events("user.signed_out")] == [web.accounts["reader-a"]]


def test_a_wrong_password_leaves_the_session_that_the_browser_has(web: Web) -> None:
    reader = web.sign_in("reader-a")
    assert reader.client.post("/sign-in", data={"username": "reader-a2", "password": "guess"}).status_code == 401
    assert reader.client.get("/session").json()["account_id"] == web.accounts["reader-a"]


def test_a_session_ends_with_its_time(web: Web) -> None:
    reader = web.sign_in("reader-a")
    with web.database.centre() as session:
        session.execute(sa.update(WebSession).values(expires_at=sa.func.clock_timestamp()))
    assert reader.get("/session", Accept="application/json").status_code == 401


@pytest.mark.parametrize("username", sorted(PEOPLE))
def test_everybody_starts_on_the_page_of_their_work(web: Web, username: str) -> None:
    homes = {Role.READER: "/worklist", Role.RADIOGRAPHER: "/county", Role.CLINICIAN: "/county"}
    browser = web.sign_in(username)
    answer = browser.get("/")
    assert answer.headers["location"] == homes.get(PEOPLE[username][0], "/quality")
    assert browser.get(answer.headers["location"]).status_code == 200


def test_after_sign_in_people_come_to_where_they_wanted_to_go_and_never_elsewhere(web: Web) -> None:
    with web.anonymous() as client:
        to_form = client.get("/worklist?q=%E5%BC%A0&view=mine", headers={"Accept": "text/html"})
        form = client.get(to_form.headers["location"])
        target = re.search(r'name="next" value="([^"]+)"', form.text)[1].replace("&amp;", "&")  # type: ignore[index]
        fields = {"username": "reader-a", "password": PASSWORD}
        assert client.post("/sign-in", data={**fields, "next": target}).headers["location"] == target
        assert "view=mine" in target
        away = client.post("/sign-in", data={**fields, "next": "//elsewhere.example/"})
        assert away.headers["location"] == "/"


@pytest.mark.parametrize("target", ["//evil", "/\\evil", "https://evil", "javascript:x", "", "/a\nb", "/a\tb"])
def test_a_target_that_leaves_us_is_replaced(target: str) -> None:
    assert local_path(target) == "/"


@pytest.mark.parametrize(
    ("accept", "language"),
    [("", "zh"), ("en-GB,en;q=0.9", "en"), ("zh-CN,en;q=0.8", "zh"), ("fr,en;q=0.2,zh;q=0.1", "en"), ("de", "zh"),
     ("en;q=x, zh", "zh"), ("en;q=0", "zh")],
)  # fmt: skip
def test_the_first_page_is_in_the_browsers_language_and_chinese_otherwise(web: Web, accept: str, language: str) -> None:
    with web.anonymous() as client:
        text = client.get("/sign-in", headers={"Accept-Language": accept}).text
        assert (i18n.t("auth.submit", "en") in text) == (language == "en")


def test_the_chosen_language_is_remembered(web: Web) -> None:
    with web.anonymous() as client:
        assert client.get("/language/en?next=/sign-in").headers["location"] == "/sign-in"
        assert "User name" in client.get("/sign-in", headers={"Accept-Language": "zh"}).text
        assert client.get("/language/xx").status_code == 404


def test_every_text_that_pages_ask_for_is_there_in_both_languages() -> None:
    root = Path(i18n.__file__).parent
    asked = set()
    for path in [*root.glob("templates/*.html"), *root.glob("*.py")]:
        asked |= set(re.findall(r"""\bt\(\s*["']([a-z]+\.[A-Za-z_]+)["']""", path.read_text("utf-8")))
    assert len(asked) > 100
    known = set(i18n.texts())
    # Built in the template from a state's name ("common.report_" ~ state): a family of texts.
    families = {name for name in asked if name.endswith("_")}
    assert asked - families - known == set()
    assert all(any(key.startswith(family) for key in known) for family in families)


def test_names_and_passwords_of_any_length_and_kind_are_only_refused(web: Web) -> None:
    for username, password in (("\0", "\0"), ("x" * 64, "y" * 1024), ("<script>", "'; DROP TABLE account; --")):
        assert attempt(web, username, password)[0] == 401
    assert attempt(web, "x" * 65, "y")[0] == 422
    assert attempt(web, "x", "y" * 2_000_000)[0] == 413
