"""Daily heads: once a day is over, what was written in it is signed and put under object lock (design §9).

A head names each study that had an event that day with the number and hash of its newest one, and a digest of the
events outside studies. As each event's hash covers those before it, and each head names the digest of the head before
it, the newest head covers everything. Who rewrites history afterwards needs the receipt key, and even then the locked
object tells: object lock keeps every version of it, and `verify_heads` reads them all. What a head cannot show is a
change made before its day was over.

Days are UTC, by the centre's clock, as in `event.at`. Heads are deterministic: signed twice, they are the same bytes.
"""

import base64
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from itertools import groupby
from typing import Literal

import sqlalchemy as sa
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, ValidationError
from sqlalchemy.orm import Session

from storage.database import Database
from storage.errors import SignatureInvalidError
from storage.objects import LockedVersion, Objects
from storage.receipts import key_id
from storage.rows import Event, Study
from storage.transitions import recomputed_hash

PREFIX = "heads/"
KEY_FILE = "receipt.key"
"""In the centre's `pki_dir`: heads are signed with the key of receipts, whose public half the gateways hold."""
_LOCK = "daily heads"
_SIGN_AFTER = timedelta(minutes=5)
"""After midnight: a clock may be set back a little."""
_EXPECT_AFTER = timedelta(hours=1)
"""After midnight: until then nobody misses yesterday's head."""
_ONE_DAY = timedelta(days=1)
_FETCH = 1000

StudyHead = tuple[int, int, str]
"""Study id, number of its newest event, that event's hash in hex."""


