"""The server process and what it serves besides pages: health, precompressed assets, limits, an ordered stop."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from storage.database import Database
from storage.settings import Settings
from tests.web import Web, signing_pki, web

__all__ = ["signing_pki", "web"]

ASSETS = Path(".cache/assets")


@pytest.fixture
def assets() -> Path:
    if not (ASSETS / "js" / "htmx.min.js").is_file():
        pytest.skip(f"No {ASSETS}: `make assets` brings them")
    return ASSETS


@pytest.fixture
def process(
    assets: Path, configuration: Settings, database: Database, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`python -m reading_queue.server` on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("YUANZHEN_WEB_PORT", str(port))
    with subprocess.Popen([sys.executable, "-m", "reading_queue.server"]) as running:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 60
        while True:
            assert running.poll() is None and time.monotonic() < deadline
            try:
                httpx.get(f"{url}/healthz").raise_for_status()
                break
            except httpx.TransportError:
                time.sleep(0.1)
        yield running, url
        if running.poll() is None:
            running.kill()


def test_the_process_serves_and_stops_in_order(process: tuple[subprocess.Popen[bytes], str]) -> None:
    running, url = process
    assert httpx.get(f"{url}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{url}/").status_code == 401
    running.send_signal(signal.SIGTERM)
    assert running.wait(30) in {0, -signal.SIGTERM}


def test_the_process_says_which_file_is_missing(configuration: Settings, tmp_path: Path) -> None:
    import os

    environment = {**os.environ, "YUANZHEN_ASSETS_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "reading_queue.server"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "htmx.min.js is missing: run `make setup`" in done.stdout


@pytest.mark.parametrize("coding", ["br", "gzip", "identity"])
def test_assets_come_as_set_up_compressed_them(web: Web, assets: Path, coding: str) -> None:
    with web.anonymous() as client:
        with client.stream("GET", "/assets/js/htmx.min.js", headers={"Accept-Encoding": coding}) as answer:
            raw = b"".join(answer.iter_raw())
        assert answer.headers.get("content-encoding", "identity") == coding
        assert answer.headers["content-type"].startswith("text/javascript")
        suffix = {"br": ".br", "gzip": ".gz", "identity": ""}[coding]
        assert raw == (assets / "js" / f"htmx.min.js{suffix}").read_bytes()


@pytest.mark.parametrize("path", ["/assets/../pyproject.toml", "/static/%2e%2e/app.py", "/assets/nothing.js"])
def test_files_outside_are_not_served(web: Web, path: str) -> None:
    with web.anonymous() as client:
        answer = client.get(path, headers={"Accept": "application/json"})
        assert answer.status_code == 404
        assert answer.json()["type"] == "not-found"


def test_a_body_above_the_limit_is_refused_announced_or_not(web: Web) -> None:
    with web.anonymous() as client:
        assert client.post("/sign-in", content=b"x" * 1_100_000).status_code == 413
        try:
            chunked = client.post("/sign-in", content=(b"x" * 65536 for _ in range(40)))
        except httpx.TransportError:
            return  # cut off while sending is an answer too
        assert chunked.status_code >= 400


def test_an_error_of_ours_is_a_page_in_words_with_the_headers(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = web.sign_in("reader-a")

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("reading_queue.worklist.rows_of", broken)
    page = reader.get("/worklist")
    assert page.status_code == 500 and "都安全" in page.text and "ZeroDivision" not in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
