"""The ingest server killed, doubled and without its servers: every instance is archived once, and nothing is lost.

SIGKILL goes to a real server process. It does not test fsync (the page cache survives it): that is the object store's
and PostgreSQL's own duty, set by deploy/.
"""

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa

from deploy.postgres import Postgres
from deploy.process import free_ports
from deploy.valkey import Valkey
from storage import archive, wire
from storage.database import Database
from storage.objects import Objects
from storage.rows import Event, Gateway, Instance, Pack, Study, Upload
from storage.transitions import verify_chain
from storage.vocabulary import StudyState, UploadState
from tests.centre import Sites
from tests.ingest_peer import (
    Image,
    Ingest,
    Packed,
    Peer,
    enrol,
    facts_of,
    image,
    ingest,
    ingest_server,
    pack,
    serving,
)
from tests.servers import S3Server

__all__ = ["ingest", "ingest_server"]


@pytest.fixture
def mortal(
    database: Database,
    sites: Sites,
    migrated: Postgres,
    s3_server: S3Server,
    valkey_server: Valkey,
    tmp_path: Path,
) -> Iterator[Ingest]:
    """An ingest server of this test's own, to be killed."""
    with serving(tmp_path, migrated, s3_server, valkey_server) as server:
        enrol(server, database, sites)
        yield server


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def each_is_archived_once(database: Database, objects: Objects, sites: Sites, images: list[Image]) -> None:
    with database.county(sites.county) as session:
        rows = session.scalars(sa.select(Instance)).all()
        assert sorted(row.sop_instance_uid for row in rows) == sorted(i.facts.sop_instance_uid for i in images)
        sent = {i.facts.sop_instance_uid: i.data for i in images}
        for row in rows:
            assert archive.read_instance(session, objects, row) == sent[row.sop_instance_uid] and not row.is_variant
        study = session.scalars(sa.select(Study)).one()
        assert study.instance_count == len(images)
        verify_chain(session, study.id)
        receipted = sa.select(sa.func.count()).select_from(Event).where(Event.name == "upload.receipted")
        assert (
            session.execute(receipted).scalar_one()
            == session.execute(sa.select(sa.func.count()).select_from(Pack)).scalar_one()
        )
        assert set(session.scalars(sa.select(Upload.state))) == {UploadState.RECEIPTED}


def commit_in_background(pool: ThreadPoolExecutor, peer: Peer, packed: Packed) -> Future[httpx.Response | None]:
    def ask() -> httpx.Response | None:
        try:
            return peer.post("commit", packed.commit())
        except httpx.TransportError:
            return None  # the server was killed

    return pool.submit(ask)


def test_a_server_killed_at_any_point_of_a_commit_archives_each_instance_once_when_asked_again(
    mortal: Ingest, database: Database, objects: Objects, sites: Sites, tmp_path: Path
) -> None:
    """Killed between PUT and commit, when the final object appears, when the rows do, and at random moments."""
    chance = random.Random(7)
    images: list[Image] = []
    packs: list[tuple[Packed, wire.Receipt | None]] = []
    points = ["before the commit", "final object", "receipted", *["random"] * 3]
    with ThreadPoolExecutor() as pool:
        for number, point in enumerate(points):
            some = [image(f"1.2.3.1.{number}.{n}", fill=n + 1, side=64) for n in range(20)]
            images += some
            packed = pack(tmp_path, facts_of(), some)
            peer = mortal.peer("a")
            peer.put(peer.offer(packed.offer()).puts[0], packed.data)
            first: wire.Receipt | None = None
            if point != "before the commit":
                asked = commit_in_background(pool, peer, packed)
                prefix = f"packs/county-a/1/{packed.plan.pack_id}"
                if point == "final object":
                    until(lambda prefix=prefix: any(objects.list(prefix)))
                elif point == "receipted":
                    until(lambda packed=packed: is_receipted(database, packed))
                else:
                    time.sleep(chance.random() * 0.15)
                mortal.kill()
                answer = asked.result(timeout=60)
                if answer is not None and answer.status_code == 200:
                    first = wire.CommitAnswer.model_validate_json(answer.content).receipt
            mortal.kill()
            mortal.start()
            packs.append((packed, first))
            again = mortal.peer("a").commit(packed)
            assert again.status == "receipted"
            assert first in (None, again.receipt)
    each_is_archived_once(database, objects, sites, images)
    assert list(objects.list("staging/county-a/")) == []
    last = mortal.peer("a")
    assert last.inventory(images).complete
    assert all(last.commit(packed).status == "receipted" for packed, _ in packs)


def is_receipted(database: Database, packed: Packed) -> bool:
    with database.centre() as session:
        query = sa.select(Upload.state).where(Upload.pack_id == packed.plan.pack_id)
        return session.scalars(query).one() is UploadState.RECEIPTED


def test_two_servers_asked_to_commit_one_pack_at_once_give_one_receipt(
    mortal: Ingest, ingest: Ingest, database: Database, objects: Objects, sites: Sites, tmp_path: Path
) -> None:
    """Each server process would join two requests for one pack: so two processes are asked, three times each."""
    images: list[Image] = []
    for round_number in range(4):
        enrol(ingest, database, sites)
        here = ingest.peer("a")
        some = [image(f"1.2.3.1.{round_number}.{n}", fill=n + 1) for n in range(10)]
        images += some
        packed = pack(tmp_path, facts_of(), some)
        here.put(here.offer(packed.offer()).puts[0], packed.data)
        also_enrol(database, sites, mortal.fingerprint("a"))
        there = mortal.peer("a")
        with ThreadPoolExecutor() as pool:
            asked = [pool.submit(peer.commit, packed) for peer in (here, there) * 3]
            answers = [one.result(timeout=60) for one in asked]
        assert {answer.status for answer in answers} == {"receipted"}
        assert len({answer.receipt.signature for answer in answers if answer.receipt}) == 1
    each_is_archived_once(database, objects, sites, images)


