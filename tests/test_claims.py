"""Claims: one case, one reader. Two at once, leases that run out, hand-back, the next case."""

import threading
from datetime import timedelta

import pytest
import sqlalchemy as sa

from storage.rows import Case
from storage.vocabulary import CaseState
from tests.web import Web, signing_pki, soon, web

__all__ = ["signing_pki", "web"]


def expire(web: Web, case_id: int) -> None:
    with web.database.centre() as session:
        session.execute(
            sa.update(Case)
            .where(Case.id == case_id)
            .values(lease_expires_at=sa.func.clock_timestamp() - timedelta(seconds=1))
        )


def test_a_claimed_case_is_named_with_its_holder_to_the_second_reader(web: Web) -> None:
    case_id = web.case()
    web.sign_in("reader-a").claim(case_id)
    refused = web.sign_in("reader-a2").post(f"/cases/{case_id}/claim")
    assert refused.status_code == 409
    assert (refused.json()["type"], refused.json()["holder"]) == ("taken", "阅片医师一")


def test_of_two_readers_at_once_one_gets_the_case_and_the_other_hears_who(web: Web) -> None:
    readers = web.sign_in("reader-a"), web.sign_in("reader-a2")
    for round_number in range(8):
        case_id = web.case(f"1.2.{round_number}")
        gate = threading.Barrier(2)
        answers = []

        def take(reader: object, case_id: int = case_id, gate: threading.Barrier = gate) -> None:
            gate.wait()
            answers.append(reader.post(f"/cases/{case_id}/claim"))  # type: ignore[attr-defined]  # noqa: B023

        threads = [threading.Thread(target=take, args=(reader,)) for reader in readers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(answer.status_code for answer in answers) == [200, 409]
        assert len([e for e in web.events("case.claimed") if e.subject_id == case_id]) == 1


def test_claiming_again_gives_the_same_lease(web: Web) -> None:
    case_id, reader = web.case(), web.sign_in("reader-a")
    assert reader.claim(case_id) == reader.claim(case_id)
    assert len(web.events("case.claimed")) == 1


def test_a_heartbeat_keeps_the_lease_and_says_that_images_came(web: Web) -> None:
    case_id, reader = web.case(), web.sign_in("reader-a")
    lease = reader.claim(case_id)
    before = web.row(case_id).lease_expires_at
    answer = reader.post(f"/cases/{case_id}/heartbeat", lease=lease)
    assert answer.json()["new_images"] is False
    after = web.row(case_id).lease_expires_at
    assert before is not None and after is not None and after > before
    with web.database.centre() as session:
        session.execute(sa.update(Case).where(Case.id == case_id).values(new_images=True))
    assert reader.post(f"/cases/{case_id}/heartbeat", lease=lease).json()["new_images"] is True


def test_a_lease_that_ran_out_goes_to_whoever_claims_next(web: Web) -> None:
    case_id = web.case()
    first, second = web.sign_in("reader-a"), web.sign_in("reader-a2")
    lease = first.claim(case_id)
    expire(web, case_id)
    second.claim(case_id)
    assert [e.name for e in web.events("case.claimed", "case.lease_expired")] == [
        "case.claimed", "case.lease_expired", "case.claimed",
    ]  # fmt: skip
    lost = first.post(f"/cases/{case_id}/heartbeat", lease=lease)
    assert (lost.status_code, lost.json()["type"]) == (409, "lease-lost")


def test_an_older_claim_of_the_same_reader_changes_nothing(web: Web) -> None:
    case_id, reader = web.case(), web.sign_in("reader-a")
    old = reader.claim(case_id)
    assert reader.post(f"/cases/{case_id}/hand-back", lease=old).status_code == 200
    reader.claim(case_id)
    assert reader.post(f"/cases/{case_id}/heartbeat", lease=old).status_code == 409
    assert reader.post(f"/cases/{case_id}/hand-back", lease=old).status_code == 409
    assert web.row(case_id).state is CaseState.CLAIMED


def test_a_case_handed_back_is_nobodys(web: Web) -> None:
    case_id, reader = web.case(), web.sign_in("reader-a")
    reader.post(f"/cases/{case_id}/hand-back", lease=reader.claim(case_id))
    row = web.row(case_id)
    assert (row.state, row.claimed_by, row.lease_token) == (CaseState.QUEUED, None, None)
    assert web.events("case.handed_back")[0].actor == f"account:{web.accounts['reader-a']}"


def test_the_next_case_is_the_first_by_tier_then_due_time(web: Web) -> None:
    late = web.case("1.1", tier=2, due_at=soon(-60))
    stat = web.case("1.2", tier=0, due_at=soon(30))
    urgent = web.case("1.3", tier=1, due_at=soon(5))
    reader = web.sign_in("reader-a")
    order = [reader.post("/worklist/next").json()["case_id"] for _ in range(3)]
    assert order == [stat, urgent, late]
    nothing = reader.post("/worklist/next")
    assert (nothing.status_code, nothing.json()["detail"]) == (404, "现在没有待阅的检查。")


def test_readers_asking_for_the_next_case_at_once_get_different_ones(web: Web) -> None:
    ids = {web.case(f"1.{number}") for number in range(12)}
    readers = [web.sign_in("reader-a"), web.sign_in("reader-a2")]
    got: list[int] = []

    def take(reader: object) -> None:
        got.extend(reader.post("/worklist/next").json()["case_id"] for _ in range(6))  # type: ignore[attr-defined]

    threads = [threading.Thread(target=take, args=(reader,)) for reader in readers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == sorted(ids)


@pytest.mark.parametrize("path", ["claim", "heartbeat", "hand-back"])
def test_a_reader_without_a_grant_finds_no_such_case(web: Web, path: str) -> None:
    case_id = web.case()
    web.sign_in("reader-a").claim(case_id)
    answer = web.sign_in("reader-b").post(f"/cases/{case_id}/{path}", lease="x")
    assert answer.status_code in {404, 409}
    assert "阅片医师一" not in answer.text


def test_a_suspended_case_cannot_be_claimed(web: Web) -> None:
    case_id = web.case(state=CaseState.SUSPENDED)
    answer = web.sign_in("reader-a").post(f"/cases/{case_id}/claim")
    assert (answer.status_code, answer.json()["type"]) == (409, "conflict")
