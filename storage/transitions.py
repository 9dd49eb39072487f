"""Transitions in SQL, each with its event row in the same transaction; events of a study form a SHA-256 chain.

Lock order, everywhere: the study's row first, then the row that changes. Whoever holds the study's row is the only
one who can add to its chain, so `sequence` has no gaps and `hash` no forks.

A chain by itself shows a change that was not carried through to its end. Who can write every row can make a whole new
chain: that shows against the signed daily heads (`routing/heads.py`), from the end of the day on.
"""

import hashlib
import json
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from storage.errors import IllegalTransitionError, NotFoundError
from storage.rows import Event, Row, Study
from storage.states import Edge, Subject, Transition

SYSTEM = "system"
EVENTS_CHANNEL = "yuanzhen_event"
"""PostgreSQL NOTIFY channel; payload `<site_id> <event name> <subject id>`. For wake-ups only, never for truth."""


def account_actor(account_id: int) -> str:
    """How a person is named in events."""
    return f"account:{account_id}"


def gateway_actor(gateway_id: int) -> str:
    """How a gateway is named in events."""
    return f"gateway:{gateway_id}"


@dataclass(frozen=True, slots=True)
class _Head:
    site_id: int
    sequence: int
    hash: bytes
    now: datetime


def _table(subject: Subject) -> tuple[sa.Table, str]:
    name, _, column = subject.value.partition(".")
    return Row.metadata.tables[name], column or "state"


def _lock_study(session: Session, study_id: int) -> _Head:
    row = session.execute(
        sa.select(Study.site_id, Study.event_count, Study.event_head, sa.func.clock_timestamp())
        .where(Study.id == study_id)
        .with_for_update()
    ).one_or_none()
    if row is None:
        raise NotFoundError(f"No study {study_id}")
    return _Head(row[0], row[1], row[2], row[3])


def event_hash(previous: bytes, content: dict[str, Any]) -> bytes:
    """SHA-256 of the previous hash and the event's canonical JSON."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(previous + text.encode()).digest()


def event_content(
    *,
    site_id: int,
    study_id: int | None,
    sequence: int | None,
    name: str,
    subject: str,
    subject_id: int,
    from_state: str | None,
    to_state: str | None,
    actor: str,
    at: datetime,
    details: dict[str, Any],
) -> dict[str, Any]:
    """What of an event is hashed: everything but its row id."""
    return {
        "site_id": site_id,
        "study_id": study_id,
        "sequence": sequence,
        "name": name,
        "subject": subject,
        "subject_id": subject_id,
        "from": from_state,
        "to": to_state,
        "actor": actor,
        "at": at.isoformat(),
        "details": details,
    }


def recomputed_hash(previous: bytes, event: Event) -> bytes:
    """The hash that an event's row should have after an event with hash `previous`; b"" before the first of a study,
    and for one outside any study."""
    content = event_content(
        site_id=event.site_id,
        study_id=event.study_id,
        sequence=event.sequence,
        name=event.name,
        subject=event.subject,
        subject_id=event.subject_id,
        from_state=event.from_state,
        to_state=event.to_state,
        actor=event.actor,
        at=event.at,
        details=event.details,
    )
    return event_hash(previous, content)


def _append(
    session: Session,
    head: _Head,
    study_id: int,
    name: str,
    subject: str,
    subject_id: int,
    actor: str,
    details: dict[str, Any],
    from_state: StrEnum | str | None = None,
    to_state: StrEnum | str | None = None,
) -> datetime:
    sequence = head.sequence + 1
    content = event_content(
        site_id=head.site_id,
        study_id=study_id,
        sequence=sequence,
        name=name,
        subject=subject,
        subject_id=subject_id,
        from_state=None if from_state is None else str(from_state),
        to_state=None if to_state is None else str(to_state),
        actor=actor,
        at=head.now,
        details=details,
    )
    digest = event_hash(head.hash, content)
    session.execute(
        sa.insert(Event).values(
            site_id=head.site_id,
            study_id=study_id,
            sequence=sequence,
            name=name,
            subject=subject,
            subject_id=subject_id,
            from_state=content["from"],
            to_state=content["to"],
            actor=actor,
            at=head.now,
            details=details,
            hash=digest,
        )
    )
    session.execute(sa.update(Study).where(Study.id == study_id).values(event_count=sequence, event_head=digest))
    session.execute(sa.select(sa.func.pg_notify(EVENTS_CHANNEL, f"{head.site_id} {name} {subject_id}")))
    return head.now


def note(
    session: Session,
    study_id: int,
    name: str,
    *,
    subject: str,
    subject_id: int,
    actor: str,
    details: dict[str, Any] | None = None,
) -> datetime:
    """Add an event to a study's chain that changes no state (opened, variant stored, draft saved). Returns its time."""
    head = _lock_study(session, study_id)
    return _append(session, head, study_id, name, subject, subject_id, actor, details or {})


