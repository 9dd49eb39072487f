"""The whole web application on a real port, with people of every role and real signing keys. For the pages' tests."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from io import BytesIO
from typing import Any

import httpx
import numpy as np
import pytest
import sqlalchemy as sa
import uvicorn
from fastapi import FastAPI
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage

from deploy.pki import Pki, ensure_pki, issue_reader
from reading_queue.app import create_app
from reading_queue.auth import hash_password
from storage.database import Database
from storage.objects import Objects
from storage.rows import Account, Case, Event, ReaderGrant, Report, TriageRun
from storage.settings import Settings
from storage.vocabulary import Role, RunMode, RunState, StudyState, TriageState
from tests.centre import Sites, add_case, add_study

PASSWORD = "correct horse"
PIN = "246810"

# username: role, site, sites whose imaging and ECG they may read
PEOPLE: dict[str, tuple[Role, str, tuple[str, ...]]] = {
    "reader-a": (Role.READER, "centre", ("county",)),
    "reader-a2": (Role.READER, "centre", ("county",)),
    "reader-b": (Role.READER, "centre", ("other_county",)),
    "quality": (Role.QUALITY, "centre", ()),
    "administrator": (Role.ADMINISTRATOR, "centre", ()),
    "radiographer-a": (Role.RADIOGRAPHER, "county", ()),
    "clinician-a": (Role.CLINICIAN, "county", ()),
    "clinician-b": (Role.CLINICIAN, "other_county", ()),
}
DISPLAY = {"reader-a": "阅片医师一", "reader-a2": "阅片医师二"}


@cache
def password_hash() -> str:
    return hash_password(PASSWORD)


@pytest.fixture(scope="session")
def signing_pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    """Readers' keys, made once: RSA takes its time."""
    pki = ensure_pki(tmp_path_factory.mktemp("signing"))
    for username, name in DISPLAY.items():
        issue_reader(pki, username, name, PIN)
    return pki


@dataclass
class Browser:
    """A signed-in person without a screen: cookies, CSRF token, and what a page's script would send."""

    client: httpx.Client
    csrf: str = ""

    def get(self, path: str, **headers: str) -> httpx.Response:
        return self.client.get(path, headers={"Accept": "text/html", **headers})

    def post(self, path: str, **fields: Any) -> httpx.Response:
        return self.client.post(path, data=fields, headers={"X-CSRF-Token": self.csrf, "Accept": "application/json"})

    def claim(self, case_id: int) -> str:
        answer = self.post(f"/cases/{case_id}/claim")
        assert answer.status_code == 200, answer.text
        return str(answer.json()["lease"])


@dataclass
class Web:
    """The running application and what is in it."""

    app: FastAPI
    url: str
    database: Database
    objects: Objects
    sites: Sites
    accounts: dict[str, int]
    _open: list[httpx.Client] = field(default_factory=list)

    def anonymous(self) -> httpx.Client:
        client = httpx.Client(base_url=self.url, timeout=30)
        self._open.append(client)
        return client

    def sign_in(self, username: str, language: str = "zh") -> Browser:
        client = self.anonymous()
        client.cookies.set("yuanzhen_language", language)
        answer = client.post("/sign-in", data={"username": username, "password": PASSWORD})
        assert answer.status_code == 303, answer.text
        facts = client.get("/session").json()
        return Browser(client, facts["csrf"])

    def case(self, uid: str = "1.2.3", *, site_id: int | None = None, **values: Any) -> int:
        """A complete study with its case, queued."""
        study_values = {key: values.pop(key) for key in ("patient_id", "patient_name", "modalities") if key in values}
        with self.database.centre() as session:
            study_id = add_study(session, site_id or self.sites.county, uid, state=StudyState.COMPLETE, **study_values)
            return add_case(session, study_id, **values)

    def report_text(self, browser: Browser, case_id: int, lease: str, revision: int = 0, **changes: str) -> int:
        """Save a whole draft; its revision."""
        fields = {"findings": "双肺纹理清晰。", "impression": "未见异常。", "conclusion": "negative", "language": "zh"}
        answer = browser.post(f"/cases/{case_id}/draft", lease=lease, revision=revision, **(fields | changes))
        assert answer.status_code == 200, answer.text
        return int(answer.json()["revision"])

    def signed(self, browser: Browser, case_id: int, **changes: str) -> int:
        """Claim, write, sign. The report's id."""
        lease = browser.claim(case_id)
        with self.database.centre() as session:
            revision = session.execute(
                sa.select(Report.revision).where(Report.case_id == case_id, Report.state == "draft")
            ).scalar_one_or_none()
        revision = self.report_text(browser, case_id, lease, revision or 0, **changes)
        images = browser.get(f"/cases/{case_id}/checks").json()["images"]
        answer = browser.post(f"/cases/{case_id}/sign", lease=lease, revision=revision, images=images, pin=PIN)
        assert answer.status_code == 200, answer.text
        return int(answer.json()["report_id"])

    def events(self, *names: str) -> list[Event]:
        with self.database.centre() as session:
            return list(session.scalars(sa.select(Event).where(Event.name.in_(names)).order_by(Event.id)))

    def row(self, case_id: int) -> Case:
        with self.database.centre() as session:
            return session.scalars(sa.select(Case).where(Case.id == case_id)).one()

    def report(self, report_id: int) -> Report:
        with self.database.centre() as session:
            return session.scalars(sa.select(Report).where(Report.id == report_id)).one()


