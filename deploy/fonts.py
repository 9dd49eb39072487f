"""Brings the fonts of the report together, once, in `.cache/assets/fonts`: what typst sets and what is embedded.

Noto Sans CJK carries all of GBK, all of Unicode's CJK Extension A and 2,100 characters of Extension B, so that rare
names are printed and not boxed. What it lacks comes from Noto Sans (subscripts, accents), Noto Sans Math (≒) and Noto
Sans Symbols 2 (☑, ⚠). All are under the SIL Open Font License 1.1. Every source file is named by its digest.
"""

import hashlib
import io
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from fontTools import subset
from fontTools.ttLib import TTFont
from fontTools.varLib import instancer

from storage.errors import ConfigurationError

NPM_PACKAGES = ("@fontsource/noto-sans-math@5.3.0", "@fontsource/noto-sans-symbols-2@5.3.0")
"""Tarballs that `build_fonts` takes (`npm pack`); the other fonts are Python distributions of the `centre` extra."""

_REGULAR = 400
_BOLD = 700


@dataclass(frozen=True, slots=True)
class _Source:
    """One font file: who carries it, under which name, and its SHA-256."""

    package: str  # Python distribution, or npm package
    member: str
    sha256: str


@dataclass(frozen=True, slots=True)
class _Font:
    """One font to make; `weight` is the instance of a variable source, 0 for a source used as it is."""

    file_name: str
    source: _Source
    weight: int = 0


_NOTO_SANS = _Source(
    "fontpkg-noto-sans",
    "fontpkg_noto_sans/files/NotoSans[wdth,wght].ttf",
    "bfb7bb691513f12e734dc346c03a03f784912432d7e3fa8e56efcf906fe86b3d",
)
_CJK_FONTS = (
    _Font(
        "NotoSansCJKjp-Regular.otf",
        _Source(
            "noto-cjk-sans-jp-regular",
            "noto_cjk_sans_jp_regular/NotoSansCJKjp-Regular.otf",
            "68a3fc98800b2a27b371f2fb79991daf3633bd89309d4ffaa6946fd587f375b5",
        ),
    ),
    _Font(
        "NotoSansCJKjp-Bold.otf",
        _Source(
            "noto-cjk-sans-jp-bold",
            "noto_cjk_sans_jp_bold/NotoSansCJKjp-Bold.otf",
            "e53dcb0dcb2922e45d01aae1ebd2f382bb81d4229b18b6b883bd170678af1f76",
        ),
    ),
)
_FALLBACK_FONTS = (
    _Font("NotoSans-Regular.ttf", _NOTO_SANS, _REGULAR),
    _Font("NotoSans-Bold.ttf", _NOTO_SANS, _BOLD),
    _Font(
        "NotoSansMath-Regular.ttf",
        _Source(
            "@fontsource/noto-sans-math",
            "package/files/noto-sans-math-latin-400-normal.woff2",
            "c39a9444f95747345dcbde1032ec0ea2af1db63dccf53a31b38a957bdcf4a01f",
        ),
    ),
    _Font(
        "NotoSansSymbols2-Regular.ttf",
        _Source(
            "@fontsource/noto-sans-symbols-2",
            "package/files/noto-sans-symbols-2-symbols-400-normal.woff2",
            "9c07d511848c274b5430c75bf98d1f2582680ef5f967947bfbdd06b75ca177c2",
        ),
    ),
)


def _from_distribution(source: _Source) -> bytes:
    try:
        path = metadata.distribution(source.package).locate_file(source.member)
    except metadata.PackageNotFoundError as error:
        raise ConfigurationError(f"{source.package} is not installed; it comes with yuanzhen[centre]") from error
    return Path(str(path)).read_bytes()


def _from_tarballs(source: _Source, tarballs: Iterable[Path]) -> bytes:
    # npm names a scoped package's tarball scope-name-version.tgz
    stem = source.package.removeprefix("@").replace("/", "-")
    for path in tarballs:
        if path.name.startswith(stem):
            with tarfile.open(path) as archive:
                member = archive.extractfile(source.member)
                if member is not None:
                    return member.read()
    raise ConfigurationError(f"No tarball of {source.package} was given (npm pack)")


def _read(source: _Source, tarballs: Sequence[Path]) -> bytes:
    data = _from_tarballs(source, tarballs) if source.package.startswith("@") else _from_distribution(source)
    if hashlib.sha256(data).hexdigest() != source.sha256:
        raise ConfigurationError(f"{source.package}: {source.member} is not the font file that is expected")
    return data


def _fallback(data: bytes, weight: int, without: frozenset[int]) -> TTFont:
    """A static TrueType font of what the font in `data` has and `without` lacks."""
    font = TTFont(io.BytesIO(data))
    wanted = [code for code in font.getBestCmap() if code not in without]
    options = subset.Options(layout_features=["ccmp", "locl"], notdef_outline=True, name_IDs=["*"], flavor=None)
    cutter = subset.Subsetter(options)
    cutter.populate(unicodes=wanted)
    cutter.subset(font)
    if weight:
        font = instancer.instantiateVariableFont(font, {"wght": weight, "wdth": 100}, updateFontNames=True)
    font.flavor = None  # WOFF2 becomes plain TrueType
    return font


def _write(path: Path, data: bytes) -> None:
    """All or nothing, so that a broken set-up leaves no half font."""
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_bytes(data)
    partial.replace(path)


def build_fonts(tarballs: Sequence[Path], out_dir: Path) -> list[Path]:
    """Make the report fonts in `out_dir` and return their paths; what is there already stays (7 s, 35 MB).

    `tarballs` are the npm tarballs of `NPM_PACKAGES`. Raises ConfigurationError if a source is missing or is not the
    file expected.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    paths = [out_dir / font.file_name for font in (*_CJK_FONTS, *_FALLBACK_FONTS)]
    if all(path.exists() for path in paths):
        return paths
    for font in _CJK_FONTS:
        _write(out_dir / font.file_name, _read(font.source, tarballs))
    with TTFont(out_dir / _CJK_FONTS[0].file_name, lazy=True) as main:
        covered = frozenset(main.getBestCmap())
    for font in _FALLBACK_FONTS:
        made = io.BytesIO()
        _fallback(_read(font.source, tarballs), font.weight, covered).save(made)
        _write(out_dir / font.file_name, made.getvalue())
    _write(out_dir / "OFL.txt", _licence())
    return paths


def _licence() -> bytes:
    """The licence text that the fonts travel with."""
    for file in metadata.distribution(_NOTO_SANS.package).files or ():
        if file.name == "LICENSE":
            return file.read_binary()
    raise ConfigurationError(f"{_NOTO_SANS.package} carries no licence text")
