"""The web application with archived studies, on a real port: for the viewer's tests over HTTP and in a browser."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pydicom
import sqlalchemy as sa
import uvicorn
from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from pydicom.uid import EncapsulatedPDFStorage

from reading_queue import auth
from reading_queue.app import create_app
from storage.database import Database
from storage.objects import Objects
from storage.rows import Account, Event, ReaderGrant
from storage.settings import Settings
from storage.vocabulary import Role
from tests.archive_material import archive_files, real_file, saved
from tests.centre import Sites, add_case


@dataclass
class Opened:
    """A study with a case, and what it was made of."""

    case_id: int
    study: str
    series: str
    instance: str

    @property
    def root(self) -> str:
        return f"/cases/{self.case_id}/dicomweb"

    @property
    def page(self) -> str:
        return f"/cases/{self.case_id}/viewer/viewer?StudyInstanceUIDs={self.study}"

    @property
    def instance_path(self) -> str:
        return f"{self.root}/studies/{self.study}/series/{self.series}/instances/{self.instance}"


@dataclass
class Web:
    """A running server, the people who may sign in, and a way to put studies into it."""

    url: str
    database: Database
    objects: Objects
    sites: Sites
    app: FastAPI

    def client(self, username: str | None) -> httpx.Client:
        """A signed-in browser without a screen; None: nobody is signed in."""
        return httpx.Client(base_url=self.url, cookies=self.cookies(username), timeout=60)

    def cookies(self, username: str | None) -> dict[str, str]:
        if username is None:
            return {}
        token = auth.sign_in(self.database, username, PASSWORD, life_s=3600)
        assert token is not None
        return {auth.SESSION_COOKIE: token}

    def study(self, files: list[Path], site_id: int | None = None, specialty: str = "imaging") -> Opened:
        with self.database.centre() as session:
            study_id = archive_files(session, self.objects, site_id or self.sites.county, files)
            case_id = add_case(session, study_id, specialty=specialty)
        first = pydicom.dcmread(files[0], stop_before_pixels=True)
        return Opened(case_id, str(first.StudyInstanceUID), str(first.SeriesInstanceUID), str(first.SOPInstanceUID))

    def events(self, name: str) -> list[Event]:
        with self.database.centre() as session:
            return list(session.scalars(sa.select(Event).where(Event.name == name).order_by(Event.id)))


PASSWORD = "correct horse battery staple"
_PASSWORD_HASH = auth.hash_password(PASSWORD)
PEOPLE = {
    # username: (role, site, sites whose imaging and ECG they may read)
    "reader-a": (Role.READER, "centre", ("county",)),
    "reader-b": (Role.READER, "centre", ("other_county",)),
    "quality": (Role.QUALITY, "centre", ()),
    "administrator": (Role.ADMINISTRATOR, "centre", ()),
    "radiographer-a": (Role.RADIOGRAPHER, "county", ()),
    "clinician-a": (Role.CLINICIAN, "county", ()),
    "radiographer-b": (Role.RADIOGRAPHER, "other_county", ()),
    "clinician-b": (Role.CLINICIAN, "other_county", ()),
}


def add_people(database: Database, sites: Sites) -> None:
    with database.centre() as session:
        for username, (role, site, grants) in PEOPLE.items():
            account_id = session.execute(
                sa.insert(Account)
                .values(
                    site_id=getattr(sites, site),
                    username=username,
                    display_name=username,
                    role=role,
                    password_hash=_PASSWORD_HASH,
                )
                .returning(Account.id)
            ).scalar_one()
            for granted in grants:
                for specialty in ("imaging", "ecg"):
                    session.execute(
                        sa.insert(ReaderGrant).values(
                            account_id=account_id, site_id=getattr(sites, granted), specialty=specialty
                        )
                    )


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """Run the application on a free port in a thread; its address."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    ready = threading.Event()
    startup = server.startup

    async def announced(*args: object, **keywords: object) -> None:
        await startup(*args, **keywords)  # type: ignore[arg-type]
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


@contextmanager
def web_application(database: Database, objects: Objects, sites: Sites, configuration: Settings) -> Iterator[Web]:
    """The real application on these settings, with the people."""
    add_people(database, sites)
    app = create_app(configuration)
    with serving(app) as url:
        yield Web(url, database, objects, sites, app)


def routes_of(router: APIRouter) -> list[APIRoute]:
    """Every route of a router and those included in it."""
    found: list[APIRoute] = []
    for route in router.routes:
        if isinstance(route, APIRoute):
            found.append(route)
        elif isinstance(inner := getattr(route, "original_router", None), APIRouter):
            found.extend(routes_of(inner))
    return found


def encapsulated_pdf(path: Path) -> Path:
    """An Encapsulated PDF (PS3.3 A.45.1) with one line of text, as a file."""
    stream = b"BT /F1 36 Tf 72 700 Td (Encapsulated PDF) Tj ET"
    bodies = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 595 842]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>",
        b"<</Length %d>>stream\n%s\nendstream" % (len(stream), stream),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    out = b"%PDF-1.7\n"
    places = []
    for number, body in enumerate(bodies, 1):
        places.append(len(out))
        out += b"%d 0 obj%s endobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    out += b"xref\n0 6\n0000000000 65535 f \n%strailer<</Size 6/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF" % (
        table,
        len(out),
    )
    out += b"\n" + b"%" * 1024  # above what metadata carries inline
    data_set = pydicom.dcmread(real_file("reportsi.dcm"))
    data_set.SOPClassUID = data_set.file_meta.MediaStorageSOPClassUID = EncapsulatedPDFStorage
    data_set.Modality = "DOC"
    del data_set.ContentSequence
    data_set.MIMETypeOfEncapsulatedDocument = "application/pdf"
    data_set.EncapsulatedDocumentLength = len(out)
    data_set.EncapsulatedDocument = out + b"\0" * (len(out) % 2)
    return saved(data_set, path)
