"""Who gets in at the ingest server, and what is refused at the door: certificates, sites, limits, malformed messages.

Not here: what an admitted gateway may send (test_ingest_way_up.py).
"""

import json
import socket
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa

from deploy.pki import ensure_pki, issue_gateway
from routing import ingest as routes
from routing.gateways import identify
from storage import wire
from storage.database import Database
from storage.errors import ForbiddenError
from storage.rows import Event, Gateway, Study
from tests.centre import Sites
from tests.ingest_peer import Ingest, Peer, county, facts_of, image, ingest, ingest_server, other_county, pack

__all__ = ["county", "ingest", "ingest_server", "other_county"]


def heartbeat(**values: object) -> wire.Heartbeat:
    facts = {
        "version": "1",
        "sent_at": datetime.now(UTC),
        "unsent_instances": 0,
        "unsent_bytes": 0,
        "free_disk_bytes": 10**9,
        **values,
    }
    return wire.Heartbeat.model_validate(facts)


def problem(answer: httpx.Response, status: int) -> wire.Problem:
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), answer.text
    return wire.Problem.model_validate_json(answer.content)


@pytest.fixture
def stranger(ingest: Ingest) -> Iterator[Peer]:
    """A gateway with a certificate from the site CA that nobody enrolled."""
    peer = ingest.peer("stranger")
    yield peer
    peer.close()


def test_a_client_without_a_certificate_is_refused_by_tls(ingest: Ingest) -> None:
    peer = Peer(ingest.url, ingest.pki, None, None)
    with pytest.raises(httpx.TransportError):
        peer.post("heartbeat", heartbeat())
    peer.close()


def test_a_certificate_from_another_ca_is_refused_by_tls(ingest: Ingest, tmp_path: Path) -> None:
    other = issue_gateway(ensure_pki(tmp_path / "other"), "a")
    peer = Peer(ingest.url, ingest.pki, other.certificate, other.key)
    with pytest.raises(httpx.TransportError):
        peer.post("heartbeat", heartbeat())
    peer.close()


def test_tls_below_1_2_is_refused(ingest: Ingest) -> None:
    own = issue_gateway(ingest.pki, "a")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(ingest.pki.site_ca)
    context.load_cert_chain(own.certificate, own.key)
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with socket.create_connection(("127.0.0.1", ingest.port)) as plain, pytest.raises(OSError):
        context.wrap_socket(plain, server_hostname="127.0.0.1")


def test_a_gateway_that_is_not_enrolled_is_forbidden_on_every_route(stranger: Peer, tmp_path: Path) -> None:
    packed = pack(tmp_path, facts_of(), [image("1.2.3.1.1")])
    inventory = wire.Inventory(study_instance_uid="1.2.3", instances=(), quiet_since=datetime.now(UTC))
    acknowledge = wire.Acknowledge(report_id=1, step="received", at=datetime.now(UTC))
    for name, message in (
        ("offer", packed.offer()),
        ("commit", packed.commit()),
        ("inventory", inventory),
        ("heartbeat", heartbeat()),
        ("acknowledge", acknowledge),
    ):
        problem(stranger.post(name, message), 403)
    problem(stranger.http.get("/gateway/v1/feed?wait_s=0"), 403)
    problem(stranger.http.get("/gateway/v1/reports/1/pdf"), 403)


def test_no_certificate_digest_is_nobody(database: Database, sites: Sites) -> None:
    with pytest.raises(ForbiddenError):
        identify(database, "")


def test_another_hospitals_pack_is_not_found(county: Peer, other_county: Peer, tmp_path: Path) -> None:
    packed = pack(tmp_path, facts_of(), [image("1.2.3.1.1")])
    county.put(county.offer(packed.offer()).puts[0], packed.data)
    problem(other_county.post("commit", packed.commit()), 404)
    assert county.commit(packed).status == "receipted"


def test_another_hospital_that_offers_the_same_pack_id_has_a_pack_of_its_own(
    county: Peer, other_county: Peer, tmp_path: Path
) -> None:
    packed = pack(tmp_path, facts_of(), [image("1.2.3.1.1")])
    mine = county.send(packed).receipt
    answer = other_county.offer(packed.offer())
    assert answer.receipts == () and "/staging/county-b/" in answer.puts[0].url
    assert mine is not None and mine.site == "county-a"


def test_another_hospitals_inventory_says_nothing_of_the_first_ones_study(
    county: Peer, other_county: Peer, database: Database, tmp_path: Path
) -> None:
    one = image("1.2.3.1.1")
    county.send(pack(tmp_path, facts_of(), [one]))
    assert other_county.inventory([one]).missing[0].sop_instance_uid == "1.2.3.1.1"
    with database.centre() as session:
        assert session.scalars(sa.select(Study.expected_count)).all() == [None]


