"""Turnaround from event rows alone: the moments of each study, and the segments between them (design §9).

One query makes a row a study with its moments; everything else is counted from it in SQL. Gateway times are brought to
the centre's clock by the offset that the gateway had then. Triage runs beside the waiting, so it is no part of the
sum. The contract kept or broken is the one that stood before the first signature: images that come later begin another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

POINTS = (
    "acquired", "gateway", "centre", "complete", "triaged", "claimed", "signed", "received", "delivered", "opened",
)  # fmt: skip
SEGMENTS: dict[str, tuple[str, str]] = {
    "at_modality": ("acquired", "gateway"),
    "uplink": ("gateway", "centre"),
    "transfer": ("centre", "complete"),
    "triage": ("complete", "triaged"),
    "waiting": ("complete", "claimed"),
    "reading": ("claimed", "signed"),
    "return": ("signed", "received"),
    "delivery": ("received", "delivered"),
    "opening": ("delivered", "opened"),
    "turnaround": ("gateway", "signed"),
}
STACKED = ("at_modality", "uplink", "transfer", "waiting", "reading", "return", "delivery", "opening")
GROUPS = ("site", "modality", "priority")

# A study may have several of a kind (reopened, claimed again): the first report counts, and the claim that led to it.
# An acquisition more than a week before receipt is an old study sent now, and one after receipt a clock that is wrong.
_MOMENTS = """
WITH raw AS (
    SELECT event.study_id,
        min(event.at) FILTER (WHERE name = 'study.announced') AS centre,
        min((details->>'gateway_received_at')::timestamptz
            - make_interval(secs => coalesce((details->>'gateway_clock_offset_ms')::float8, 0) / 1000))
            FILTER (WHERE name = 'study.announced') AS gateway,
        min((details->>'acquired_at')::timestamptz) FILTER (WHERE name = 'study.announced') AS acquired,
        min(event.at) FILTER (WHERE name = 'study.completed') AS complete,
        min(event.at) FILTER (WHERE name IN ('triage.done', 'triage.not_for_model')) AS triaged,
        min(event.at) FILTER (WHERE name = 'report.signed') AS signed,
        min(event.at) FILTER (WHERE name = 'report.received') AS received,
        min(event.at) FILTER (WHERE name = 'report.delivered') AS delivered,
        min(event.at) FILTER (WHERE name = 'report.opened') AS opened
    FROM event
    WHERE event.study_id IN (
        SELECT announced.study_id FROM event AS announced
        WHERE announced.name = 'study.announced' AND announced.at >= :since AND announced.at < :until)
    GROUP BY event.study_id
), moments AS (
    SELECT study.id AS study_id, study.study_instance_uid, study.accession_number,
        site.code AS site, site.name_zh, site.name_en,
        coalesce((SELECT one FROM unnest(study.modalities) AS one
            WHERE one NOT IN ('SR', 'PR', 'KO', 'DOC', 'OT') LIMIT 1), '?') AS modality,
        coalesce(reading_case.priority, study.priority)::text AS priority,
        coalesce((SELECT (routed.details->>'contract_due_at')::timestamptz FROM event AS routed
            WHERE routed.study_id = study.id AND routed.details ? 'contract_due_at' AND (routed.name = 'case.queued'
                OR (routed.name IN ('case.renewed', 'case.resumed') AND routed.at <= coalesce(raw.signed, 'infinity')))
            ORDER BY routed.sequence DESC LIMIT 1), reading_case.contract_due_at) AS contract_due_at,
        CASE WHEN raw.acquired BETWEEN raw.gateway - interval '7 days' AND raw.gateway
            THEN raw.acquired END AS acquired,
        raw.gateway, raw.centre, raw.complete, raw.triaged,
        (SELECT max(claim.at) FROM event AS claim WHERE claim.study_id = study.id AND claim.name = 'case.claimed'
            AND claim.at <= coalesce(raw.signed, 'infinity')) AS claimed,
        raw.signed, raw.received, raw.delivered,
        -- Opened on our page before the PACS had it: nobody waited.
        greatest(raw.opened, raw.delivered) AS opened_after, raw.opened
    FROM raw
    JOIN study ON study.id = raw.study_id
    JOIN site ON site.site_id = study.site_id
    LEFT JOIN reading_case ON reading_case.study_id = study.id
), chosen AS (
    SELECT * FROM moments
    WHERE (:site = '' OR site = :site) AND (:modality = '' OR modality = :modality)
        AND (:priority = '' OR priority = :priority)
), spans AS (
    SELECT chosen.*, span.segment, extract(epoch FROM span.length)::float8 AS seconds,
        CASE :by WHEN 'site' THEN site WHEN 'modality' THEN modality ELSE priority END AS part
    FROM chosen CROSS JOIN LATERAL (VALUES
        ('at_modality', gateway - acquired), ('uplink', centre - gateway), ('transfer', complete - centre),
        ('triage', triaged - complete), ('waiting', claimed - complete), ('reading', signed - claimed),
        ('return', received - signed), ('delivery', delivered - received),
        ('opening', CASE WHEN opened IS NOT NULL THEN opened_after - delivered END),
        ('turnaround', signed - gateway)
    ) AS span(segment, length)
    WHERE span.length IS NOT NULL
)
"""


@dataclass(frozen=True, slots=True)
class Choice:
    """Which studies: announced in [since, until), of a site (code), modality, priority; "" is all."""

    since: datetime
    until: datetime
    site: str = ""
    modality: str = ""
    priority: str = ""
    by: str = "site"

    def values(self) -> dict[str, Any]:
        """As parameters of the queries."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Figure:
    """One segment of one part (None: all): how many studies, and seconds."""

    segment: str
    part: str | None
    count: int
    median_s: float
    p90_s: float
    max_s: float