class Head(BaseModel):
    """What one day came to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    day: date
    previous: str  # SHA-256 of the object of the day before, hex; "" in the first head
    studies: tuple[StudyHead, ...]  # studies with an event that day, by id
    outside_count: int  # events outside studies
    outside_sha256: str  # of their hashes, in the order of their ids
    key_id: str = ""
    signature: str = ""  # Ed25519 over the JSON without it, base64


@dataclass(frozen=True)
class Verdict:
    """What `verify_heads` found. Without faults all is as signed."""

    days: int
    studies: int
    events: int
    faults: tuple[str, ...]


def sign_missing_days(database: Database, objects: Objects, key: Ed25519PrivateKey) -> int:
    """Make the heads of all days that are over and have none, oldest first. Returns how many; 0 while another clock is
    at it. Raises ObjectStoreError; what was made by then stays made."""
    made = 0
    with database.centre() as session:
        if not session.scalar(sa.select(sa.func.pg_try_advisory_xact_lock(sa.func.hashtext(_LOCK)))):
            return 0
        newest = _newest(objects)
        if newest is None:
            day, previous = _first_day(session), ""
        else:
            day, previous = _day_of(newest.key) + _ONE_DAY, _sha256(_read(objects, newest))
        end = _first_open_day(session, _SIGN_AFTER)
        while day is not None and day < end:
            data = _encoded(_signed(_content_of(session, day, previous), key))
            objects.put_locked(f"{PREFIX}{day.isoformat()}.json", data)
            day, previous, made = day + _ONE_DAY, _sha256(data), made + 1
    return made


def verify_heads(database: Database, objects: Objects, public_key: Ed25519PublicKey) -> Verdict:
    """Compare every event with its neighbours, and every day with its head. Raises ObjectStoreError."""
    with database.centre() as session:
        session.execute(sa.text("SET LOCAL statement_timeout = 0"))  # it reads the whole table
        end = _first_open_day(session, _EXPECT_AFTER)
        trail = _read_trail(session)
        first = _first_day(session)
    heads, faults = _read_heads(objects, public_key)
    faults = [*trail.faults, *faults]
    expected = min((day for day in (first, *heads) if day is not None), default=end)
    while expected < end:
        head = heads.get(expected)
        if head is None:
            faults.append(f"{expected}: no signed head")
        else:
            faults += _compare(head, trail)
        expected += _ONE_DAY
    return Verdict(len(heads), trail.studies, trail.events, tuple(faults))


def _first_day(session: Session) -> date | None:
    first: datetime | None = session.scalar(sa.select(sa.func.min(Event.at)))
    return None if first is None else first.astimezone(UTC).date()


def _first_open_day(session: Session, after: timedelta) -> date:
    """The first day that may still get an event: that of `after` ago, or that of the oldest open transaction, which may
    have given its event a time already. Only our own role writes events, and of our own role we see all sessions."""
    settled: datetime = session.execute(
        sa.text(
            "SELECT least(clock_timestamp() - :after, (SELECT min(xact_start) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()))"
        ),
        {"after": after},
    ).scalar_one()
    return settled.astimezone(UTC).date()


def _between(day: date) -> sa.ColumnElement[bool]:
    start = datetime.combine(day, time.min, UTC)
    return sa.and_(Event.at >= start, Event.at < start + _ONE_DAY)


def _content_of(session: Session, day: date, previous: str) -> Head:
    last = (
        sa.select(Event.study_id, sa.func.max(Event.sequence).label("sequence"))
        .where(_between(day), Event.study_id.is_not(None))
        .group_by(Event.study_id)
        .subquery()
    )
    newest = (
        sa.select(Event.study_id, Event.sequence, Event.hash)
        .join(last, sa.and_(Event.study_id == last.c.study_id, Event.sequence == last.c.sequence))
        .order_by(Event.study_id)
    )
    outside = sa.select(Event.hash).where(_between(day), Event.study_id.is_(None)).order_by(Event.id)
    hashes = session.scalars(outside).all()
    return Head(
        day=day,
        previous=previous,
        studies=tuple((study_id, sequence, digest.hex()) for study_id, sequence, digest in session.execute(newest)),
        outside_count=len(hashes),
        outside_sha256=_sha256(b"".join(hashes)),
    )


def _canonical(head: Head, *, without_signature: bool = False) -> bytes:
    content = head.model_dump(mode="json", exclude={"signature"} if without_signature else None)
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _encoded(head: Head) -> bytes:
    return _canonical(head) + b"\n"


def _signed(head: Head, key: Ed25519PrivateKey) -> Head:
    named = head.model_copy(update={"key_id": key_id(key.public_key())})
    signature = base64.b64encode(key.sign(_canonical(named, without_signature=True))).decode()
    return named.model_copy(update={"signature": signature})


def _parsed(data: bytes, public_key: Ed25519PublicKey) -> Head:
    """Raises SignatureInvalidError where the key did not sign this."""
    try:
        head = Head.model_validate_json(data)
        public_key.verify(base64.b64decode(head.signature, validate=True), _canonical(head, without_signature=True))
    except (ValidationError, InvalidSignature, ValueError) as error:
        raise SignatureInvalidError("The signature does not verify") from error
    return head


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _day_of(key: str) -> date:
    return date.fromisoformat(key.removeprefix(PREFIX).removesuffix(".json"))


def _read(objects: Objects, version: LockedVersion) -> bytes:
    return objects.get(version.key, locked=True, version_id=version.version_id)


def _newest(objects: Objects) -> LockedVersion | None:
    """The newest day's head as it was first written. One that somebody hid counts: it is not made again."""
    written = [version for version in objects.locked_versions(PREFIX) if not version.is_delete_marker]
    newest = max((version.key for version in written), default=None)
    return next((version for version in reversed(written) if version.key == newest), None)