def test_a_heartbeat_keeps_the_clock_offset_and_running_out_of_space_is_one_event(
    county: Peer, database: Database, sites: Sites
) -> None:
    ahead = datetime.now(UTC) + timedelta(hours=1)
    for out in (True, True, False):
        answer = county.post("heartbeat", heartbeat(sent_at=ahead, out_of_space=out, version="7\0"))
        assert answer.status_code == 400, "text with NUL cannot be stored"
        answer = county.post("heartbeat", heartbeat(sent_at=ahead, out_of_space=out))
        assert (
            abs((wire.HeartbeatAnswer.model_validate_json(answer.content).centre_time - ahead).total_seconds()) > 3000
        )
    with database.centre() as session:
        gateway = session.get_one(Gateway, sites.gateway)
        assert gateway.heartbeat is not None and gateway.last_heartbeat_at is not None
        assert 3_000_000 < (gateway.clock_offset_ms or 0) <= 3_600_000
        happened = session.scalars(sa.select(Event.name).order_by(Event.id)).all()
    assert happened == ["gateway.out_of_space", "gateway.space_again"]


def test_a_gateway_clock_far_away_or_without_zone_is_taken_as_it_is(county: Peer) -> None:
    for sent_at in (datetime(1970, 1, 1, tzinfo=UTC), datetime(2026, 1, 1)):
        assert county.post("heartbeat", heartbeat(sent_at=sent_at)).status_code == 200


def test_what_is_no_message_is_a_400_that_does_not_repeat_it(county: Peer) -> None:
    headers = {"Content-Type": "application/json"}
    for body in (b"{", b"[]", b'{"study": {"patient_name": "Zhang"}}', b"\xff"):
        answer = county.http.post("/gateway/v1/offer", content=body, headers=headers)
        assert "Zhang" not in problem(answer, 400).detail


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_beyond_the_limit_is_413(county: Peer, announced: bool) -> None:
    def blocks() -> Iterator[bytes]:
        for _ in range(routes.MAX_BODY_BYTES // 2**20 + 1):
            yield bytes(2**20)

    body = bytes(routes.MAX_BODY_BYTES + 1) if announced else blocks()
    try:
        answer = county.http.post("/gateway/v1/offer", content=body, headers={"Content-Type": "application/json"})
    except httpx.WriteError:
        return  # the server closed the connection while the body was still being sent
    problem(answer, 413)


def test_unknown_paths_and_methods_are_problems_too(county: Peer) -> None:
    problem(county.http.get("/"), 404)
    problem(county.http.get("/gateway/v1/offer"), 405)


def test_an_offer_that_contradicts_itself_is_refused(county: Peer, tmp_path: Path) -> None:
    packed = pack(tmp_path, facts_of(), [image("1.2.3.1.1")])
    offer = packed.offer()
    wrong = {
        "newer": offer.model_copy(update={"wire_version": wire.WIRE_VERSION + 1}),
        "not offered": offer.model_copy(
            update={"packs": (packed.plan.model_copy(update={"digests": ("0" * 64,)}),)},
        ),
        "smaller": offer.model_copy(update={"packs": (packed.plan.model_copy(update={"size_bytes": 10}),)}),
        "used twice": offer.model_copy(update={"packs": (packed.plan, packed.plan)}),
        "two instances": offer.model_copy(update={"instances": offer.instances * 2}),
    }
    for words, message in wrong.items():
        assert words in problem(county.post("offer", message), 400).detail


def test_a_pack_id_cannot_stand_for_other_bytes_once_receipted(county: Peer, tmp_path: Path) -> None:
    packed = pack(tmp_path, facts_of(), [image("1.2.3.1.1")])
    county.send(packed)
    other = pack(tmp_path, facts_of(), [image("1.2.3.1.2", fill=9)], pack_id=packed.plan.pack_id)
    problem(county.post("offer", other.offer()), 409)
    elsewhere = pack(tmp_path, facts_of("9.9"), [image("9.9.1", study="9.9")], pack_id=packed.plan.pack_id)
    problem(county.post("offer", elsewhere.offer()), 409)


def test_what_is_no_http_is_logged_as_one_json_line_like_everything_else(ingest: Ingest) -> None:
    own = issue_gateway(ingest.pki, "a")
    context = ssl.create_default_context(cafile=str(ingest.pki.site_ca))
    context.load_cert_chain(own.certificate, own.key)
    begin = ingest.log.stat().st_size
    with (
        socket.create_connection(("127.0.0.1", ingest.port)) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
    ):
        connection.sendall(b"Zhang^San\r\n\r\n")
        while connection.recv(4096):
            pass
    lines = [json.loads(line) for line in ingest.log.read_bytes()[begin:].splitlines()]
    assert ("library.said", "uvicorn.error") in [(line["action"], line.get("logger")) for line in lines]
