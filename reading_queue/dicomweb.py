"""DICOMweb of one case, read side: QIDO-RS and WADO-RS under /cases/{case_id}/dicomweb (PS3.18 chapters 8 and 10).

The core is storage/dicomweb/; here are addresses, headers and status codes. Every answer is `no-store`: a reading
room's computer is shared, and a viewer asks for each frame once. Every error is a problem detail (RFC 9457), for the
other side is a program. Transactions end before bytes are read from the object store.
"""

import gzip
import itertools
import json
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from fastapi.routing import APIRoute
from sqlalchemy.exc import OperationalError

from reading_queue.case_access import CaseAccess, case_access, database_of, library_of
from reading_queue.problems import RETRY_AFTER_S, SignInNeededError
from storage import archive
from storage.dicomweb import frames, media_types, metadata, multipart, queries
from storage.dicomweb.errors import BadRequestError, NotAcceptableError
from storage.dicomweb.library import Library, StoredInstance, find_instances
from storage.dicomweb.media_types import Representation
from storage.dicomweb.multipart import Part
from storage.dicomweb.queries import Level
from storage.errors import ForbiddenError, NotFoundError, RetryableError, YuanzhenError
from storage.wire import Problem

_STREAM_ABOVE_BYTES = 16 * 1024 * 1024
_GZIP_ABOVE_BYTES = 1400  # one Ethernet frame: below, nothing is won
_HEADERS = {
    "Cache-Control": "no-store",
    "Vary": "Accept, Cookie",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'self'; sandbox",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_STATUS: tuple[tuple[type[YuanzhenError], int, str, str], ...] = (
    (SignInNeededError, 401, "sign-in", "Sign in first"),
    (NotFoundError, 404, "not-found", "Not found"),
    (BadRequestError, 400, "bad-request", "Bad request"),
    (NotAcceptableError, 406, "not-acceptable", "Not acceptable"),
    (ForbiddenError, 403, "forbidden", "Forbidden"),
    (RetryableError, 503, "unavailable", "Not available now"),
    (YuanzhenError, 500, "failed", "The archive cannot give this"),
)


def _problem(status: int, kind: str, title: str, detail: str) -> Response:
    headers = _HEADERS | ({"Retry-After": str(RETRY_AFTER_S)} if status == 503 else {})
    content = Problem(type=kind, title=title, status=status, detail=detail).model_dump_json()
    return Response(content, status, headers, "application/problem+json")


