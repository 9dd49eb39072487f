"""Claims: a case in one reader's hands, as a lease that a heartbeat keeps alive (lifecycle g, h, i).

Two readers at once: the study's row is locked, so one gets the lease and the other hears who has it. A lease that ran
out ends by the clock (routing/clock.py), or here when somebody else claims first. `lease_token` names one claim: what
an older claim of the same case says changes nothing.
"""

import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta

import sqlalchemy as sa
from sqlalchemy.orm import Session

from reading_queue.auth import Person
from reading_queue.problems import ConflictError
from storage.database import Database
from storage.errors import IllegalTransitionError, LeaseLostError, NotFoundError
from storage.rows import Account, Case, ReaderGrant, Study
from storage.states import Transition
from storage.transitions import SYSTEM, account_actor, move
from storage.vocabulary import CaseState

_NEXT_CANDIDATES = 20
_FREED = {"claimed_by": None, "lease_token": None, "lease_expires_at": None}


@dataclass(frozen=True, slots=True)
class Claim:
    """A case that one reader holds."""

    case_id: int
    lease_token: str
    expires_at: datetime


def granted(person: Person) -> sa.ColumnElement[bool]:
    """Condition on Case: this reader may read it (design §10: readers go through a join with their grants)."""
    return sa.exists().where(
        ReaderGrant.account_id == person.account_id,
        ReaderGrant.site_id == Case.site_id,
        ReaderGrant.specialty == Case.specialty,
    )


def check_granted(session: Session, case_id: int, person: Person) -> None:
    """Raises NotFoundError for a case that this reader may not read, or that is none."""
    if session.scalar(sa.select(Case.id).where(Case.id == case_id, granted(person))) is None:
        raise NotFoundError("No such case here")


def held(case_id: int, person: Person, lease_token: str) -> sa.ColumnElement[bool]:
    """Condition on Case: this claim still holds it."""
    return sa.and_(
        Case.id == case_id,
        Case.state == CaseState.CLAIMED,
        Case.claimed_by == person.account_id,
        Case.lease_token == lease_token,
    )


def lock_study_of(session: Session, case_id: int) -> int:
    """Lock the study's row before the case's (the lock order of storage/transitions.py). Returns the study's id."""
    study_id = session.execute(sa.select(Case.study_id).where(Case.id == case_id)).scalar_one_or_none()
    if study_id is None:
        raise NotFoundError("No such case here")
    session.execute(sa.select(Study.id).where(Study.id == study_id).with_for_update())
    return study_id


def claim(database: Database, case_id: int, person: Person, *, lease_s: int) -> Claim:
    """Take the case. Who holds it already gets the same lease, renewed.

    Raises NotFoundError without a grant, ConflictError naming the holder, IllegalTransitionError if it is not to be
    read now (reported, suspended).
    """
    with database.centre() as session:
        lock_study_of(session, case_id)
        row = session.execute(
            sa.select(
                Case.state, Case.claimed_by, Case.lease_token, Case.lease_expires_at, Account.display_name,
                sa.func.clock_timestamp(),
            )
            .outerjoin(Account, Account.id == Case.claimed_by)
            .where(Case.id == case_id, granted(person))
        ).one_or_none()  # fmt: skip
        if row is None:
            raise NotFoundError("No such case here")
        state, holder, token, expires_at, holder_name, now = row
        until = now + timedelta(seconds=lease_s)
        if state is CaseState.CLAIMED and holder == person.account_id:
            session.execute(sa.update(Case).where(Case.id == case_id).values(lease_expires_at=until))
            return Claim(case_id, token, until)
        if state is CaseState.CLAIMED and expires_at >= now:
            raise ConflictError(holder_name, "taken", holder=holder_name)
        if state is CaseState.CLAIMED:
            move(session, Transition.CASE_LEASE_EXPIRED, case_id, actor=SYSTEM, values=_FREED)
        elif state is not CaseState.QUEUED:
            raise IllegalTransitionError(f"The case is {state.value}")
        fresh = secrets.token_urlsafe(18)
        values = {"claimed_by": person.account_id, "lease_token": fresh, "lease_expires_at": until}
        move(session, Transition.CASE_CLAIMED, case_id, actor=account_actor(person.account_id), values=values)
        return Claim(case_id, fresh, until)


def heartbeat(
    database: Database, case_id: int, person: Person, lease_token: str, *, lease_s: int
) -> tuple[datetime, bool]:
    """Keep the lease. Returns its new end, and whether images came since the claim.

    Raises LeaseLostError if the case is not this claim's any more.
    """
    with database.centre() as session:
        row = session.execute(
            sa.update(Case)
            .where(held(case_id, person, lease_token))
            .values(lease_expires_at=sa.func.clock_timestamp() + timedelta(seconds=lease_s))
            .returning(Case.lease_expires_at, Case.new_images)
        ).one_or_none()
    if row is None or row[0] is None:
        raise LeaseLostError("The case is not in your hands any more")
    return row[0], row[1]


def hand_back(database: Database, case_id: int, person: Person, lease_token: str) -> None:
    """Give the case back to the queue. Raises LeaseLostError if it is not this claim's any more."""
    with database.centre() as session:
        try:
            move(
                session,
                Transition.CASE_HANDED_BACK,
                case_id,
                actor=account_actor(person.account_id),
                values=_FREED,
                guard=held(case_id, person, lease_token),
            )
        except IllegalTransitionError as error:
            raise LeaseLostError("The case is not in your hands any more") from error


def next_case(database: Database, person: Person, *, lease_s: int, specialty: str = "") -> Claim | None:
    """Claim the case that comes first for this reader and is nobody's; None when there is none."""
    query = (
        sa.select(Case.id)
        .where(Case.state == CaseState.QUEUED, granted(person), *([Case.specialty == specialty] if specialty else []))
        .order_by(Case.tier, Case.due_at, Case.id)
        .limit(_NEXT_CANDIDATES)
    )
    while True:
        with database.centre() as session:
            candidates = session.scalars(query).all()
        if not candidates:
            return None
        for case_id in candidates:
            try:
                return claim(database, case_id, person, lease_s=lease_s)
            except (ConflictError, IllegalTransitionError):
                continue  # somebody was quicker: the one after it
