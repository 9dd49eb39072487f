"""Set-up of the assets: pinned, kept, unpacked safely, clear when something is missing.

Leaves out the download itself: it needs the registry, and `make setup` has done it before any test runs.
"""

import base64
import gzip
import hashlib
import io
import tarfile
from pathlib import Path, PurePosixPath

import brotli
import pytest

from deploy import assets
from deploy.assets import Package, compress, fetch, unpack
from deploy.process import StackError


def make_tarball(path: Path, members: dict[str, bytes]) -> Package:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    return Package("thing", "1.0.0", digest, lambda member: f"thing/{member}")


def test_a_tarball_that_is_there_with_the_right_digest_is_not_fetched_again(tmp_path: Path) -> None:
    package = make_tarball(tmp_path / "thing-1.0.0.tgz", {"package/a.js": b"a"})
    said: list[str] = []
    assert fetch(package, tmp_path, said.append) == tmp_path / "thing-1.0.0.tgz"
    assert said == []


def test_without_npm_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    package = Package("thing", "1.0.0", "", lambda member: None)
    with pytest.raises(StackError, match="npm is missing"):
        fetch(package, tmp_path / "npm", lambda text: None)


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo 'npm error code ENOTFOUND' >&2; exit 1", "ENOTFOUND(.|\n)*npm ping"),
        ("echo other > $4/thing-1.0.0.tgz", "has SHA-512 .* not used"),
    ],
    ids=["the registry does not answer", "the tarball is another"],
)
def test_a_failed_fetch_says_why_and_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, expected: str
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (programs / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    with pytest.raises(StackError, match=expected):
        fetch(Package("thing", "1.0.0", "AAAA", lambda member: None), tmp_path / "npm", lambda text: None)
    assert list((tmp_path / "npm").iterdir()) == []


def test_a_member_that_would_leave_the_folder_is_not_written(tmp_path: Path) -> None:
    package = make_tarball(tmp_path / "thing-1.0.0.tgz", {"package/../../escaped": b"x", "package/in/side": b"y"})
    unpack(tmp_path / "thing-1.0.0.tgz", package.place, tmp_path / "out")
    assert [path for path in tmp_path.rglob("*") if path.name == "escaped"] == []
    assert (tmp_path / "out" / "thing" / "in" / "side").read_bytes() == b"y"


def test_compressed_twins_hold_the_same_bytes_and_small_or_binary_files_have_none(tmp_path: Path) -> None:
    text = b"function twice(x) { return x + x }\n" * 200
    (tmp_path / "big.js").write_bytes(text)
    (tmp_path / "small.js").write_bytes(b"1")
    (tmp_path / "font.woff2").write_bytes(text)
    compress(tmp_path)
    assert gzip.decompress((tmp_path / "big.js.gz").read_bytes()) == text
    assert brotli.decompress((tmp_path / "big.js.br").read_bytes()) == text
    assert {path.name for path in tmp_path.iterdir()} == {"big.js", "big.js.gz", "big.js.br", "small.js", "font.woff2"}


def test_every_package_has_an_exact_version_and_a_digest() -> None:
    for package in assets.PACKAGES:
        assert package.version.count(".") == 2
        assert len(base64.b64decode(package.sha512)) == 64


def test_the_viewer_comes_without_its_browser_segmentation() -> None:
    place = next(package.place for package in assets.PACKAGES if package.name == "@ohif/app")
    assert place(PurePosixPath("dist/index.html")) == "ohif/index.html"
    assert place(PurePosixPath("dist/ort/ort-wasm.wasm")) is None
    assert place(PurePosixPath("package.json")) is None


def test_set_up_brought_what_pages_and_reports_need() -> None:
    directory = assets.CACHE / "assets"
    if not (directory / "complete.txt").exists():
        pytest.skip("set-up has not run here: make setup")
    for name in (
        "ohif/index.html",
        "js/htmx.min.js",
        "js/echarts.min.js",
        "webfonts/400.css",
        "fonts/NotoSansCJKjp-Regular.otf",
    ):
        assert (directory / name).stat().st_size > 0, name
    assert (directory / "js" / "echarts.min.js.br").exists()
    assert any((assets.CACHE / "demo").glob("*.dcm"))
