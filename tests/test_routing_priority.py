"""The worklist's policy: stat first, never later, monotone; as properties over all cases, and a few told examples."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from routing.priority import (
    MAX_ON_THE_WAY,
    TIER_FIRST,
    TIER_ROUTINE,
    TIER_URGENT,
    ActiveFinding,
    Place,
    clock_start,
    place,
)
from storage.vocabulary import Priority

START = datetime(2026, 11, 23, 8, 0, tzinfo=UTC)

minutes = st.integers(0, 10_000)
findings = st.lists(st.builds(ActiveFinding, st.just("m"), st.just("f"), st.floats(0, 1), minutes), max_size=4)
places = st.none() | st.builds(Place, st.integers(0, 2), minutes.map(lambda m: START + timedelta(minutes=m)))
cases = st.fixed_dictionaries(
    {
        "priority": st.sampled_from(Priority),
        "clock_started_at": st.just(START),
        "contract_due_at": st.integers(1, 10_000).map(lambda m: START + timedelta(minutes=m)),
        "now": minutes.map(lambda m: START + timedelta(minutes=m)),
        "findings": findings,
        "critical": st.booleans(),
        "current": places,
    }
)


@given(cases)
def test_nothing_is_ever_placed_later_than_it_stands_or_than_its_contract(case: dict[str, Any]) -> None:
    placed = place(**case)
    assert placed.due_at <= case["contract_due_at"]
    if case["current"] is not None:
        assert placed.tier <= case["current"].tier
        assert placed.due_at <= case["current"].due_at


@given(cases, cases)
def test_stat_and_critical_stand_before_every_other_case_however_overdue(
    one: dict[str, Any], other: dict[str, Any]
) -> None:
    other |= {"priority": Priority.ROUTINE, "critical": False, "current": None}
    for first in (one | {"priority": Priority.STAT}, one | {"critical": True}):
        assert place(**first).order < place(**other).order
    assert place(**other).tier >= TIER_URGENT


@given(cases, findings)
def test_a_further_finding_never_makes_a_case_later(case: dict[str, Any], more: list[ActiveFinding]) -> None:
    assert place(**(case | {"findings": case["findings"] + more})).order <= place(**case).order


@given(cases, minutes)
def test_waiting_never_makes_a_case_later(case: dict[str, Any], later: int) -> None:
    waited = case | {"now": case["now"] + timedelta(minutes=later)}
    assert place(**waited).order <= place(**case).order


@given(cases)
def test_a_more_urgent_case_with_the_same_promise_is_never_later(case: dict[str, Any]) -> None:
    stat, urgent, routine = (place(**(case | {"priority": priority})) for priority in Priority)
    assert stat.order <= urgent.order <= routine.order


@given(cases)
def test_placing_again_changes_nothing(case: dict[str, Any]) -> None:
    placed = place(**case)
    assert place(**(case | {"current": placed})).order == placed.order


@given(cases)
def test_findings_never_move_a_case_before_its_clock_started(case: dict[str, Any]) -> None:
    assert place(**(case | {"current": None})).due_at >= START


@given(cases)
def test_every_reason_is_a_sentence_in_both_languages_and_plain_data(case: dict[str, Any]) -> None:
    for reason in place(**case).reasons:
        row = reason.as_row()
        assert row["zh"] and row["en"] and row["code"]


@given(
    received=st.integers(-10_000_000, 10_000_000),
    offset_ms=st.none() | st.integers(-(10**12), 10**12),
)
def test_the_clock_never_starts_after_the_centres_receipt(received: int, offset_ms: int | None) -> None:
    start = clock_start(START + timedelta(seconds=received), offset_ms, START)
    assert START - MAX_ON_THE_WAY <= start <= START


def test_the_clock_starts_at_receipt_in_the_gateway_by_the_centres_time() -> None:
    received = START - timedelta(minutes=30)
    assert clock_start(received, None, START) == received
    assert clock_start(received, 120_000, START) == received - timedelta(minutes=2)  # gateway runs ahead
    assert clock_start(received, -7_200_000, START) == START  # corrected it would lie after the receipt
    assert clock_start(START - timedelta(days=9000), None, START) == START  # a clock without a battery


def place_of(priority: Priority, due_in: int, **more: Any) -> Place:
    return place(
        priority=priority,
        clock_started_at=START,
        contract_due_at=START + timedelta(minutes=due_in),
        **({"now": START} | more),
    )


def test_a_routine_case_that_has_come_due_stands_among_the_urgent_ones() -> None:
    waiting = place_of(Priority.ROUTINE, 120)
    due = place_of(Priority.ROUTINE, 120, now=START + timedelta(minutes=120))
    assert (waiting.tier, due.tier) == (TIER_ROUTINE, TIER_URGENT)
    assert waiting.due_at == due.due_at
    assert due.reasons[-1].code == "aged"
    assert due.order < place_of(Priority.URGENT, 121).order


def test_a_new_stat_case_waits_for_none_of_six_hundred_overdue_routine_cases() -> None:
    late = START + timedelta(days=1)
    queue = [place_of(Priority.ROUTINE, n, now=late) for n in range(1, 601)]
    stat = replace(place_of(Priority.STAT, 30), due_at=late + timedelta(minutes=30))
    assert min([*queue, stat], key=lambda one: one.order) is stat
    assert stat.tier == TIER_FIRST


def test_the_strongest_finding_counts_and_is_named() -> None:
    found = [ActiveFinding("ecg", "af", 0.8, 15, "房颤", "AF"), ActiveFinding("ecg", "pause", 1.0, 25, "停搏", "pause")]
    placed = place_of(Priority.ROUTINE, 30, findings=found)
    assert placed.due_at == START + timedelta(minutes=5)
    (reason,) = [one for one in placed.reasons if one.code == "finding"]
    assert reason.zh == "ecg 提示“停搏”，提前 25 分钟"
    assert reason.as_row()["probability"] == 1.0