def add_finding(
    web: Web, case_id: int, *, positive: bool = True, mode: RunMode = RunMode.ACTIVE, model: str = "ecg_rhythm",
    text_zh: str = "疑似房颤", text_en: str = "Atrial fibrillation", heat_map_key: str | None = None,
) -> int:  # fmt: skip
    """A finished run with one finding."""
    with web.database.centre() as session:
        case = session.scalars(sa.select(Case).where(Case.id == case_id)).one()
        case.triage = TriageState.DONE
        finding = {
            "code": "af", "text_zh": text_zh, "text_en": text_en, "probability": 0.97, "positive": positive,
            "minutes_earlier": 20 if positive else 0,
        }  # fmt: skip
        return session.execute(
            sa.insert(TriageRun)
            .values(
                site_id=case.site_id, study_id=case.study_id, case_id=case_id, study_version=1, model_name=model,
                model_version="1.0", model_sha256="0" * 64, mode=mode, state=RunState.DONE, findings=[finding],
                heat_map_key=heat_map_key,
            )
            .returning(TriageRun.id)
        ).scalar_one()  # fmt: skip


def heat_map_file() -> bytes:
    """A Secondary Capture as triage keeps it: warm in the lower right lung."""
    rows = np.arange(256)
    glow = np.exp(-(((rows[:, None] - 170) / 40) ** 2 + ((rows[None, :] - 90) / 45) ** 2))
    pixels = np.stack([255 * glow, 160 * glow * (1 - glow) * 2, 120 * (1 - glow)], axis=2).astype(np.uint8)
    data_set = Dataset()
    data_set.Rows, data_set.Columns, data_set.SamplesPerPixel = 256, 256, 3
    data_set.PlanarConfiguration, data_set.BitsAllocated = 0, 8
    data_set.BitsStored, data_set.HighBit, data_set.PixelRepresentation = 8, 7, 0
    data_set.PhotometricInterpretation = "RGB"
    data_set.SOPClassUID, data_set.SOPInstanceUID = SecondaryCaptureImageStorage, "1.2.3.4.5"
    data_set.PixelData = pixels.tobytes()
    data_set.file_meta = FileMetaDataset()
    data_set.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    out = BytesIO()
    data_set.save_as(out, enforce_file_format=True)
    return out.getvalue()


def add_people(database: Database, sites: Sites) -> dict[str, int]:
    accounts = {}
    with database.centre() as session:
        for username, (role, site, grants) in PEOPLE.items():
            accounts[username] = session.execute(
                sa.insert(Account)
                .values(
                    site_id=getattr(sites, site),
                    username=username,
                    display_name=DISPLAY.get(username, username),
                    role=role,
                    password_hash=password_hash(),
                    signing_identity=f"{username}.p12" if username in DISPLAY else None,
                )
                .returning(Account.id)
            ).scalar_one()
            for granted in grants:
                for specialty in ("imaging", "ecg"):
                    values = {
                        "account_id": accounts[username], "site_id": getattr(sites, granted), "specialty": specialty,
                    }  # fmt: skip
                    session.execute(sa.insert(ReaderGrant).values(values))
    return accounts


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """Run the application with its lifespan on a free port in a thread; its address."""
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, log_level="warning", lifespan="on", timeout_graceful_shutdown=1, ws="none"
    )
    server = uvicorn.Server(config)
    ready = threading.Event()
    startup: Callable[..., Any] = server.startup

    async def announced(*args: object, **keywords: object) -> None:
        await startup(*args, **keywords)
        ready.set()

    server.startup = announced  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        assert ready.wait(30)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)


@pytest.fixture
def web(database: Database, objects: Objects, sites: Sites, configuration: Settings, signing_pki: Pki) -> Iterator[Web]:
    """The application, its people, a reader's and others' browsers."""
    accounts = add_people(database, sites)
    app = create_app(configuration.model_copy(update={"pki_dir": signing_pki.directory, "lease_s": 60}))
    with serving(app) as url:
        running = Web(app, url, database, objects, sites, accounts)
        yield running
        for client in running._open:
            client.close()


def soon(minutes: float) -> datetime:
    return datetime.now(UTC) + timedelta(minutes=minutes)
