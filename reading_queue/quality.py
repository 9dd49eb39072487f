"""Quality: turnaround by segment, every number a way to its cases, the timeline of any study with its chain verified.

All filters stand in the address, so that any view can be sent as a link. CSV is safe to open in a spreadsheet.
"""

import csv
import io
import json
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from typing import Any, Literal
from urllib.parse import urlencode
from zoneinfo import ZoneInfo

import sqlalchemy as sa
from fastapi import APIRouter, Depends, Query, Request, Response

from reading_queue import turnaround
from reading_queue.auth import Person, require
from reading_queue.event_words import details_in_words, state_word
from reading_queue.i18n import language_of, local_minute, t
from reading_queue.pages import page
from reading_queue.worklist import RowId
from storage.errors import IllegalTransitionError, NotFoundError
from storage.rows import Account, Event, Gateway, Site, Study
from storage.transitions import SYSTEM, verify_chain
from storage.visible import visible
from storage.vocabulary import Priority, Role

router = APIRouter()
QUALITY = require(Role.QUALITY, Role.ADMINISTRATOR)
Period = Literal["today", "7d", "30d", "all"]
_DAYS = {"today": 1, "7d": 7, "30d": 30}
_EVER = datetime(2000, 1, 1, tzinfo=UTC)
_MAX_CASES = 200
_MAX_EXPORT = 100_000
# Spreadsheets of Chinese and Japanese locales take the full-width forms for the plain ones.
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


@dataclass(frozen=True, slots=True)
class View:
    """What the address asks for."""

    period: Period = "7d"
    site: str = ""
    modality: str = ""
    priority: Literal["", "stat", "urgent", "routine"] = ""
    by: Literal["site", "modality", "priority"] = "site"

    def address(self, path: str = "/quality", **changes: str) -> str:
        """The same view with some filters changed."""
        values = {name: getattr(self, name) for name in self.__slots__} | changes
        return f"{path}?{urlencode({name: value for name, value in values.items() if value})}"

    def choice(self, now: datetime, time_zone: str) -> turnaround.Choice:
        """As the query takes it. A period of n days is today and the n - 1 before it."""
        until = datetime.combine(now.astimezone(ZoneInfo(time_zone)).date(), time.min, ZoneInfo(time_zone))
        until += timedelta(days=1)
        since = until - timedelta(days=_DAYS[self.period]) if self.period in _DAYS else _EVER
        return turnaround.Choice(since, until, self.site, self.modality, self.priority, self.by)

    def choice_before(self, now: datetime, time_zone: str) -> turnaround.Choice | None:
        """The period of the same length before this one."""
        if self.period not in _DAYS:
            return None
        return self.choice(now - timedelta(days=_DAYS[self.period]), time_zone)


def view_of(
    period: Period = "7d",
    site: str = Query("", pattern=r"^[a-z0-9-]{0,64}$"),
    modality: str = Query("", max_length=64),  # as modalities send it, for its chip must work
    priority: Literal["", "stat", "urgent", "routine"] = "",
    by: Literal["site", "modality", "priority"] = "site",
) -> View:
    """The filters in the address."""
    return View(period, site, modality.replace("\0", ""), priority, by)


def _zone(request: Request) -> str:
    zone: str = request.app.state.settings.timezone
    return zone


@router.get("/quality")
def quality_page(request: Request, person: Person = Depends(QUALITY), view: View = Depends(view_of)) -> Response:
    """The page."""
    language = language_of(request)
    now = datetime.now(UTC)
    choice = view.choice(now, _zone(request))
    before = view.choice_before(now, _zone(request))
    with request.app.state.database.centre() as session:
        found = turnaround.figures(session, choice)
        kept, signed = turnaround.within_contract(session, choice)
        kept_before, signed_before = turnaround.within_contract(session, before) if before else (0, 0)
        sites = session.execute(
            sa.select(Site.code, Site.name_zh, Site.name_en).where(Site.is_centre.is_(False)).order_by(Site.code)
        ).all()
        modalities = session.scalars(
            sa.select(sa.func.unnest(Study.modalities).label("one")).distinct().order_by("one")
        ).all()
    priorities = [(one.value, t(f"common.priority_{one.value}", language)) for one in Priority]
    names = {code: (zh if language == "zh" else en) or zh or en for code, zh, en in sites}
    by_part: dict[str | None, dict[str, turnaround.Figure]] = {}
    for figure in found:
        by_part.setdefault(figure.part, {})[figure.segment] = figure
    parts = [part for part in by_part if part is not None]
    share = 100 * kept / signed if signed else None
    return page(
        request,
        "quality.html",
        view=view,
        choices={
            "period": [(one, t(f"quality.period_{one}", language)) for one in ("today", "7d", "30d", "all")],
            "site": [("", t("quality.all", language)), *names.items()],
            "modality": [("", t("quality.all", language)), *((one, one) for one in modalities)],
            "priority": [("", t("quality.all", language)), *priorities],
            "by": [(one, t(f"quality.{one}", language)) for one in turnaround.GROUPS],
        },
        segments=list(turnaround.SEGMENTS),
        by_part=by_part,
        parts=parts,
        part_name=lambda part: _part_name(part, view, names, language),
        kept=kept,
        signed=signed,
        share=share,
        change=share - 100 * kept_before / signed_before if share is not None and signed_before else None,
        chart=_chart(by_part, parts, lambda part: _part_name(part, view, names, language), language),
    )  # fmt: skip