class _ProblemRoute(APIRoute):
    """Answers errors as problem details, whatever the pages around it do."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        inner = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                return await inner(request)
            except YuanzhenError as error:
                _, status, kind, title = next(row for row in _STATUS if isinstance(error, row[0]))
                return _problem(status, kind, title, error.reason)
            except RequestValidationError:
                return _problem(404, "not-found", "Not found", "The address names nothing that can be here")
            except OperationalError:
                return _problem(503, "unavailable", "Not available now", "The database did not answer")

        return handler


router = APIRouter(prefix="/cases/{case_id}/dicomweb", route_class=_ProblemRoute, tags=["DICOMweb"])
Uid = Annotated[str, Path(pattern=r"^[0-9.]{1,64}$")]
_STUDY = "/studies/{study}"
_SERIES = _STUDY + "/series/{series}"
_INSTANCE = _SERIES + "/instances/{instance}"


def _json(request: Request, content: Any, warning: str = "") -> Response:
    """A dicom+json answer, compressed lightly for a browser: metadata of a CT shrinks thirty times in 5 ms."""
    representation = media_types.negotiate(request.headers.get("accept", ""), media_types.json_offers())
    headers = dict(_HEADERS)
    if warning:
        headers["Warning"] = f'299 yuanzhen "{warning}"'
    data = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    if len(data) > _GZIP_ABOVE_BYTES and "gzip" in request.headers.get("accept-encoding", ""):
        data = gzip.compress(data, 1)
        headers |= {"Content-Encoding": "gzip", "Vary": "Accept, Accept-Encoding, Cookie"}
    return Response(data, 200, headers, representation.media_type)


def _binary(representation: Representation, contents: Iterator[bytes], size: int) -> Response:
    """Parts of one media type, at once where they are small. The first is read before the status is sent."""
    contents = itertools.chain([next(contents)], contents)
    headers = dict(_HEADERS)
    if not representation.multipart:
        headers["Content-Type"] = representation.part_content_type
        return Response(next(contents), 200, headers)
    parts = (Part(representation.part_content_type, content) for content in contents)
    if size > _STREAM_ABOVE_BYTES:
        boundary = multipart.random_boundary()
        headers["Content-Type"] = multipart.content_type(representation.media_type, boundary)
        return StreamingResponse(multipart.stream(parts, boundary), 200, headers)
    whole = list(parts)
    boundary = multipart.boundary_outside(whole)
    headers["Content-Type"] = multipart.content_type(representation.media_type, boundary)
    return Response(multipart.body(whole, boundary), 200, headers)


def _accept(request: Request) -> str:
    return request.headers.get("accept", "")


def _find(request: Request, access: CaseAccess, *uids: str) -> list[StoredInstance]:
    with access.rows(database_of(request)) as session:
        return find_instances(session, access.scope, *uids)


def _query(request: Request, access: CaseAccess, level: Level, *uids: str) -> Response:
    """Search (PS3.18 10.6). Attributes that no row has come from the sidecar of the result's first instance."""
    query = queries.parse(level, request.query_params.multi_items())
    library = library_of(request)
    wants_more = queries.wants_more(level, query)
    first: dict[tuple[str, str | None, str | None], StoredInstance] = {}
    with access.rows(database_of(request)) as session:
        answers = queries.run(session, access.scope, level, query, *uids)
        if wants_more and answers:
            for study in {answer.study_instance_uid for answer in answers}:
                for stored in find_instances(session, access.scope, study):
                    uids_of = (stored.study_instance_uid, stored.series_instance_uid, stored.sop_instance_uid)
                    for key in ((uids_of[0], None, None), (uids_of[0], uids_of[1], None), uids_of):
                        first.setdefault(key, stored)
    results: list[dict[str, Any]] = []
    for answer in answers:
        content = answer.content
        representative = first.get((answer.study_instance_uid, answer.series_instance_uid, answer.sop_instance_uid))
        if representative is not None:
            shown = metadata.shown(library.sidecar(representative), representative, access.scope.root)
            content = dict(sorted((content | queries.missing(level, answer, query, shown)).items()))
        results.append(content)
    warning = ""
    if query.not_supported:
        warning = "These parameters are not supported and were ignored: " + ", ".join(query.not_supported)
    return _json(request, results, warning)


@router.get("/studies")
def search_studies(request: Request, access: CaseAccess = Depends(case_access)) -> Response:
    """Search for Studies; the case's study, if it matches."""
    return _query(request, access, Level.STUDY)


@router.get("/series")
def search_all_series(request: Request, access: CaseAccess = Depends(case_access)) -> Response:
    """Search for Series in every study of the root."""
    return _query(request, access, Level.SERIES)


@router.get("/instances")
def search_all_instances(request: Request, access: CaseAccess = Depends(case_access)) -> Response:
    """Search for Instances in every study of the root."""
    return _query(request, access, Level.INSTANCE)


@router.get(_STUDY + "/series")
def search_series(request: Request, study: Uid, access: CaseAccess = Depends(case_access)) -> Response:
    """Search for a study's Series."""
    return _query(request, access, Level.SERIES, study)


@router.get(_STUDY + "/instances")
def search_study_instances(request: Request, study: Uid, access: CaseAccess = Depends(case_access)) -> Response:
    """Search for a study's Instances."""
    return _query(request, access, Level.INSTANCE, study)


@router.get(_SERIES + "/instances")
def search_instances(request: Request, study: Uid, series: Uid, access: CaseAccess = Depends(case_access)) -> Response:
    """Search for a series' Instances."""
    return _query(request, access, Level.INSTANCE, study, series)


def _metadata(request: Request, access: CaseAccess, found: Sequence[StoredInstance]) -> Response:
    library = library_of(request)
    return _json(request, [metadata.shown(library.sidecar(one), one, access.scope.root) for one in found])


@router.get(_STUDY + "/metadata")
def study_metadata(request: Request, study: Uid, access: CaseAccess = Depends(case_access)) -> Response:
    """Metadata of every instance of a study."""
    return _metadata(request, access, _find(request, access, study))


