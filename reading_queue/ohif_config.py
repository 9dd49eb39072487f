"""OHIF as we serve it: one copy of its files for everybody under /viewer/, one configuration and page for each case.

OHIF's build (`@ohif/app`, `dist/`) expects to live at the root of its host. `rebase` moves it under BASE once, when
set-up unpacks it; the page of a case then needs two things of its own: the router's base name and the DICOMweb root,
both in `app-config.js`. So the big files are cached once, and no case's viewer can ask for another case.
Nothing here does I/O but `rebase` and `entry_points`.
"""

import json
import re
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from storage.errors import ConfigurationError

BASE = "/viewer/"
_MARKER = "rebased.json"
_OUR_STYLES = ("/assets/webfonts/400.css", "/static/viewer.css")  # Noto Sans SC, and its use here

# What a build of OHIF says about where it lives: in webpack's runtime (the application and each worker), in the style
# sheet's fonts, and in the one import that bypasses webpack.
_REWRITES = {
    ".js": (
        (b'__webpack_require__.p = "/"', b'__webpack_require__.p = "' + BASE.encode() + b'"'),
        (b"'/dicom-microscopy-viewer/", b"'" + BASE.encode() + b"dicom-microscopy-viewer/"),
    ),
    ".css": ((b"url(/", b"url(" + BASE.encode()),),
}
_NEEDED = b'__webpack_require__.p = "/"'
_SCRIPT = re.compile(r'<script defer(?:="defer")? src="/([\w.-]+\.js)">')
_STYLE = re.compile(r'<link href="/([\w.-]+\.css)" rel="stylesheet">')

# `new Function` is used by old codecs in the decoding workers only; they get WORKER_POLICY with their script.
PAGE_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self' 'wasm-unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",  # React and the style loader write style elements
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self' data: blob:",
        "worker-src 'self' blob:",
        "media-src 'self' blob:",
        "object-src 'self' blob:",  # the PDF viewport shows an <object>
        "frame-src 'self' blob:",
        "manifest-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'self'",
    )
)
WORKER_POLICY = "default-src 'none'; script-src 'self' 'unsafe-eval' 'wasm-unsafe-eval'; connect-src 'self' data: blob:"


@dataclass(frozen=True, slots=True)
class EntryPoints:
    """Names of the files the page loads, in order, below BASE."""

    scripts: tuple[str, ...]
    styles: tuple[str, ...]


def rebase(dist: Path) -> int:
    """Make an unpacked `dist/` live under BASE; to be called before its files are precompressed. Idempotent.

    Returns the number of files changed. Raises ConfigurationError if this is no OHIF build, or one built differently.
    """
    if (dist / _MARKER).exists():
        return 0
    changed = 0
    found_runtime = False
    for path in sorted(dist.rglob("*")):
        rewrites = _REWRITES.get(path.suffix, ())
        if not rewrites or not path.is_file():
            continue
        before = path.read_bytes()
        found_runtime |= path.name.startswith("app.bundle.") and _NEEDED in before
        after = before
        for old, new in rewrites:
            after = after.replace(old, new)
        if after != before:
            path.write_bytes(after)
            changed += 1
    if not found_runtime:
        raise ConfigurationError(f"{dist}: no OHIF build whose place can be changed (webpack's public path not found)")
    (dist / _MARKER).write_text(json.dumps({"base": BASE, "files": changed}))
    return changed


def entry_points(dist: Path) -> EntryPoints:
    """What index.html loads. Raises ConfigurationError if OHIF is not set up under `dist`."""
    index = dist / "index.html"
    if not index.is_file() or not (dist / _MARKER).is_file():
        raise ConfigurationError(f"The viewer is not set up in {dist}: run `make assets`")
    html = index.read_text("utf-8")
    scripts, styles = tuple(_SCRIPT.findall(html)), tuple(_STYLE.findall(html))
    if not scripts:
        raise ConfigurationError(f"{index} loads no script: not the index page of an OHIF build")
    return EntryPoints(scripts, styles)


def index_page(files: EntryPoints, *, config_url: str, title: str, language: str) -> str:
    """The page of one case's viewer. Without inline script, so that the policy needs no exception."""
    scripts = "".join(f'<script defer src="{BASE}{escape(name)}"></script>' for name in files.scripts)
    sheets = [BASE + name for name in files.styles] + list(_OUR_STYLES)
    styles = "".join(f'<link href="{escape(sheet)}" rel="stylesheet">' for sheet in sheets)
    return (
        f'<!doctype html><html lang="{escape(language)}"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title>"
        f'<link rel="icon" href="{BASE}assets/favicon.ico"><link rel="manifest" href="{BASE}manifest.json">'
        f'<script src="{escape(config_url)}"></script>{scripts}{styles}</head>'
        '<body><div id="react-portal"></div><div id="root"></div></body></html>'
    )


def configuration(*, router_base: str, dicomweb_root: str, name: str) -> dict[str, Any]:
    """`window.config` for one case (shared/ohif.md): one data source, which is that case's."""
    return {
        "name": "yuanzhen",
        "routerBasename": router_base,
        "extensions": [],
        "modes": [],
        "showStudyList": False,
        "customizationService": [{"ohif.tours": {"$set": []}}],  # or an eleven-step tour covers the view
        "investigationalUseDialog": {"option": "never"},
        "maxNumberOfWebWorkers": 2,
        "showWarningMessageForCrossOrigin": False,
        "showCPUFallbackMessage": False,
        "showLoadingIndicator": True,
        "showErrorDetails": "production",
        "strictZSpacingForVolumeViewport": True,
        "groupEnabledModesFirst": True,
        # HTTP/1.1 gives a browser six connections to a host, and the page around us needs some (shared/ohif.md).
        "maxNumRequests": {"interaction": 6, "thumbnail": 3, "prefetch": 4},
        "defaultDataSourceName": "case",
        "dataSources": [
            {
                "namespace": "@ohif/extension-default.dataSourcesModule.dicomweb",
                "sourceName": "case",
                "configuration": {
                    "friendlyName": name,
                    "name": "case",
                    "qidoRoot": dicomweb_root,
                    "wadoRoot": dicomweb_root,
                    "wadoUriRoot": dicomweb_root,
                    "qidoSupportsIncludeField": True,
                    "supportsReject": False,
                    "imageRendering": "wadors",
                    "thumbnailRendering": "wadors",
                    "enableStudyLazyLoad": True,
                    "supportsFuzzyMatching": False,
                    "supportsWildcard": True,
                    "staticWado": False,
                    "singlepart": "bulkdata,video",
                    "omitQuotationForMultipartRequest": True,
                    "dicomUploadEnabled": False,
                    "bulkDataURI": {"enabled": True},
                },
            }
        ],
    }


def config_script(config: dict[str, Any], *, language: str) -> str:
    """`app-config.js`: everything the index page of the build has inline, and the language, which OHIF looks for in
    its query string, then a cookie, then local storage."""
    code = {"zh": "zh", "en": "en-US"}[language]
    text = json.dumps(config, ensure_ascii=True)  # ASCII: safe in any script encoding
    return (
        f"window.PUBLIC_URL={json.dumps(BASE)};\n"
        "window.browserImportFunction=function(name){return import(name)};\n"
        f'document.cookie="i18next={code};path=/cases/;SameSite=Strict";\n'
        f'try{{localStorage.setItem("i18nextLng",{json.dumps(code)})}}catch(error){{/* storage is off: cookie */}}\n'
        f"window.config={text};\n"
    )
