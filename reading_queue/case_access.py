"""Who may see a case's images: the one decision behind every route of the viewer and its DICOMweb root.

A reader needs a grant on the case's site and specialty, county staff see their own hospital's, the quality officer
all. Anybody else gets "not found", as if there were no such case, and an event on the hospital whose case it is.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated

import sqlalchemy as sa
from fastapi import Depends, Path, Request
from sqlalchemy.orm import Session

from reading_queue.auth import Person, require
from storage.database import Database
from storage.dicomweb.library import Library, Scope
from storage.errors import NotFoundError
from storage.rows import Case, ReaderGrant, Study
from storage.transitions import account_actor, note_outside_study
from storage.vocabulary import COUNTY_ROLES, Role

ACCESS_REFUSED = "access.refused"
CaseId = Annotated[int, Path(ge=1, lt=2**63)]  # what PostgreSQL's bigint holds


@dataclass(frozen=True, slots=True)
class CaseAccess:
    """A case that this person may see."""

    case_id: int
    site_id: int
    study_id: int
    study_instance_uid: str
    scope: Scope

    def rows(self, database: Database) -> AbstractContextManager[Session]:
        """A transaction that sees the rows of the case's site only, whoever is asking."""
        return database.county(self.site_id)


def database_of(request: Request) -> Database:
    """The process's database."""
    found: Database = request.app.state.database
    return found


def library_of(request: Request) -> Library:
    """The process's library; made when first asked for, and kept for its cache."""
    state = request.app.state
    if not hasattr(state, "library"):
        state.library = Library(state.objects)
    found: Library = state.library
    return found


def dicomweb_root(case_id: int) -> str:
    """Path of a case's DICOMweb root."""
    return f"/cases/{case_id}/dicomweb"


def case_access(
    case_id: CaseId,
    request: Request,
    person: Person = Depends(require(Role.READER, Role.QUALITY, Role.RADIOGRAPHER, Role.CLINICIAN)),
) -> CaseAccess:
    """FastAPI dependency. Raises NotFoundError for a case that is not this person's to see, and writes that down."""
    grant = (
        sa.exists()
        .where(
            ReaderGrant.account_id == person.account_id,
            ReaderGrant.site_id == Case.site_id,
            ReaderGrant.specialty == Case.specialty,
        )
        .label("granted")
    )
    with database_of(request).centre() as session:
        row = session.execute(
            sa.select(Case.site_id, Case.study_id, Study.study_instance_uid, grant)
            .join(Study, Study.id == Case.study_id)
            .where(Case.id == case_id)
        ).one_or_none()
        if row is not None:
            site_id, study_id, study_instance_uid, granted = row
            own = person.role in COUNTY_ROLES and person.site_id == site_id
            if own or (person.role is Role.READER and granted) or person.role is Role.QUALITY:
                scope = Scope((study_id,), dicomweb_root(case_id))
                return CaseAccess(case_id, site_id, study_id, study_instance_uid, scope)
            # Not in the study's chain: whoever knocks from outside must not make its row wait for a lock.
            note_outside_study(
                session,
                site_id,
                ACCESS_REFUSED,
                subject=Case.__tablename__,
                subject_id=case_id,
                actor=account_actor(person.account_id),
                details={"method": request.method, "route": request.scope["route"].path},
            )
    raise NotFoundError("No such case here")
