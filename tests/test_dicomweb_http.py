"""DICOMweb of a case over HTTP: what OHIF asks for, who may ask, and every refusal."""

import email
import email.policy
import io
from collections.abc import Iterator

import httpx
import pydicom
import pytest

from reading_queue import viewer
from storage.database import Database
from storage.objects import Objects
from storage.settings import Settings
from tests.archive_material import data_set_bytes, real_file
from tests.centre import Sites
from tests.viewer_web import Opened, Web, routes_of, web_application

FRAMES = "multipart/related; type=application/octet-stream; transfer-syntax=*"
JSON = {"Accept": "application/dicom+json"}


@pytest.fixture
def web(database: Database, objects: Objects, sites: Sites, configuration: Settings) -> Iterator[Web]:
    with web_application(database, objects, sites, configuration) as opened:
        yield opened


@pytest.fixture
def ct(web: Web) -> Opened:
    return web.study([real_file("CT_small.dcm")])


@pytest.fixture
def reader(web: Web) -> Iterator[httpx.Client]:
    with web.client("reader-a") as client:
        yield client


def parts_of(answer: httpx.Response) -> list[tuple[str, bytes]]:
    """Parts of a multipart/related body, by the standard library's parser."""
    assert answer.status_code == 200, answer.text
    head = b"Content-Type: " + answer.headers["content-type"].encode() + b"\r\n\r\n"
    message = email.message_from_bytes(head + answer.content, policy=email.policy.compat32)
    return [(part["Content-Type"], part.get_payload(decode=True)) for part in message.get_payload()]


def test_the_requests_of_the_viewer_for_a_ct_are_answered(reader: httpx.Client, ct: Opened) -> None:
    q = "limit=101&offset=0&fuzzymatching=false&includefield=00081030,00080060,00080090,00100030"
    (study,) = reader.get(f"{ct.root}/studies?{q}&StudyInstanceUID={ct.study}", headers=JSON).json()
    assert study["0020000D"]["Value"] == [ct.study]
    assert study["00100020"]["Value"] == ["county-a:1CT1"]
    assert "00080090" in study  # in no row: from the sidecar
    include = "includefield=00080021,00080031,0008103E,00200011"
    (series,) = reader.get(f"{ct.root}/studies/{ct.study}/series?{include}", headers=JSON).json()
    assert series["0020000E"]["Value"] == [ct.series]
    (prior,) = reader.get(f"{ct.root}/studies?00100020=county-a:1CT1&{q}", headers=JSON).json()
    assert prior["0020000D"]["Value"] == [ct.study]
    answer = reader.get(f"{ct.root}/studies/{ct.study}/series/{ct.series}/metadata", headers=JSON)
    assert answer.headers["content-type"] == "application/dicom+json"
    assert answer.headers["cache-control"] == "no-store"
    (metadata,) = answer.json()
    assert metadata["00080018"]["Value"] == [ct.instance]
    answer = reader.get(f"{ct.instance_path}/frames/1", headers={"Accept": FRAMES})
    ((content_type, pixels),) = parts_of(answer)
    assert content_type == "application/octet-stream; transfer-syntax=1.2.840.10008.1.2.1"
    assert b"\r\nContent-Type: application/octet-stream" in answer.content
    assert pixels == pydicom.dcmread(real_file("CT_small.dcm")).PixelData


def test_metadata_of_study_series_and_instance_agree(reader: httpx.Client, ct: Opened) -> None:
    study = f"{ct.root}/studies/{ct.study}"
    paths = [f"{study}/metadata", f"{study}/series/{ct.series}/metadata", f"{ct.instance_path}/metadata"]
    answers = [reader.get(path, headers=JSON).json() for path in paths]
    assert answers[0] == answers[1] == answers[2]
    assert len(answers[0]) == 1


def test_decoded_frames_equal_the_pixels_that_pydicom_decodes(web: Web, reader: httpx.Client) -> None:
    path = real_file("emri_small_jpeg_2k_lossless.dcm")
    case = web.study([path])
    data_set = pydicom.dcmread(path)
    expected = data_set.pixel_array
    numbers = ",".join(str(n) for n in range(1, 11))
    parts = parts_of(reader.get(f"{case.instance_path}/frames/{numbers}", headers={"Accept": FRAMES}))
    assert {kind for kind, _ in parts} == {
        f"application/octet-stream; transfer-syntax={data_set.file_meta.TransferSyntaxUID}"
    }
    data_set.PixelData = pydicom.encaps.encapsulate([content for _, content in parts])
    assert (data_set.pixel_array == expected).all()


