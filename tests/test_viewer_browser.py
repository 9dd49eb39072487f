"""OHIF in a real Chromium on our DICOMweb: what a reader sees. Other browsers and 3-D layouts are left out."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pydicom
import pytest
from playwright.sync_api import Browser, Frame, Page, sync_playwright
from pydicom.uid import generate_uid

from reading_queue import ohif_config
from storage.database import Database
from storage.errors import ConfigurationError
from storage.objects import Objects
from storage.settings import Settings
from tests.archive_material import real_file, saved
from tests.centre import Sites
from tests.peers import peer
from tests.viewer_web import Opened, Web, encapsulated_pdf, web_application

ASSETS = Path(os.environ.get("YUANZHEN_ASSETS_DIR", ".cache/assets"))
FLAGS = [
    "--no-sandbox",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-unsafe-swiftshader",
]
READY_S = 90
# How many different pixels a canvas shows; a black or empty one has one.
DISTINCT = """() => Math.max(0, ...[...document.querySelectorAll('canvas.cornerstone-canvas')].map(canvas => {
    const copy = document.createElement('canvas');
    copy.width = canvas.width; copy.height = canvas.height;
    if (!canvas.width || !canvas.height) return 0;
    const context = copy.getContext('2d', {willReadFrequently: true});
    context.drawImage(canvas, 0, 0);
    const {data} = context.getImageData(0, 0, copy.width, copy.height);
    const seen = new Set();
    for (let i = 0; i < data.length; i += 4) {
        seen.add(data[i] << 16 | data[i + 1] << 8 | data[i + 2]);
        if (seen.size > 10) return seen.size;
    }
    return seen.size;
}))"""
VISIBLE = f"({DISTINCT})() > 10"
LOADED = "performance.getEntriesByType('resource').filter(e => e.name.includes('/frames/')).length"


def assets_or_skip() -> Path:
    try:
        ohif_config.entry_points(ASSETS / "ohif")
    except ConfigurationError as error:
        pytest.skip(error.reason)
    return ASSETS.resolve()


pytestmark = pytest.mark.peer("chromium")


def wait_until(page: Page | Frame, condition: str) -> None:
    """Poll: Playwright's wait_for_function evaluates a string in the page, which the page's policy forbids."""
    deadline = time.monotonic() + READY_S
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, f"not within {READY_S} s: {condition}"
        page.wait_for_timeout(100)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=peer("chromium"), headless=True, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def web(database: Database, objects: Objects, sites: Sites, configuration: Settings) -> Iterator[Web]:
    settings = configuration.model_copy(update={"assets_dir": assets_or_skip()})
    with web_application(database, objects, sites, settings) as opened:
        yield opened


@dataclass
class Seen:
    """A page, and what it complained about."""

    page: Page
    faults: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@dataclass
class Screen:
    """Opens cases as a person sees them."""

    web: Web
    browser: Browser
    shots: Path

    def open(self, case: Opened, *, username: str = "reader-a", language: str = "zh") -> Seen:
        context = self.browser.new_context(viewport={"width": 1400, "height": 900})
        cookies = self.web.cookies(username) | {"yuanzhen_language": language}
        context.add_cookies([{"name": name, "value": value, "url": self.web.url} for name, value in cookies.items()])
        seen = Seen(context.new_page())
        seen.page.on("console", lambda m: seen.faults.append(m.text) if "Content Security Policy" in m.text else None)
        seen.page.on("pageerror", lambda error: seen.faults.append(str(error)))
        seen.page.on("request", lambda request: seen.requests.append(request.url))
        seen.page.on(
            "response",
            lambda answer: seen.faults.append(f"{answer.status} {answer.url}") if answer.status >= 400 else None,
        )
        seen.page.goto(self.web.url + case.page)
        return seen

    def shot(self, seen: Seen, name: str) -> None:
        seen.page.screenshot(path=self.shots / f"{name}.png")


@pytest.fixture
def screen(web: Web, chromium: Browser, tmp_path: Path) -> Iterator[Screen]:
    shots = Path(os.environ.get("YUANZHEN_SCREENSHOTS", tmp_path))
    shots.mkdir(parents=True, exist_ok=True)
    yield Screen(web, chromium, shots)
    for context in chromium.contexts:
        context.close()


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("chest-cr", "RG1_UNCR.dcm"),
        ("ct-small", "CT_small.dcm"),
        ("head-ct", "693_J2KR.dcm"),
        ("mr", "MR2_UNCR.dcm"),
        ("ultrasound-loop", "examples_ybr_color.dcm"),
        ("echo-loop", "color3d_jpeg_baseline.dcm"),
        ("ultrasound-palette", "OBXXXX1A_rle_2frame.dcm"),
        ("enhanced-ct", "eCT_Supplemental.dcm"),
        ("deflated", "image_dfl.dcm"),
        ("big-endian-mr", "MR_small_bigendian.dcm"),
    ],
)
def test_pixels_are_visible(name: str, file: str, screen: Screen) -> None:
    case = screen.web.study([real_file(file)])
    seen = screen.open(case)
    try:
        wait_until(seen.page, VISIBLE)
    finally:
        screen.shot(seen, name)
    assert seen.faults == []
    assert all(url.startswith((screen.web.url, "data:", "blob:")) for url in seen.requests)
    frames = [url for url in seen.requests if "/frames/" in url]
    assert all(f"/cases/{case.case_id}/dicomweb/" in url for url in frames)


def test_a_loop_plays(screen: Screen) -> None:
    case = screen.web.study([real_file("examples_ybr_color.dcm")])
    seen = screen.open(case)
    wait_until(seen.page, VISIBLE)
    wait_until(seen.page, f"{LOADED} >= 30")
    screen.shot(seen, "ultrasound-loop-playing")
    assert seen.faults == []


def test_a_stack_of_slices_is_one_series(screen: Screen, tmp_path: Path) -> None:
    slices = []
    data_set = pydicom.dcmread(real_file("CT_small.dcm"))
    for number in range(1, 9):
        data_set.SOPInstanceUID = data_set.file_meta.MediaStorageSOPInstanceUID = generate_uid(
            entropy_srcs=[str(number)]
        )
        data_set.InstanceNumber = number
        data_set.ImagePositionPatient = [0, 0, 5 * number]
        slices.append(saved(data_set, tmp_path / f"{number}.dcm"))
    seen = screen.open(screen.web.study(slices))
    wait_until(seen.page, VISIBLE)
    wait_until(seen.page, f"{LOADED} >= 8")
    screen.shot(seen, "ct-stack")
    assert seen.faults == []


def test_the_twelve_leads_are_drawn(screen: Screen) -> None:
    seen = screen.open(screen.web.study([real_file("waveform_ecg.dcm")], specialty="ecg"))
    try:
        wait_until(seen.page, VISIBLE)
    finally:
        screen.shot(seen, "ecg")
    assert seen.faults == []
    assert any(url.endswith("/bulkdata/54000100/0/54001010") for url in seen.requests)


def test_an_encapsulated_pdf_is_shown(screen: Screen, tmp_path: Path) -> None:
    seen = screen.open(screen.web.study([encapsulated_pdf(tmp_path / "report.dcm")]))
    try:
        seen.page.wait_for_selector("object[type='application/pdf']", state="attached", timeout=READY_S * 1000)
    finally:
        screen.shot(seen, "pdf")
    shown = "async element => [element.data, (await (await fetch(element.data)).text()).slice(0, 5)]"
    address, beginning = seen.page.eval_on_selector("object[type='application/pdf']", shown)
    assert address.startswith("blob:")
    assert beginning == "%PDF-"
    assert seen.faults == []


@pytest.mark.parametrize(("language", "word"), [("zh", "检查"), ("en", "Studies")])
def test_the_viewer_speaks_the_language_chosen(language: str, word: str, screen: Screen) -> None:
    seen = screen.open(screen.web.study([real_file("CT_small.dcm")]), language=language)
    wait_until(seen.page, VISIBLE)
    screen.shot(seen, f"language-{language}")
    assert word in seen.page.inner_text("body")


def test_the_viewer_may_be_framed_by_our_pages_only(screen: Screen) -> None:
    case = screen.web.study([real_file("CT_small.dcm")])
    with screen.web.client("reader-a") as client:
        answer = client.get(case.page)
    assert answer.headers["x-frame-options"] == "SAMEORIGIN"
    assert "frame-ancestors 'self'" in answer.headers["content-security-policy"]
    context = screen.browser.new_context()
    cookies = screen.web.cookies("reader-a")
    context.add_cookies([{"name": name, "value": value, "url": screen.web.url} for name, value in cookies.items()])
    page = context.new_page()
    page.route(
        "**/frame-test",
        lambda route: route.fulfill(
            body=f'<iframe id=viewer width=1200 height=800 src="{case.page}"></iframe>', content_type="text/html"
        ),
    )
    page.goto(f"{screen.web.url}/frame-test")
    frame = page.wait_for_selector("#viewer").content_frame()
    assert frame is not None
    wait_until(frame, VISIBLE)
