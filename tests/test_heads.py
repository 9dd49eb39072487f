"""Daily heads: made for every day that is over, once; what was changed afterwards is found and named.

Real PostgreSQL and S3 with object lock. Days are not waited for: the owner of the schema sets events back and makes
their chain anew, which is also what somebody who rewrites history would do. Left out: an open transaction from before
midnight, which would take one.
"""

import base64
import json
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy.orm import Session

from deploy.pki import Pki, ensure_pki
from deploy.postgres import Postgres
from routing import heads
from routing.clock import Clock
from routing.heads import sign_missing_days, verify_heads
from storage.broker import make_broker
from storage.database import Database
from storage.objects import Objects
from storage.receipts import load_public_key, load_signing_key
from storage.rows import Event, Study
from storage.settings import Settings
from storage.states import Transition
from storage.transitions import SYSTEM, move, note, note_outside_study, recomputed_hash, verify_chain
from tests.centre import Sites, add_study

ROOT = Path(__file__).parent.parent


def ago(days: int) -> date:
    return datetime.now(UTC).date() - timedelta(days=days)


def name_of(day: date) -> str:
    return f"heads/{day.isoformat()}.json"


@pytest.fixture
def owner(database: Database, configuration: Settings) -> Iterator[Callable[..., None]]:
    """Change rows as who owns the schema; each change is a statement or a function of the session."""
    engine = sa.create_engine(configuration.database_owner_url)

    def change(*changes: str | Callable[[Session], None]) -> None:
        with Session(engine) as session, session.begin():
            session.execute(sa.text("SELECT set_config('app.site', 'all', true)"))
            for one in changes:
                if isinstance(one, str):
                    assert session.execute(sa.text(one)).rowcount > 0  # type: ignore[attr-defined]
                else:
                    one(session)

    yield change
    engine.dispose()


@pytest.fixture
def pki(configuration: Settings) -> Pki:
    return ensure_pki(configuration.pki_dir)


@pytest.fixture
def key(pki: Pki) -> Ed25519PrivateKey:
    return load_signing_key(pki.receipt_key.read_bytes())