def test_a_single_frame_may_come_without_multipart(reader: httpx.Client, ct: Opened) -> None:
    answer = reader.get(f"{ct.instance_path}/frames/1", headers={"Accept": "application/octet-stream"})
    assert answer.headers["content-type"] == "application/octet-stream; transfer-syntax=1.2.840.10008.1.2.1"
    assert answer.content == pydicom.dcmread(real_file("CT_small.dcm")).PixelData


def test_the_ecg_s_waveform_comes_raw(web: Web, reader: httpx.Client) -> None:
    path = real_file("waveform_ecg.dcm")
    case = web.study([path], specialty="ecg")
    (metadata,) = reader.get(f"{case.instance_path}/metadata").json()
    uri = metadata["54000100"]["Value"][0]["54001010"]["BulkDataURI"]
    for accept in ("application/octet-stream", "*/*"):
        answer = reader.get(uri, headers={"Accept": accept})
        assert answer.headers["content-type"] == "application/octet-stream"
        assert answer.content == pydicom.dcmread(path).WaveformSequence[0].WaveformData


def test_retrieval_gives_back_the_data_set_bit_for_bit(web: Web, reader: httpx.Client) -> None:
    files = [real_file(f"dicomdirtests/98892003/MR2/{name}") for name in ("15970", "4950", "4981")]
    case = web.study(files)
    study = f"{case.root}/studies/{case.study}"
    accept = {"Accept": 'multipart/related; type="application/dicom"'}
    expected = {data_set_bytes(path) for path in files}
    parts = parts_of(reader.get(study, headers=accept))
    assert len(parts) == 3
    got = set()
    for content_type, content in parts:
        assert content_type == "application/dicom; transfer-syntax=1.2.840.10008.1.2.1"
        data_set = pydicom.dcmread(io.BytesIO(content))
        assert data_set.PatientID == pydicom.dcmread(files[0]).PatientID  # as the county sent it
        got.add(content[132 + 12 + data_set.file_meta.FileMetaInformationGroupLength :])
    assert got == expected
    one = reader.get(case.instance_path, headers={"Accept": "application/dicom"})
    assert one.content.endswith(data_set_bytes(files[0]))
    series = reader.get(f"{study}/series/{case.series}", headers=accept)
    assert 1 <= len(parts_of(series)) <= 3


def test_large_answers_are_streamed_and_whole(web: Web, reader: httpx.Client) -> None:
    path = real_file("RG1_UNCR.dcm")
    case = web.study([path])
    answer = reader.get(f"{case.instance_path}/frames/1,1,1", headers={"Accept": FRAMES})
    assert answer.headers.get("transfer-encoding") == "chunked"
    assert [content for _, content in parts_of(answer)] == [pydicom.dcmread(path).PixelData] * 3


@pytest.mark.parametrize(
    ("path", "accept", "status", "says"),
    [
        ("/frames/2", FRAMES, 404, "Frames 1 to 1"),
        ("/frames/0", FRAMES, 404, "Frames 1 to 1"),
        ("/frames/x", FRAMES, 400, "whole numbers"),
        ("/frames/1", "image/png", 406, 'multipart/related; type="application/octet-stream"'),
        ("/bulkdata/7FE00010", "*/*", 404, "No such bulk data"),
        ("/metadata", "application/dicom+xml", 406, "application/dicom+json"),
        ("", 'multipart/related; type="application/dicom"; transfer-syntax=1.2.840.10008.1.2.4.90', 406, "1.2.1"),
        ("9/metadata", "*/*", 404, "No such study, series or instance"),
        ("%00/metadata", "*/*", 404, "names nothing"),
        ("'--/metadata", "*/*", 404, "names nothing"),
    ],
)
def test_what_cannot_be_answered_is_a_problem_detail(
    path: str, accept: str, status: int, says: str, reader: httpx.Client, ct: Opened
) -> None:
    answer = reader.get(ct.instance_path + path, headers={"Accept": accept})
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert says in answer.json()["detail"]
    assert answer.json()["status"] == status


def test_ignored_parameters_are_named_in_a_warning(reader: httpx.Client, ct: Opened) -> None:
    answer = reader.get(f"{ct.root}/studies?StudyID=1&%22%0d%0aX-Bad:%201=2")
    assert len(answer.json()) == 1
    assert answer.headers["warning"].startswith('299 yuanzhen "')
    assert "StudyID, unknown" in answer.headers["warning"]
    assert "x-bad" not in answer.headers


def test_an_object_store_that_is_down_is_said_to_be_down(
    web: Web, reader: httpx.Client, ct: Opened, configuration: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    unreachable = Objects(configuration.model_copy(update={"s3_url": "http://127.0.0.1:9"}))
    monkeypatch.setattr(web.app.state.objects, "_client", unreachable._client)
    answer = reader.get(f"{ct.instance_path}/frames/1", headers={"Accept": FRAMES})
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) > 0


