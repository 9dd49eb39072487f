"""The viewer: OHIF's files for everybody under /viewer/, and for each case its page and configuration.

    GET /cases/{case_id}/viewer                    sends the browser on to the study's page
    GET /cases/{case_id}/viewer/app-config.js      this case's configuration: its router base and DICOMweb root
    GET /cases/{case_id}/viewer/{anything else}    the page (OHIF routes by path in the browser)
    GET /viewer/{file}                             OHIF's build, the same for all cases, cached by the browser

Pages may be put in a frame of this origin and of no other.
"""

import mimetypes
import re
from functools import cache
from pathlib import Path
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import FileResponse, RedirectResponse

from reading_queue import dicomweb, ohif_config
from reading_queue.auth import anyone
from reading_queue.case_access import CaseAccess, case_access, dicomweb_root
from reading_queue.i18n import language_of, t
from storage.errors import NotFoundError

router = APIRouter(tags=["viewer"])
router.include_router(dicomweb.router)

_FRAMING = {
    "X-Frame-Options": "SAMEORIGIN",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
_HASHED = re.compile(r"(?:^|\.)[0-9a-f]{16}\.\w+$")  # app.bundle.0f6159c501addfe9.js, 0ddf166f7a343eda.wasm
_NAME = re.compile(r"[\w./-]{1,200}", re.ASCII)
_FOREVER = "public, max-age=31536000, immutable"
_REVALIDATED = "public, no-cache"  # asks each time; the ETag answers
_ENCODINGS = (("br", ".br"), ("gzip", ".gz"))
_TYPES = {".js": "text/javascript", ".wasm": "application/wasm", ".woff2": "font/woff2", ".json": "application/json"}


def _dist(request: Request) -> Path:
    assets: Path = request.app.state.settings.assets_dir
    return assets / "ohif"


@cache
def _entry_points(dist: Path) -> ohif_config.EntryPoints:
    return ohif_config.entry_points(dist)


@router.get("/viewer/{name:path}", dependencies=[Depends(anyone)])
def ohif_file(name: str, request: Request) -> Response:
    """One file of OHIF's build. Holds no patient data, so it needs no sign-in, and caches may share it."""
    dist = _dist(request).resolve()
    path = (dist / (name if _NAME.fullmatch(name) else "")).resolve()
    if not path.is_relative_to(dist) or not path.is_file() or path.suffix in {".br", ".gz", ".html"}:
        raise NotFoundError("No such file of the viewer")
    media_type = _TYPES.get(path.suffix) or mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    headers = {
        "Cache-Control": _FOREVER if _HASHED.search(path.name) else _REVALIDATED,
        "Vary": "Accept-Encoding",
        "X-Content-Type-Options": "nosniff",
        "Cross-Origin-Resource-Policy": "same-origin",
    }
    if path.suffix == ".js":
        headers["Content-Security-Policy"] = ohif_config.WORKER_POLICY  # obeyed where the script starts a worker
    accepted = {coding.partition(";")[0].strip() for coding in request.headers.get("accept-encoding", "").split(",")}
    for coding, suffix in _ENCODINGS:
        packed = path.with_name(path.name + suffix)
        if coding in accepted and packed.is_file():
            path = packed
            headers["Content-Encoding"] = coding
            break
    response = FileResponse(path, headers=headers, media_type=media_type, stat_result=path.stat())
    if request.headers.get("if-none-match") == response.headers.get("etag"):
        return Response(status_code=304, headers=headers | {"ETag": response.headers["etag"]})
    return response


@router.get("/cases/{case_id}/viewer")
def viewer_of_case(access: CaseAccess = Depends(case_access)) -> Response:
    """To the page that shows the case's study."""
    return RedirectResponse(viewer_path(access.case_id, access.study_instance_uid), 303)


def viewer_path(case_id: int, study_instance_uid: str) -> str:
    """Address of the page that shows a case's study; for links and frames."""
    return f"/cases/{case_id}/viewer/viewer?{urlencode({'StudyInstanceUIDs': study_instance_uid})}"


@router.get("/cases/{case_id}/viewer/app-config.js")
def app_config(request: Request, access: CaseAccess = Depends(case_access)) -> Response:
    """OHIF's configuration for this case, in the person's language."""
    language = language_of(request)
    config = ohif_config.configuration(
        router_base=f"/cases/{access.case_id}/viewer",
        dicomweb_root=dicomweb_root(access.case_id),
        name=t("viewer.source", language),
    )
    script = ohif_config.config_script(config, language=language)
    headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
    return Response(script, headers=headers, media_type="text/javascript")


@router.get("/cases/{case_id}/viewer/{path:path}")
def viewer_page(path: str, request: Request, access: CaseAccess = Depends(case_access)) -> Response:
    """The page: any address without a file name's extension, for OHIF routes in the browser."""
    if "." in path.rpartition("/")[2]:
        raise NotFoundError("No such file of the viewer")
    language = language_of(request)
    page = ohif_config.index_page(
        _entry_points(_dist(request)),
        config_url=f"/cases/{access.case_id}/viewer/app-config.js",
        title=t("viewer.title", language),
        language={"zh": "zh-CN", "en": "en"}[language],
    )
    headers = _FRAMING | {"Cache-Control": "no-store", "Content-Security-Policy": ohif_config.PAGE_POLICY}
    return Response(page, headers=headers, media_type="text/html")