@pytest.fixture
def own_bucket(configuration: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings with a bucket for this test alone: what is under object lock cannot be cleared away."""
    name = f"heads-{secrets.token_hex(6)}"
    monkeypatch.setenv("YUANZHEN_S3_LOCK_BUCKET", name)
    return configuration.model_copy(update={"s3_lock_bucket": name})


@pytest.fixture
def store(own_bucket: Settings) -> Objects:
    made = Objects(own_bucket)
    made.ensure_buckets()
    return made


def rehash(session: Session, study_id: int) -> None:
    """Make a study's chain anew, so that it verifies whatever its rows say."""
    previous = b""
    for event in session.scalars(sa.select(Event).where(Event.study_id == study_id).order_by(Event.sequence)):
        event.hash = previous = recomputed_hash(previous, event)
    session.get_one(Study, study_id).event_head = previous


def set_back(days: dict[int, int]) -> Callable[[Session], None]:
    """Set events (by row id) so many days back, and make the hashes anew."""

    def change(session: Session) -> None:
        events = [session.get_one(Event, row_id) for row_id in days]
        for event in events:
            event.at -= timedelta(days=days[event.id])
        session.flush()
        for event in events:
            if event.study_id is None:
                event.hash = recomputed_hash(b"", event)
            else:
                rehash(session, event.study_id)

    return change


@pytest.fixture
def history(database: Database, sites: Sites, owner: Callable[..., None]) -> tuple[int, int]:
    """Two studies with events 4, 2 and 1 days ago and today, a sign-in 2 days ago; nothing 3 days ago."""
    with database.centre() as session:
        first, second = add_study(session, sites.county, "1.1"), add_study(session, sites.other_county, "1.2")
        move(session, Transition.STUDY_COMPLETED, first, actor=SYSTEM)
        note_outside_study(session, sites.centre, "account.in", subject="account", subject_id=1, actor="account:1")
        note(session, first, "study.looked_at", subject="study", subject_id=first, actor="account:1")
        note(session, second, "study.looked_at", subject="study", subject_id=second, actor="account:1")
    owner(set_back({1: 4, 2: 2, 3: 2, 4: 2, 5: 1}))
    return first, second


def verdict(database: Database, store: Objects, pki: Pki) -> heads.Verdict:
    return verify_heads(database, store, load_public_key(pki.receipt_public_key.read_bytes()))


def read(store: Objects, day: date) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(store.get(name_of(day), locked=True))
    return content


def test_every_day_that_is_over_gets_a_signed_head_and_today_none(
    database: Database, store: Objects, history: tuple[int, int], key: Ed25519PrivateKey, pki: Pki
) -> None:
    first, second = history
    assert sign_missing_days(database, store, key) == 4
    assert sign_missing_days(database, store, key) == 0
    assert [one.key for one in store.locked_versions("heads/")] == [name_of(ago(days)) for days in (4, 3, 2, 1)]
    written = {days: read(store, ago(days)) for days in (4, 3, 2, 1)}
    with database.centre() as session:
        hashes = {
            (one.study_id, one.sequence): one.hash.hex()
            for one in session.scalars(sa.select(Event).where(Event.study_id.is_not(None)))
        }
    assert {days: head["studies"] for days, head in written.items()} == {
        4: [[first, 1, hashes[first, 1]]],
        3: [],
        2: [[first, 2, hashes[first, 2]], [second, 1, hashes[second, 1]]],
        1: [[first, 3, hashes[first, 3]]],
    }
    assert [written[days]["outside_count"] for days in (4, 3, 2, 1)] == [0, 0, 1, 0]
    assert verdict(database, store, pki) == heads.Verdict(days=4, studies=2, events=6, faults=())


def test_a_head_can_be_checked_with_the_public_key_and_nothing_of_ours(
    database: Database, store: Objects, history: tuple[int, int], key: Ed25519PrivateKey, pki: Pki
) -> None:
    sign_missing_days(database, store, key)
    content = read(store, ago(1))
    signature = base64.b64decode(content.pop("signature"))
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    load_public_key(pki.receipt_public_key.read_bytes()).verify(signature, text.encode())  # raises if not


def test_a_head_is_under_object_lock(
    database: Database, store: Objects, own_bucket: Settings, history: tuple[int, int], key: Ed25519PrivateKey
) -> None:
    sign_missing_days(database, store, key)
    client = store._client
    retention = client.get_object_retention(own_bucket.s3_lock_bucket, name_of(ago(1)))
    assert retention.mode == own_bucket.object_lock_mode
    assert retention.retain_until_date > datetime.now(UTC) + timedelta(hours=23)


def test_days_that_were_missed_are_made_up_and_follow_the_older_ones(
    database: Database, store: Objects, history: tuple[int, int], key: Ed25519PrivateKey, pki: Pki,
    owner: Callable[..., None],
) -> None:  # fmt: skip
    everything = "UPDATE event SET at = at - interval '9 days'"
    rehash_all = (lambda session: rehash(session, history[0]), lambda session: rehash(session, history[1]))
    owner(everything, *rehash_all, set_back({4: 0}))
    assert sign_missing_days(database, store, key) == 13  # as far as yesterday, though nothing happened since
    assert verdict(database, store, pki).faults == ()


def test_two_clocks_at_once_make_one_head_a_day(
    database: Database, store: Objects, history: tuple[int, int], key: Ed25519PrivateKey
) -> None:
    made: list[int] = []
    threads = [threading.Thread(target=lambda: made.append(sign_missing_days(database, store, key))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(made) == 4
    assert len(list(store.locked_versions("heads/"))) == 4


def test_the_clock_makes_heads_by_itself(
    database: Database, own_bucket: Settings, store: Objects, history: tuple[int, int], pki: Pki
) -> None:
    broker = make_broker(own_bucket.broker_url)
    Clock(database, broker, own_bucket).tick()
    broker.client.connection_pool.disconnect()
    broker.close()
    assert verdict(database, store, pki).days == 4


REWRITTEN = [
    "UPDATE event SET actor = 'account:9' WHERE id = 1",
    "UPDATE event SET at = at + interval '1 second' WHERE id = 3",
    "UPDATE event SET site_id = (SELECT min(site_id) FROM site) WHERE study_id = 1",
    "DELETE FROM event WHERE id = 5",
]


@pytest.mark.parametrize("change", REWRITTEN)
def test_a_history_rewritten_with_a_chain_that_verifies_is_found_against_the_heads(
    database: Database, store: Objects, history: tuple[int, int], key: Ed25519PrivateKey, pki: Pki,
    owner: Callable[..., None], change: str,
) -> None:  # fmt: skip
    first, _ = history
    sign_missing_days(database, store, key)

    def close_ranks(session: Session) -> None:
        session.execute(
            sa.text(
                "UPDATE study SET event_count = (SELECT count(*) FROM event WHERE study_id = study.id),"
                " site_id = (SELECT max(site_id) FROM event WHERE study_id = study.id)"
            )
        )
        rehash(session, first)

    owner(change, close_ranks)
    with database.centre() as session:
        verify_chain(session, first)  # by itself it shows nothing
    assert any(f"study {first} does not have the events" in fault for fault in verdict(database, store, pki).faults)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ("UPDATE event SET actor = 'account:9' WHERE id = 6", "Study 2: event 2 was altered or removed"),
        ("DELETE FROM event WHERE id = 6", "Study 2: its newest event was removed"),
        ("UPDATE study SET site_id = (SELECT min(site_id) FROM site)", "Study 1: event 1 was altered or removed"),
        ("DELETE FROM event WHERE study_id = 2", "study 2 does not have the events that were signed"),
        ("UPDATE event SET actor = 'account:9' WHERE id = 4", "Event row 4, outside studies, was altered"),
        ("UPDATE event SET site_id = 1 + site_id WHERE id = 4", "Event row 4, outside studies, was altered"),
        ("DELETE FROM event WHERE id = 4", "the events outside studies are not those that were signed"),
    ],
)
def test_any_other_tampering_is_found_too(
    database: Database, store: Objects, history: tuple[int, int], key: Ed25519PrivateKey, pki: Pki,
    owner: Callable[..., None], change: str, fault: str,
) -> None:  # fmt: skip
    sign_missing_days(database, store, key)
    owner(change)
    assert any(fault in one for one in verdict(database, store, pki).faults)


def test_a_head_that_somebody_hid_is_named_and_not_made_again(
    database: Database, store: Objects, own_bucket: Settings, history: tuple[int, int], key: Ed25519PrivateKey,
    pki: Pki,
) -> None:  # fmt: skip
    sign_missing_days(database, store, key)
    client = store._client
    client.remove_object(own_bucket.s3_lock_bucket, name_of(ago(1)))  # only puts a delete marker before it
    assert sign_missing_days(database, store, key) == 0
    found = verdict(database, store, pki)
    assert (found.days, found.faults) == (4, (f"{name_of(ago(1))}: somebody tried to delete it",))


def test_a_head_written_again_even_with_the_key_is_named_and_the_first_one_counts(
    database: Database, store: Objects, history: tuple[int, int], key: Ed25519PrivateKey, pki: Pki
) -> None:
    sign_missing_days(database, store, key)
    forged = heads.Head.model_validate(read(store, ago(2))).model_copy(update={"studies": ()})
    store.put_locked(name_of(ago(2)), heads._encoded(heads._signed(forged, key)))
    assert verdict(database, store, pki).faults == (f"{name_of(ago(2))}: somebody wrote something else in its place",)


def test_a_head_of_another_key_and_a_day_without_a_head_are_named(
    database: Database, store: Objects, history: tuple[int, int], key: Ed25519PrivateKey, pki: Pki
) -> None:
    sign_missing_days(database, store, Ed25519PrivateKey.generate())
    faults = verdict(database, store, pki).faults
    assert faults[:4] == tuple(f"{name_of(ago(days))}: The signature does not verify" for days in (4, 3, 2, 1))
    assert faults[4:] == tuple(f"{ago(days)}: no signed head" for days in (4, 3, 2, 1))


def test_without_events_there_is_nothing_to_sign(
    database: Database, store: Objects, sites: Sites, key: Ed25519PrivateKey, pki: Pki
) -> None:
    assert sign_missing_days(database, store, key) == 0
    assert verdict(database, store, pki) == heads.Verdict(0, 0, 0, ())


def audit() -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deploy.cli", "audit", "verify"]
    return subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False)


def test_the_command_says_what_differs_by_words_and_exit_status(
    database: Database, store: Objects, history: tuple[int, int], key: Ed25519PrivateKey, migrated: Postgres,
    owner: Callable[..., None],
) -> None:  # fmt: skip
    sign_missing_days(database, store, key)
    good = audit()
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout == "6 events of 2 studies, 4 signed days: all as signed\n"
    owner("UPDATE event SET actor = 'account:9' WHERE id = 1")
    bad = audit()
    assert bad.returncode == 1
    assert "Study 1: event 1 was altered or removed" in bad.stdout