def addresses(case: Opened) -> dict[str, str]:
    """Every route that shows something of a case, by its template."""
    study = f"{case.root}/studies/{case.study}"
    series = f"{study}/series/{case.series}"
    ours = "/cases/{case_id}"
    root = ours + "/dicomweb"
    templates = {
        root + "/studies": f"{case.root}/studies",
        root + "/series": f"{case.root}/series",
        root + "/instances": f"{case.root}/instances",
        root + "/studies/{study}": study,
        root + "/studies/{study}/metadata": f"{study}/metadata",
        root + "/studies/{study}/series": f"{study}/series",
        root + "/studies/{study}/instances": f"{study}/instances",
        root + "/studies/{study}/series/{series}": series,
        root + "/studies/{study}/series/{series}/metadata": f"{series}/metadata",
        root + "/studies/{study}/series/{series}/instances": f"{series}/instances",
        root + "/studies/{study}/series/{series}/instances/{instance}": case.instance_path,
        root + "/studies/{study}/series/{series}/instances/{instance}/metadata": f"{case.instance_path}/metadata",
        root + "/studies/{study}/series/{series}/instances/{instance}/frames/{frame_list}": (
            f"{case.instance_path}/frames/1"
        ),
        root + "/studies/{study}/series/{series}/instances/{instance}/bulkdata/{path:path}": (
            f"{case.instance_path}/bulkdata/54000100/0/54001010"
        ),
        ours + "/viewer": f"/cases/{case.case_id}/viewer",
        ours + "/viewer/app-config.js": f"/cases/{case.case_id}/viewer/app-config.js",
        ours + "/viewer/{path:path}": case.page,
    }
    return templates


def test_every_route_of_the_viewer_is_tested_for_another_hospital() -> None:
    routes = {route.path for route in routes_of(viewer.router) if "{case_id}" in route.path}
    assert routes == set(addresses(Opened(1, "1", "1", "1")))


@pytest.mark.parametrize("template", sorted(addresses(Opened(1, "1", "1", "1"))))
def test_another_hospital_s_case_is_not_found(template: str, web: Web) -> None:
    case = web.study([real_file("waveform_ecg.dcm")], specialty="ecg")
    path = addresses(case)[template]
    for username in ("radiographer-b", "clinician-b", "reader-b"):
        with web.client(username) as client:
            answer = client.get(path)
            nowhere = client.get(path.replace(f"/cases/{case.case_id}/", "/cases/999999/"))
        assert answer.status_code == 404, (username, path)
        assert answer.text == nowhere.text or "/viewer" in path  # as if there were no such case
    refused = web.events("access.refused")
    assert {(event.subject, event.subject_id, event.site_id) for event in refused} == {
        ("reading_case", case.case_id, web.sites.county)
    }
    assert len({event.actor for event in refused}) == 3
    assert all(event.details["route"] == template for event in refused)


@pytest.mark.parametrize("username", ["reader-a", "quality", "radiographer-a", "clinician-a"])
def test_those_who_may_see_a_case_see_it(username: str, web: Web, ct: Opened) -> None:
    with web.client(username) as client:
        assert len(client.get(f"{ct.root}/studies").json()) == 1
        assert client.get(f"{ct.instance_path}/frames/1", headers={"Accept": FRAMES}).status_code == 200
    assert web.events("access.refused") == []


def test_a_reader_without_a_grant_for_the_specialty_sees_nothing(web: Web) -> None:
    case = web.study([real_file("CT_small.dcm")], specialty="pathology")
    with web.client("reader-a") as client:
        assert client.get(f"{case.root}/studies").status_code == 404


def test_an_administrator_and_a_stranger_see_nothing(web: Web, ct: Opened) -> None:
    with web.client("administrator") as client:
        assert client.get(f"{ct.root}/studies").status_code == 403
    with web.client(None) as client:
        assert client.get(f"{ct.root}/studies").status_code == 401


def test_a_case_s_root_answers_for_that_case_alone(web: Web, reader: httpx.Client, ct: Opened) -> None:
    """Two studies of one county and one patient, and the same study from another county."""
    mr = web.study([real_file("MR_small.dcm")])
    twin = web.study([real_file("CT_small.dcm")], site_id=web.sites.other_county)
    assert reader.get(f"{ct.root}/studies?StudyInstanceUID={mr.study}").json() == []
    assert reader.get(f"{ct.root}/studies/{mr.study}/metadata").status_code == 404
    assert reader.get(f"{mr.root}/studies?PatientID=county-a:1CT1").json() == []
    with web.client("reader-b") as other:
        (study,) = other.get(f"{twin.root}/studies").json()
    assert study["00100020"]["Value"] == ["county-b:1CT1"]
