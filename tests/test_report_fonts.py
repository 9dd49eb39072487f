"""The fonts of the report: made from exactly the files that are named by digest, or not at all."""

import io
import tarfile
from pathlib import Path

import pytest

from deploy.fonts import NPM_PACKAGES, build_fonts
from storage.errors import ConfigurationError


def test_a_missing_tarball_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="@fontsource/noto-sans-math"):
        build_fonts([], tmp_path / "fonts")


def test_a_font_that_is_not_the_one_named_is_refused(tmp_path: Path) -> None:
    tarball = tmp_path / "fontsource-noto-sans-math-5.3.0.tgz"
    with tarfile.open(tarball, "w:gz") as archive:
        member = tarfile.TarInfo("package/files/noto-sans-math-latin-400-normal.woff2")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"abc"))
    with pytest.raises(ConfigurationError, match="not the font file"):
        build_fonts([tarball], tmp_path / "fonts")


def test_every_package_names_its_version() -> None:
    assert all(package.rpartition("@")[2][0].isdigit() for package in NPM_PACKAGES)