def _read_heads(objects: Objects, public_key: Ed25519PublicKey) -> tuple[dict[date, Head], list[str]]:
    """Every head whose signature verifies, as first written, and what is wrong with them."""
    heads: dict[date, Head] = {}
    digests: dict[date, str] = {}
    faults: list[str] = []
    for key, group in groupby(objects.locked_versions(PREFIX), key=lambda version: version.key):
        versions = list(group)
        if any(version.is_delete_marker for version in versions):
            faults.append(f"{key}: somebody tried to delete it")
        contents = [_read(objects, version) for version in versions if not version.is_delete_marker]
        if len(set(contents)) > 1:
            faults.append(f"{key}: somebody wrote something else in its place")
        if not contents:
            continue
        try:
            head = _parsed(contents[-1], public_key)
        except SignatureInvalidError as error:
            faults.append(f"{key}: {error.reason}")
            continue
        if key != f"{PREFIX}{head.day.isoformat()}.json":
            faults.append(f"{key}: it is the head of {head.day}")
            continue
        heads[head.day], digests[head.day] = head, _sha256(contents[-1])
    first = min(heads, default=None)
    for day, head in heads.items():
        expected = "" if day == first else digests.get(day - _ONE_DAY)
        if expected is not None and head.previous != expected:  # None: that the day before has no head is said already
            faults.append(f"{day}: its head does not follow that of the day before")
    return heads, faults


@dataclass
class _Trail:
    """What the events' rows come to."""

    studies: int = 0
    events: int = 0
    newest: defaultdict[date, dict[int, tuple[int, str]]] = field(default_factory=lambda: defaultdict(dict))
    outside: defaultdict[date, list[bytes]] = field(default_factory=lambda: defaultdict(list))
    faults: list[str] = field(default_factory=list)


def _read_trail(session: Session) -> _Trail:
    """Walk every event once, each study's in order."""
    trail = _Trail()
    # One statement, one snapshot: what is written meanwhile is not half seen.
    query = (
        sa.select(Study.id, Study.site_id, Study.event_count, Study.event_head, Event)
        .outerjoin(Event, Event.study_id == Study.id)
        .order_by(Study.id, Event.sequence)
        .execution_options(yield_per=_FETCH)
    )
    with session.execute(query) as found:
        for (study_id, site_id, count, head), rows in groupby(found, key=lambda row: row[:4]):
            trail.studies += 1
            _walk(trail, study_id, site_id, count, head, (row[4] for row in rows if row[4] is not None))
    outside = sa.select(Event).where(Event.study_id.is_(None)).order_by(Event.id).execution_options(yield_per=_FETCH)
    with session.scalars(outside) as events:
        for event in events:
            trail.events += 1
            trail.outside[event.at.astimezone(UTC).date()].append(event.hash)
            if recomputed_hash(b"", event) != event.hash:
                trail.faults.append(f"Event row {event.id}, outside studies, was altered")
    return trail


def _walk(trail: _Trail, study_id: int, site_id: int, count: int, head: bytes, events: Iterator[Event]) -> None:
    """Check one study's chain as `transitions.verify_chain` does, and note its newest event of each day."""
    previous, whole, seen = b"", True, 0
    for seen, event in enumerate(events, start=1):
        trail.events += 1
        fits = event.sequence == seen and event.site_id == site_id and recomputed_hash(previous, event) == event.hash
        if whole and not fits:
            trail.faults.append(f"Study {study_id}: event {seen} was altered or removed")
        whole, previous = whole and fits, event.hash
        trail.newest[event.at.astimezone(UTC).date()][study_id] = (event.sequence or 0, event.hash.hex())
    if whole and (seen, previous) != (count, head):
        trail.faults.append(f"Study {study_id}: its newest event was removed")


def _compare(head: Head, trail: _Trail) -> list[str]:
    signed = {study_id: (count, digest) for study_id, count, digest in head.studies}
    found = trail.newest[head.day]
    differing = sorted(one for one in signed.keys() | found.keys() if signed.get(one) != found.get(one))
    faults = [f"{head.day}: study {one} does not have the events that were signed" for one in differing]
    hashes = trail.outside[head.day]
    if (len(hashes), _sha256(b"".join(hashes))) != (head.outside_count, head.outside_sha256):
        faults.append(f"{head.day}: the events outside studies are not those that were signed")
    return faults