@router.get(_SERIES + "/metadata")
def series_metadata(request: Request, study: Uid, series: Uid, access: CaseAccess = Depends(case_access)) -> Response:
    """Metadata of every instance of a series."""
    return _metadata(request, access, _find(request, access, study, series))


@router.get(_INSTANCE + "/metadata")
def instance_metadata(
    request: Request, study: Uid, series: Uid, instance: Uid, access: CaseAccess = Depends(case_access)
) -> Response:
    """Metadata of one instance."""
    return _metadata(request, access, _find(request, access, study, series, instance))


@router.get(_INSTANCE + "/frames/{frame_list}")
def retrieve_frames(
    request: Request,
    study: Uid,
    series: Uid,
    instance: Uid,
    frame_list: str,
    access: CaseAccess = Depends(case_access),
) -> Response:
    """Frames by number, from 1, as they lie in the archive."""
    (stored,) = _find(request, access, study, series, instance)
    library = library_of(request)
    sidecar = library.sidecar(stored)
    numbers = frames.frame_numbers(frame_list, len(sidecar.frames))
    offers = media_types.frame_offers(
        metadata.served_transfer_syntax(stored.transfer_syntax_uid),
        native=metadata.is_native(stored.transfer_syntax_uid),
        single=len(numbers) == 1,
    )
    representation = media_types.negotiate(_accept(request), offers)
    contents = frames.read_frames(library, stored, sidecar, numbers)
    return _binary(representation, contents, frames.size_of_frames(sidecar, numbers))


@router.get(_INSTANCE + "/bulkdata/{path:path}")
def retrieve_bulk_data(
    request: Request, study: Uid, series: Uid, instance: Uid, path: str, access: CaseAccess = Depends(case_access)
) -> Response:
    """A large value, by the address that the metadata gives for it."""
    (stored,) = _find(request, access, study, series, instance)
    library = library_of(request)
    sidecar = library.sidecar(stored)
    offers = media_types.bulk_offers(frames.bulk_media_type(sidecar, path))
    representation = media_types.negotiate(_accept(request), offers)
    content = frames.read_bulk(library, stored, sidecar, path)
    return _binary(representation, iter([content]), len(content))


def _file(library: Library, stored: StoredInstance) -> bytes:
    return archive.part10(
        library.whole(stored),
        sop_class_uid=stored.sop_class_uid,
        sop_instance_uid=stored.sop_instance_uid,
        transfer_syntax_uid=stored.transfer_syntax_uid,
    )


def _retrieve(request: Request, found: Sequence[StoredInstance], *, single: bool) -> Response:
    """Part 10 files with the data sets as received, checked against their digests.

    Each part names its own transfer syntax; a client that asks for one gets all or nothing.
    """
    offers = [
        media_types.negotiate(_accept(request), media_types.dicom_offers(stored.transfer_syntax_uid, single=single))
        for stored in found
    ]
    library = library_of(request)
    if not offers[0].multipart:
        return _binary(offers[0], iter([_file(library, found[0])]), found[0].length)
    contents = (_file(library, stored) for stored in found)
    first = next(contents)
    parts = (
        Part(offer.part_content_type, content)
        for offer, content in zip(offers, itertools.chain([first], contents), strict=True)
    )
    boundary = multipart.random_boundary()
    headers = _HEADERS | {"Content-Type": multipart.content_type(media_types.DICOM, boundary)}
    return StreamingResponse(multipart.stream(parts, boundary), 200, headers)


@router.get(_STUDY)
def retrieve_study(request: Request, study: Uid, access: CaseAccess = Depends(case_access)) -> Response:
    """Every instance of a study."""
    return _retrieve(request, _find(request, access, study), single=False)


@router.get(_SERIES)
def retrieve_series(request: Request, study: Uid, series: Uid, access: CaseAccess = Depends(case_access)) -> Response:
    """Every instance of a series."""
    return _retrieve(request, _find(request, access, study, series), single=False)


@router.get(_INSTANCE)
def retrieve_instance(
    request: Request, study: Uid, series: Uid, instance: Uid, access: CaseAccess = Depends(case_access)
) -> Response:
    """One instance."""
    return _retrieve(request, _find(request, access, study, series, instance), single=True)
