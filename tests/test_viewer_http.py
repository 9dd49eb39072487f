"""The viewer's pages and files over HTTP, on a small build shaped like OHIF's (the real one: browser tests)."""

import json
from collections.abc import Iterator
from pathlib import Path

import brotli
import pytest

from reading_queue import ohif_config, viewer
from storage.database import Database
from storage.errors import ConfigurationError
from storage.objects import Objects
from storage.settings import Settings
from tests.archive_material import real_file
from tests.centre import Sites
from tests.viewer_web import Opened, Web, web_application

BUNDLE = "app.bundle.0123456789abcdef.js"
INDEX = (
    '<!doctype html><html><head><script>window.PUBLIC_URL="/"</script>'
    f'<script rel="preload" as="script" src="/app-config.js"></script><script defer src="/{BUNDLE}"></script>'
    '<link href="/app.bundle.css" rel="stylesheet"></head><body></body></html>'
)


def small_build(dist: Path) -> Path:
    dist.mkdir(parents=True)
    (dist / "index.html").write_text(INDEX)
    (dist / BUNDLE).write_text(
        """(() => { __webpack_require__.p = "/"; })(); import('/dicom-microscopy-viewer/x.js')"""
    )
    (dist / "8.bundle.fedcba9876543210.js").write_text('__webpack_require__.p = "/";')
    (dist / "app.bundle.css").write_text("@font-face{src:url(/0123456789abcdef.woff2)}")
    (dist / "0123456789abcdef.wasm").write_bytes(b"\0asm")
    (dist / "assets").mkdir()
    (dist / "assets" / "favicon.ico").write_bytes(b"icon")
    return dist


@pytest.fixture
def web(database: Database, objects: Objects, sites: Sites, configuration: Settings, tmp_path: Path) -> Iterator[Web]:
    dist = small_build(tmp_path / "assets" / "ohif")
    ohif_config.rebase(dist)
    packed = brotli.compress((dist / BUNDLE).read_bytes())
    (dist / f"{BUNDLE}.br").write_bytes(packed)
    (tmp_path / "assets" / "secret.txt").write_text("not the viewer's")
    settings = configuration.model_copy(update={"assets_dir": tmp_path / "assets"})
    with web_application(database, objects, sites, settings) as opened:
        yield opened


@pytest.fixture
def ct(web: Web) -> Opened:
    return web.study([real_file("CT_small.dcm")])


def test_a_build_is_moved_under_its_path_once(tmp_path: Path) -> None:
    dist = small_build(tmp_path / "ohif")
    with pytest.raises(ConfigurationError, match="make assets"):
        ohif_config.entry_points(dist)
    assert ohif_config.rebase(dist) == 3
    assert ohif_config.rebase(dist) == 0
    assert '__webpack_require__.p = "/viewer/"' in (dist / BUNDLE).read_text()
    assert "import('/viewer/dicom-microscopy-viewer/x.js')" in (dist / BUNDLE).read_text()
    assert "url(/viewer/0123456789abcdef.woff2)" in (dist / "app.bundle.css").read_text()
    assert ohif_config.entry_points(dist) == ohif_config.EntryPoints((BUNDLE,), ("app.bundle.css",))


def test_something_else_than_a_build_is_refused(tmp_path: Path) -> None:
    (tmp_path / "app.bundle.js").write_text("nothing of webpack's")
    with pytest.raises(ConfigurationError, match="no OHIF build"):
        ohif_config.rebase(tmp_path)


