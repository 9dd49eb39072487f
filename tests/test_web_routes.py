"""Who may call what: every route of the application, each role, another hospital's people, nobody, and no CSRF token.

The table below names every route; a route that is not in it fails the test, so that a new one must say who may call it.
"""

import re
from dataclasses import dataclass

import pytest
from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute

from reading_queue.auth import Guard, anyone
from storage.vocabulary import Role
from tests.web import PEOPLE, Browser, Web, signing_pki, web

__all__ = ["signing_pki", "web"]

ALL = frozenset(Role)
READER = frozenset({Role.READER})
COUNTY = frozenset({Role.RADIOGRAPHER, Role.CLINICIAN})
QUALITY = frozenset({Role.QUALITY, Role.ADMINISTRATOR})
SEES_IMAGES = frozenset({Role.READER, Role.QUALITY}) | COUNTY
PUBLIC: frozenset[Role] | None = None

TABLE: dict[tuple[str, str], frozenset[Role] | None] = {
    ("GET", "/"): ALL,
    ("GET", "/session"): ALL,
    ("POST", "/sign-out"): ALL,
    ("GET", "/stream"): ALL,
    ("GET", "/sign-in"): PUBLIC,
    ("POST", "/sign-in"): PUBLIC,
    ("GET", "/language/{language}"): PUBLIC,
    ("GET", "/healthz"): PUBLIC,
    ("GET", "/viewer/{name:path}"): PUBLIC,
    ("GET", "/worklist"): READER,
    ("GET", "/worklist/rows"): READER,
    ("GET", "/worklist/{case_id}/order"): READER,
    ("POST", "/worklist/next"): READER,
    ("GET", "/cases/{case_id}"): READER,
    ("GET", "/cases/{case_id}/checks"): READER,
    ("GET", "/cases/{case_id}/drafts"): READER,
    ("GET", "/cases/{case_id}/runs/{run_id}/heat-map.png"): READER,
    ("POST", "/cases/{case_id}/claim"): READER,
    ("POST", "/cases/{case_id}/heartbeat"): READER,
    ("POST", "/cases/{case_id}/hand-back"): READER,
    ("POST", "/cases/{case_id}/draft"): READER,
    ("POST", "/cases/{case_id}/sign"): READER,
    ("GET", "/reports/{report_id}/pdf"): frozenset({Role.READER, Role.QUALITY}),
    ("GET", "/county"): COUNTY,
    ("GET", "/county/rows"): COUNTY,
    ("GET", "/county/reports/{report_id}/pdf"): COUNTY,
    ("GET", "/quality"): QUALITY,
    ("GET", "/quality/cases"): QUALITY,
    ("GET", "/quality/export.csv"): QUALITY,
    ("GET", "/quality/studies/{study_id}"): QUALITY,
}
VIEWER = re.compile(r"^/cases/\{case_id\}/(viewer|dicomweb)(/|$)")


@dataclass(frozen=True)
class Found:
    method: str
    path: str
    roles: frozenset[Role] | None
    guarded: bool


def routes_of(router: APIRouter | FastAPI) -> list[APIRoute]:
    found: list[APIRoute] = []
    for route in router.routes:
        if isinstance(route, APIRoute):
            found.append(route)
        elif isinstance(inner := getattr(route, "original_router", None), APIRouter):
            found.extend(routes_of(inner))
    return found


def guards(dependant: object) -> list[object]:
    calls = [getattr(dependant, "call", None)]
    for inner in getattr(dependant, "dependencies", []):
        calls.extend(guards(inner))
    return calls


def found_routes(app: FastAPI) -> list[Found]:
    found = []
    for route in routes_of(app):
        calls = guards(route.dependant)
        roles = next((call.roles for call in calls if isinstance(call, Guard)), None)
        guarded = roles is not None or anyone in calls
        found += [Found(method, route.path, roles, guarded) for method in (route.methods or set()) - {"HEAD"}]
    return found


def test_every_route_names_who_may_call_it(web: Web) -> None:
    routes = found_routes(web.app)
    assert [route for route in routes if not route.guarded] == []
    images = {(route.method, route.path): route.roles for route in routes if VIEWER.match(route.path)}
    assert len(images) > 10
    assert set(images.values()) == {SEES_IMAGES}
    rest = {(route.method, route.path): route.roles for route in routes if not VIEWER.match(route.path)}
    assert rest == TABLE


