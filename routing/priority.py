"""The one policy that orders the worklist: each open case has (tier, due_at); lower tier first, then earlier due.

Pure. Tier 0 (stat, critical) stands before everything, overdue routine included: with plain earliest-due-first and
600 overdue routine cases a new stat case waited 276 minutes, with tiers one (design §7). Ageing lifts a routine case
that is due into the tier of the urgent ones, never above. Models and people only ever move a case earlier: `place`
never answers later than the case stands already. The contract's clock starts at receipt in the gateway.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from storage.vocabulary import Priority

TIER_FIRST, TIER_URGENT, TIER_ROUTINE = 0, 1, 2
TIER_OF_PRIORITY = {Priority.STAT: TIER_FIRST, Priority.URGENT: TIER_URGENT, Priority.ROUTINE: TIER_ROUTINE}

MAX_ON_THE_WAY = timedelta(days=31)
"""An uplink may be down for days; a gateway's clock that is wrong by more than this is not believed."""

_PRIORITY_TEXT = {
    Priority.STAT: ("急诊", "stat"),
    Priority.URGENT: ("加急", "urgent"),
    Priority.ROUTINE: ("常规", "routine"),
}


@dataclass(frozen=True, slots=True)
class ActiveFinding:
    """A positive finding of a model that may move cases here (run mode ACTIVE)."""

    model: str
    code: str
    probability: float
    minutes_earlier: int
    text_zh: str = ""
    text_en: str = ""


@dataclass(frozen=True, slots=True)
class Reason:
    """One sentence of why a case stands where it stands, as data and in both languages."""

    code: str
    zh: str
    en: str
    data: dict[str, Any]

    def as_row(self) -> dict[str, Any]:
        """As kept in `reading_case.due_reasons`."""
        return {"code": self.code, "zh": self.zh, "en": self.en, **self.data}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a case stands in its queue. Compare by `order`."""

    tier: int
    due_at: datetime
    reasons: tuple[Reason, ...] = ()

    @property
    def order(self) -> tuple[int, datetime]:
        """The worklist is sorted by this."""
        return self.tier, self.due_at


def clock_start(received_at: datetime, clock_offset_ms: int | None, arrived_at: datetime) -> datetime:
    """Receipt at the gateway by the centre's clock: never after the study's arrival at the centre.

    `clock_offset_ms` is gateway minus centre, None if not known. A gateway's clock beyond belief counts as no clock.
    """
    corrected = received_at - timedelta(milliseconds=clock_offset_ms or 0)
    if corrected > arrived_at or arrived_at - corrected > MAX_ON_THE_WAY:
        return arrived_at
    return corrected


def place(
    *,
    priority: Priority,
    clock_started_at: datetime,
    contract_due_at: datetime,
    now: datetime,
    findings: Sequence[ActiveFinding] = (),
    critical: bool = False,
    current: Place | None = None,
) -> Place:
    """Where a case stands `now`. Never later, in tier or in due time, than `current`.

    The strongest finding moves the due time, not their sum, and not before the clock's start.
    """
    tier = TIER_OF_PRIORITY[priority]
    minutes = round((contract_due_at - clock_started_at).total_seconds() / 60)
    zh, en = _PRIORITY_TEXT[priority]
    reasons = [
        Reason(
            "contract",
            f"{zh}病例：收到后 {minutes} 分钟内报告",
            f"{en} case: report within {minutes} min of receipt",
            {"minutes": minutes},
        )
    ]
    if priority is Priority.STAT:
        reasons.append(Reason("stat", "急诊优先于所有其他病例", "stat stands before every other case", {}))
    if critical:
        tier = TIER_FIRST
        reasons.append(
            Reason("critical", "危急值优先于所有其他病例", "a critical value stands before every other case", {})
        )

    due_at = contract_due_at
    strongest = max(findings, key=lambda finding: finding.minutes_earlier, default=None)
    if strongest is not None and strongest.minutes_earlier > 0:
        due_at = min(due_at, max(clock_started_at, due_at - timedelta(minutes=strongest.minutes_earlier)))
        reasons.append(_moved_by(strongest))

    if current is not None:
        if current.due_at < due_at:
            due_at = current.due_at
            reasons.append(
                Reason("kept", "此前已提前，不再推后", "it was moved earlier before and is never moved back", {})
            )
        tier = min(tier, current.tier)
    if tier == TIER_ROUTINE and now >= due_at:
        tier = TIER_URGENT
    if priority is Priority.ROUTINE and tier == TIER_URGENT:
        reasons.append(
            Reason("aged", "已到报告时限，与加急病例同列", "it has come due and stands among the urgent cases", {})
        )
    return Place(tier, due_at, tuple(reasons))


def _moved_by(finding: ActiveFinding) -> Reason:
    text_zh, text_en = finding.text_zh or finding.code, finding.text_en or finding.code
    return Reason(
        "finding",
        f"{finding.model} 提示“{text_zh}”，提前 {finding.minutes_earlier} 分钟",
        f"{finding.model} flagged “{text_en}”: {finding.minutes_earlier} min earlier",
        {
            "model": finding.model,
            "finding": finding.code,
            "probability": round(finding.probability, 4),
            "minutes": finding.minutes_earlier,
        },
    )