def test_files_come_with_their_type_and_hashed_ones_are_kept_for_ever(web: Web) -> None:
    expected = {
        BUNDLE: ("text/javascript", "immutable"),
        "0123456789abcdef.wasm": ("application/wasm", "immutable"),
        "app.bundle.css": ("text/css", "no-cache"),
        "assets/favicon.ico": ("image/", "no-cache"),
    }
    with web.client(None) as client:
        for name, (media_type, caching) in expected.items():
            answer = client.get(f"/viewer/{name}")
            assert answer.status_code == 200, name
            assert answer.headers["content-type"].startswith(media_type), name
            assert caching in answer.headers["cache-control"], name
            assert answer.headers["x-content-type-options"] == "nosniff"
            again = client.get(f"/viewer/{name}", headers={"If-None-Match": answer.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")


def test_a_browser_that_takes_brotli_gets_the_compressed_twin(web: Web) -> None:
    with web.client(None) as client:
        plain = client.get(f"/viewer/{BUNDLE}", headers={"Accept-Encoding": "identity"})
        packed = client.get(f"/viewer/{BUNDLE}", headers={"Accept-Encoding": "gzip, br"})
    assert "content-encoding" not in plain.headers
    assert packed.headers["content-encoding"] == "br"
    assert packed.headers["content-type"] == plain.headers["content-type"]
    assert "Accept-Encoding" in packed.headers["vary"]
    assert packed.text == plain.text


@pytest.mark.parametrize(
    "name",
    [
        "nothing.js",
        "../secret.txt",
        "%2e%2e/secret.txt",
        "..%2fsecret.txt",
        "index.html",
        f"{BUNDLE}.br",
        "assets",
        "",
        "a%00b",
        "a" * 300,
    ],
)
def test_nothing_but_files_of_the_viewer_is_served(name: str, web: Web) -> None:
    with web.client(None) as client:
        assert client.get(f"/viewer/{name}").status_code == 404


def test_each_case_has_its_own_configuration(web: Web, ct: Opened) -> None:
    with web.client("reader-a") as client:
        client.cookies.set("yuanzhen_language", "zh")
        script = client.get(f"/cases/{ct.case_id}/viewer/app-config.js")
    assert script.headers["content-type"].startswith("text/javascript")
    assert script.headers["cache-control"] == "no-store"
    (line,) = [line for line in script.text.splitlines() if line.startswith("window.config=")]
    config = json.loads(line.removeprefix("window.config=").removesuffix(";"))
    assert config["routerBasename"] == f"/cases/{ct.case_id}/viewer"
    (source,) = config["dataSources"]
    roots = {source["configuration"][name] for name in ("qidoRoot", "wadoRoot", "wadoUriRoot")}
    assert roots == {ct.root}
    assert 'window.PUBLIC_URL="/viewer/"' in script.text
    assert "i18next=zh;" in script.text


def test_any_address_without_an_extension_is_the_page(web: Web, ct: Opened) -> None:
    with web.client("reader-a") as client:
        for path in (ct.page, f"/cases/{ct.case_id}/viewer/segmentation?x=1", f"/cases/{ct.case_id}/viewer/"):
            page = client.get(path)
            assert page.status_code == 200
            assert f'src="/viewer/{BUNDLE}"' in page.text
            assert f'src="/cases/{ct.case_id}/viewer/app-config.js"' in page.text
            assert page.text.index("app-config.js") < page.text.index(BUNDLE)
            policy = page.headers["content-security-policy"]
            assert "'unsafe-eval'" not in policy
            assert "script-src 'self' 'wasm-unsafe-eval';" in policy
        assert client.get(f"/cases/{ct.case_id}/viewer/other.js").status_code == 404
        sent_on = client.get(f"/cases/{ct.case_id}/viewer")
    assert sent_on.status_code == 303
    assert sent_on.headers["location"] == viewer.viewer_path(ct.case_id, ct.study) == ct.page


@pytest.mark.parametrize("case", ["0", "-1", "9223372036854775808", "x", "999"])
def test_a_case_that_cannot_be_is_not_found(case: str, web: Web) -> None:
    with web.client("reader-a") as client:
        for path in (f"/cases/{case}/dicomweb/studies", f"/cases/{case}/viewer/viewer"):
            assert client.get(path).status_code == 404


def test_a_viewer_that_is_not_set_up_says_so_to_the_reader_and_what_to_do_in_the_log(
    web: Web, ct: Opened, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for path in (tmp_path / "assets" / "ohif").rglob("*"):
        path.unlink() if path.is_file() else None
    viewer._entry_points.cache_clear()
    with web.client("reader-a") as client:
        answer = client.get(ct.page)
    assert answer.status_code == 500
    assert "请告诉管理员" in answer.json()["detail"] and "make assets" not in answer.text
    assert "make assets" in "".join(capfd.readouterr())