def _part_name(part: str, view: View, names: dict[str, str], language: Any) -> str:
    if view.by == "site":
        return names.get(part, part)
    return t(f"common.priority_{part}", language) if view.by == "priority" else part


def _chart(by_part: dict[str | None, dict[str, turnaround.Figure]], parts: list[str], name: Any, language: Any) -> str:
    """Medians of the segments that add up, for ECharts: minutes by part. JSON for a data block."""
    series = [
        {
            "name": t(f"quality.segment_{segment}", language),
            "data": [round(by_part[p][segment].median_s / 60, 2) if segment in by_part[p] else 0 for p in parts],
        }
        for segment in turnaround.STACKED
    ]
    return json.dumps(
        {"parts": [visible(name(part)) for part in parts], "series": series, "unit": t("quality.minutes", language)}
    )


@router.get("/quality/cases")
def cases_page(
    request: Request,
    person: Person = Depends(QUALITY),
    view: View = Depends(view_of),
    segment: str = Query("turnaround", max_length=32),
) -> Response:
    """The studies behind a figure, slowest first."""
    if segment not in turnaround.SEGMENTS:
        raise NotFoundError("No such segment")
    choice = view.choice(datetime.now(UTC), _zone(request))
    with request.app.state.database.centre() as session:
        rows = turnaround.slowest(session, choice, segment, _MAX_CASES)
    return page(request, "quality_cases.html", view=view, segment=segment, rows=rows)


@router.get("/quality/export.csv")
def export(request: Request, person: Person = Depends(QUALITY), view: View = Depends(view_of)) -> Response:
    """A row a study: moments in the centre's time, segments in seconds. No patient's name."""
    choice = view.choice(datetime.now(UTC), _zone(request))
    with request.app.state.database.centre() as session:
        rows = turnaround.studies(session, choice, _MAX_EXPORT)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")  # RFC 4180
    facts = ("study_id", "study_instance_uid", "accession_number", "site", "modality", "priority")
    writer.writerow([*facts, *turnaround.POINTS, *(f"{name}_s" for name in turnaround.SEGMENTS)])
    for row in rows:
        moments = [local_minute(row[point], _zone(request)) for point in turnaround.POINTS]
        lengths = [_seconds(row[start], row[end]) for start, end in turnaround.SEGMENTS.values()]
        writer.writerow([*(spreadsheet_safe(str(row[fact])) for fact in facts), *moments, *lengths])
    headers = {
        "Content-Disposition": f'attachment; filename="yuanzhen-turnaround-{view.period}.csv"',
        "Cache-Control": "no-store",
    }
    # With a byte order mark a spreadsheet takes it for UTF-8.
    return Response("\ufeff" + out.getvalue(), headers=headers, media_type="text/csv; charset=utf-8")


def spreadsheet_safe(text: str) -> str:
    """Text that no spreadsheet takes for a formula (CWE-1236): a quote before what could start one."""
    return f"'{text}" if text.lstrip(" \u3000").startswith(_FORMULA_STARTS) else text


def _seconds(start: datetime | None, end: datetime | None) -> str:
    return "" if start is None or end is None else f"{(end - start).total_seconds():.0f}"


@router.get("/quality/studies/{study_id}")
def timeline_page(study_id: RowId, request: Request, person: Person = Depends(QUALITY)) -> Response:
    """Every event of a study, and whether their chain verifies."""
    language = language_of(request)
    with request.app.state.database.centre() as session:
        row = session.execute(
            sa.select(Study, Site).join(Site, Site.site_id == Study.site_id).where(Study.id == study_id)
        ).one_or_none()
        if row is None:
            raise NotFoundError("No such study")
        study, site = row
        events = session.scalars(sa.select(Event).where(Event.study_id == study_id).order_by(Event.sequence)).all()
        try:
            verified, broken = verify_chain(session, study_id), ""
        except IllegalTransitionError as error:
            verified, broken = 0, error.reason
        people = {f"account:{one}": name for one, name in session.execute(sa.select(Account.id, Account.display_name))}
        people |= {f"gateway:{one}": name for one, name in session.execute(sa.select(Gateway.id, Gateway.name))}
        people[SYSTEM] = t("timeline.value_system", language)
    steps = [
        {
            "event": event,
            "who": people.get(event.actor, event.actor),
            "since": (event.at - events[index - 1].at).total_seconds() if index else None,
            "states": [state_word(one, language) for one in (event.from_state, event.to_state) if one],
            "details": details_in_words(event.details, language, _zone(request)),
        }
        for index, event in enumerate(events)
    ]
    return page(
        request, "timeline.html", study=study, site=site, steps=steps, verified=verified, broken=broken,
        head=study.event_head.hex(),
    )  # fmt: skip