def also_enrol(database: Database, sites: Sites, fingerprint: str) -> None:
    """A second gateway of the county, for the other server's site CA."""
    with database.centre() as session:
        if session.scalars(sa.select(Gateway).filter_by(certificate_sha256=fingerprint)).one_or_none() is None:
            session.add(Gateway(site_id=sites.county, name="second", certificate_sha256=fingerprint))


def test_two_packs_that_carry_the_same_instance_committed_at_once_store_it_once(
    ingest: Ingest, database: Database, objects: Objects, sites: Sites, tmp_path: Path
) -> None:
    shared = image("1.2.3.1.0", fill=99)
    packs = [pack(tmp_path, facts_of(), [shared, image(f"1.2.3.1.{n}", fill=n)]) for n in range(1, 7)]
    peer = ingest.peer("a")
    for packed in packs:
        peer.put(peer.offer(packed.offer()).puts[0], packed.data)
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(peer.commit, packs))
    assert {answer.status for answer in answers} == {"receipted"}
    with database.county(sites.county) as session:
        assert session.execute(sa.select(sa.func.count()).select_from(Instance)).scalar_one() == 7
        assert session.scalars(sa.select(Study.instance_count)).one() == 7
    assert peer.inventory([shared]).complete


def test_one_uid_in_studies_committed_at_once_is_seen_in_each_and_all_are_flagged(
    ingest: Ingest, database: Database, sites: Sites, tmp_path: Path
) -> None:
    peer = ingest.peer("a")
    packs = []
    for n in range(1, 5):
        study = f"1.2.{n}"
        packs.append(pack(tmp_path, facts_of(study), [image("7.7.7", study=study, series=f"{study}.1", fill=n)]))
        peer.put(peer.offer(packs[-1].offer()).puts[0], packs[-1].data)
    with ThreadPoolExecutor() as pool:
        assert {answer.status for answer in pool.map(peer.commit, packs)} == {"receipted"}
    with database.county(sites.county) as session:
        assert session.scalars(sa.select(Instance.is_variant)).all() == [False] * 4
        assert session.scalars(sa.select(Study.has_variants)).all() == [True] * 4
        variants = session.scalars(sa.select(Event.details).where(Event.name == "instance.variant")).all()
    assert sorted(len(details["other_studies"]) for details in variants) == [1, 2, 3]


def test_two_first_offers_of_one_study_at_once_announce_it_once(
    ingest: Ingest, database: Database, tmp_path: Path
) -> None:
    packs = [pack(tmp_path, facts_of(), [image(f"1.2.3.1.{n}", fill=n)]) for n in range(1, 7)]
    peer = ingest.peer("a")
    with ThreadPoolExecutor() as pool:
        list(pool.map(peer.send, packs))
    with database.centre() as session:
        assert session.scalars(sa.select(Study.state)).all() == [StudyState.RECEIVING]
        assert session.scalars(sa.select(Event.name).where(Event.name == "study.announced")).all() == [
            "study.announced"
        ]


def test_two_patients_offered_at_once_under_one_study_uid_are_both_held(
    ingest: Ingest, database: Database, tmp_path: Path
) -> None:
    packs = [
        pack(tmp_path, facts_of(patient_id=f"P{n}"), [image(f"1.2.3.1.{n}", patient_id=f"P{n}", fill=n)])
        for n in range(1, 4)
    ]
    peer = ingest.peer("a")
    with ThreadPoolExecutor() as pool:
        assert {answer.status for answer in pool.map(peer.send, packs)} == {"receipted"}
    with database.centre() as session:
        assert session.scalars(sa.select(Study.state)).all() == [StudyState.HELD] * 3


@pytest.mark.parametrize("away", ["S3_URL", "DATABASE_URL"])
def test_a_server_that_is_away_is_503_with_retry_after_and_the_commit_succeeds_later(
    mortal: Ingest, tmp_path: Path, away: str
) -> None:
    packed = pack(tmp_path, facts_of(), [image("1.2.3.1.1")])
    peer = mortal.peer("a")
    peer.put(peer.offer(packed.offer()).puts[0], packed.data)
    assert mortal.stop() == 0, "SIGTERM is an ordered stop"
    good = dict(mortal.environment)
    port = free_ports(1)[0]
    gone = {"S3_URL": f"http://127.0.0.1:{port}", "DATABASE_URL": f"postgresql+psycopg://a:b@127.0.0.1:{port}/c"}
    mortal.environment[f"YUANZHEN_{away}"] = gone[away]
    mortal.start()
    peer = mortal.peer("a")
    answer = peer.post("commit", packed.commit())
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
    assert wire.Problem.model_validate_json(answer.content).status == 503
    mortal.kill()
    mortal.environment = good
    mortal.start()
    assert mortal.peer("a").commit(packed).status == "receipted"


def test_sigterm_ends_a_waiting_long_poll_at_once_with_an_answer(mortal: Ingest) -> None:
    peer = mortal.peer("a")
    assert peer.http.get("/gateway/v1/feed?wait_s=0").status_code == 200
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(peer.http.get, "/gateway/v1/feed?wait_s=25")
        until(waiting.running)
        assert mortal.stop() == 0
        with contextlib.suppress(httpx.TransportError):  # it had not begun when the server ceased to accept
            assert waiting.result(timeout=60).status_code == 200