def figures(session: Session, choice: Choice) -> list[Figure]:
    """Median, 90th centile and maximum by segment, over all and by part."""
    query = f"""{_MOMENTS}
    SELECT segment, CASE WHEN grouping(part) = 0 THEN part END, count(*),
        percentile_cont(0.5) WITHIN GROUP (ORDER BY seconds), percentile_cont(0.9) WITHIN GROUP (ORDER BY seconds),
        max(seconds)
    FROM spans GROUP BY GROUPING SETS ((segment), (segment, part)) ORDER BY 2 NULLS FIRST
    """  # noqa: S608 - constants joined; what is asked for goes in as parameters
    return [Figure(*row) for row in session.execute(sa.text(query), choice.values())]


def within_contract(session: Session, choice: Choice) -> tuple[int, int]:
    """(signed by the contract's due time, signed)."""
    query = f"""{_MOMENTS}
    SELECT count(*) FILTER (WHERE signed <= contract_due_at), count(*) FILTER (WHERE signed IS NOT NULL) FROM chosen
    """  # noqa: S608 - constants joined; what is asked for goes in as parameters
    kept, signed = session.execute(sa.text(query), choice.values()).one()
    return kept, signed


def studies(session: Session, choice: Choice, limit: int) -> Sequence[sa.RowMapping]:
    """Every chosen study with its moments, newest first."""
    query = f"{_MOMENTS} SELECT * FROM chosen ORDER BY centre DESC, study_id DESC LIMIT :most"  # noqa: S608 - as above
    return session.execute(sa.text(query), choice.values() | {"most": limit}).mappings().all()


def slowest(session: Session, choice: Choice, segment: str, limit: int) -> Sequence[sa.RowMapping]:
    """The studies behind a figure, slowest first."""
    query = f"""{_MOMENTS}
    SELECT * FROM spans WHERE segment = :segment ORDER BY seconds DESC, study_id LIMIT :most
    """  # noqa: S608 - constants joined; what is asked for goes in as parameters
    return session.execute(sa.text(query), choice.values() | {"segment": segment, "most": limit}).mappings().all()