ROUTE_FILL = {"language": "en", "name:path": "nothing.js", "path:path": "viewer", "study": "1.2.3"}


def address(path: str, ids: dict[str, int]) -> str:
    fill = {"case_id": ids["case"], "report_id": ids["report"], "study_id": ids["study"], "run_id": 1}
    return re.sub(r"\{([^}]+)\}", lambda found: str(fill.get(found[1], ROUTE_FILL.get(found[1], "1.2.3"))), path)


@pytest.fixture
def ids(web: Web) -> dict[str, int]:
    """A signed report of county A's study, with its case."""
    reader = web.sign_in("reader-a")
    case_id = web.case()
    report_id = web.signed(reader, case_id)
    return {"case": case_id, "report": report_id, "study": web.row(case_id).study_id}


def call(browser: Browser, method: str, path: str, ids: dict[str, int]) -> int:
    if path == "/stream":  # it never ends
        with browser.client.stream("GET", path) as answer:
            return answer.status_code
    where = address(path, ids)
    return (browser.get(where) if method == "GET" else browser.post(where)).status_code


def test_each_role_on_each_route_gets_in_or_is_refused(web: Web, ids: dict[str, int]) -> None:
    own = ("reader-a", "quality", "administrator", "radiographer-a", "clinician-a")
    routes = [route for route in found_routes(web.app) if route.path != "/sign-out"]
    wrong = []
    for username in own:
        browser = web.sign_in(username)
        for route in routes:
            status = call(browser, route.method, route.path, ids)
            allowed = route.roles is None or PEOPLE[username][0] in route.roles
            if (status == 403) == allowed or status >= 500:
                wrong.append((username, route.method, route.path, status))
    assert wrong == []


def test_people_of_another_hospital_find_nothing_of_this_one(web: Web, ids: dict[str, int]) -> None:
    with_ids = [route for route in found_routes(web.app) if re.search(r"\{(case|report|study|run)_id\}", route.path)]
    for username in ("reader-b", "clinician-b"):
        browser = web.sign_in(username)
        for route in with_ids:
            if route.method == "POST" and route.path.endswith(("draft", "sign", "heartbeat", "hand-back")):
                fields = {"lease": "x", "revision": 0, "images": 1, "pin": "1"}
                status = browser.post(address(route.path, ids), **fields).status_code
            else:
                status = call(browser, route.method, route.path, ids)
            assert status in {403, 404, 409}, (username, route.path, status)
            assert status != 409 or route.path.endswith(("heartbeat", "hand-back")), route.path


def test_nobody_gets_in_without_a_sign_in(web: Web, ids: dict[str, int]) -> None:
    with web.anonymous() as client:
        for route in found_routes(web.app):
            if route.roles is None or route.path == "/stream":
                continue
            where = address(route.path, ids)
            as_script = client.request(route.method, where, headers={"Accept": "application/json"})
            assert as_script.status_code == 401, where
            if route.method == "GET" and not VIEWER.match(route.path):
                as_person = client.get(where, headers={"Accept": "text/html"})
                assert as_person.status_code == 303 and as_person.headers["location"].partition("?")[0].endswith(
                    "/sign-in"
                ), where


def test_a_changing_request_without_the_token_is_refused(web: Web, ids: dict[str, int]) -> None:
    for username in ("reader-a", "clinician-a"):
        browser = web.sign_in(username)
        for route in found_routes(web.app):
            if route.method == "GET" or route.roles is None:
                continue
            where = address(route.path, ids)
            for headers in ({}, {"X-CSRF-Token": "guessed"}):
                assert browser.client.post(where, headers=headers).status_code == 403, where
            assert browser.client.post(where, data={"csrf": "guessed"}).status_code == 403, where
        assert browser.get("/session").status_code == 200  # nobody was signed out


def test_another_sites_page_cannot_post_even_the_sign_in_form(web: Web) -> None:
    with web.anonymous() as client:
        for headers in ({"Origin": "https://elsewhere.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Origin": "null"}):
            assert client.post("/sign-in", data={"username": "x", "password": "y"}, headers=headers).status_code == 403


def test_every_answer_carries_the_security_headers(web: Web, ids: dict[str, int]) -> None:
    reader = web.sign_in("reader-a")
    for path in ("/worklist", "/sign-in", "/nowhere", "/static/style.css", f"/cases/{ids['case']}", "/healthz"):
        headers = reader.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe-inline" not in policy and "frame-ancestors 'self'" in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "same-origin"