def note_outside_study(
    session: Session,
    site_id: int,
    name: str,
    *,
    subject: str,
    subject_id: int,
    actor: str,
    details: dict[str, Any] | None = None,
) -> None:
    """Add an event that belongs to no study (sign-in, enrolment). Not chained: nothing orders such events.

    The day's signed head covers them."""
    now = session.execute(sa.select(sa.func.clock_timestamp())).scalar_one()
    content = event_content(
        site_id=site_id,
        study_id=None,
        sequence=None,
        name=name,
        subject=subject,
        subject_id=subject_id,
        from_state=None,
        to_state=None,
        actor=actor,
        at=now,
        details=details or {},
    )
    session.execute(
        sa.insert(Event).values(
            site_id=site_id,
            name=name,
            subject=subject,
            subject_id=subject_id,
            actor=actor,
            at=now,
            details=details or {},
            hash=event_hash(b"", content),
        )
    )


def born(
    session: Session,
    transition: Transition,
    study_id: int,
    subject_id: int,
    *,
    actor: str,
    details: dict[str, Any] | None = None,
) -> datetime:
    """Write the event of a row just inserted in its first state. Returns the event's time."""
    edge = transition.value
    if edge.sources:
        raise IllegalTransitionError(f"{transition.event_name} is no birth: it starts from {sorted(edge.sources)}")
    head = _lock_study(session, study_id)
    table = edge.subject.value.partition(".")[0]
    return _append(
        session, head, study_id, transition.event_name, table, subject_id, actor, details or {}, None, edge.target
    )


def move(
    session: Session,
    transition: Transition,
    subject_id: int,
    *,
    actor: str,
    details: dict[str, Any] | None = None,
    values: dict[str, Any] | None = None,
    guard: sa.ColumnElement[bool] | None = None,
) -> datetime:
    """Move row `subject_id` along an edge; set `values` in the same UPDATE; write the event. Returns its time.

    `guard` is a further condition on the row (the lease is mine). Raises NotFoundError if the caller's scope has no
    such row, IllegalTransitionError if the row is in another state or the guard is false: nothing is written then.
    """
    edge: Edge = transition.value
    if not edge.sources:
        raise IllegalTransitionError(f"{transition.event_name} makes a row; use born()")
    table, column = _table(edge.subject)
    if table.name == Study.__tablename__:
        study_id: int | None = subject_id
    else:
        study_id = session.execute(sa.select(table.c.study_id).where(table.c.id == subject_id)).scalar_one_or_none()
    if study_id is None:
        raise NotFoundError(f"No {table.name} {subject_id}")
    head = _lock_study(session, study_id)
    before = session.execute(sa.select(table.c[column]).where(table.c.id == subject_id).with_for_update()).scalar_one()
    conditions = [table.c.id == subject_id, table.c[column].in_(list(edge.sources))]
    if guard is not None:
        conditions.append(guard)
    moved = session.execute(
        sa.update(table).where(*conditions).values({column: edge.target, **(values or {})}).returning(table.c.id)
    ).scalar_one_or_none()
    if moved is None:
        why = "another condition did not hold" if before in edge.sources else f"it is {before.value}"
        raise IllegalTransitionError(f"{transition.event_name}: {table.name} {subject_id} cannot take it, {why}")
    return _append(
        session,
        head,
        study_id,
        transition.event_name,
        table.name,
        subject_id,
        actor,
        details or {},
        before,
        edge.target,
    )


def verify_chain(session: Session, study_id: int) -> int:
    """Recompute a study's chain. Returns the number of events; raises IllegalTransitionError at the first that lies.

    Proves that the events fit each other and the study's row, not that nobody rewrote them all: see `routing/heads.py`.
    """
    previous = b""
    site_id, count, head = session.execute(
        sa.select(Study.site_id, Study.event_count, Study.event_head).where(Study.id == study_id)
    ).one()
    rows = session.execute(sa.select(Event).where(Event.study_id == study_id).order_by(Event.sequence)).scalars().all()
    for expected, row in enumerate(rows, start=1):
        whole = row.sequence == expected and row.site_id == site_id
        if not whole or recomputed_hash(previous, row) != row.hash:
            raise IllegalTransitionError(f"Event {expected} of study {study_id} was altered or removed")
        previous = row.hash
    if (len(rows), previous) != (count, head):
        raise IllegalTransitionError(f"The newest event of study {study_id} was removed")
    return len(rows)
