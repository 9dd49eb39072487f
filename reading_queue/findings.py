"""What a reader may see of triage: positive findings of active runs, and never a reassuring normal (design §6).

A shadow run is not here at all. That a model found nothing is not shown either: it would be read as "normal".
"""

from collections.abc import Iterable
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.orm import Session

from storage.rows import TriageRun
from storage.vocabulary import RunMode, RunState


@dataclass(frozen=True, slots=True)
class ShownFinding:
    """One flag: the finding, how sure, by which model, how much earlier it made the case due."""

    run_id: int
    model: str  # name and version
    text_zh: str
    text_en: str
    probability: float
    minutes_earlier: int
    has_heat_map: bool


def shown_findings(session: Session, case_ids: Iterable[int]) -> dict[int, list[ShownFinding]]:
    """Flags of each case, surest first, from each model's newest run."""
    newest_first = (
        sa.select(TriageRun)
        .where(
            TriageRun.case_id.in_(list(case_ids)),
            TriageRun.state == RunState.DONE,
            TriageRun.mode == RunMode.ACTIVE,
        )
        .order_by(TriageRun.study_version.desc(), TriageRun.id.desc())
    )
    shown: dict[int, list[ShownFinding]] = {}
    seen: set[tuple[int, str]] = set()
    for run in session.scalars(newest_first):
        if (run.case_id, run.model_name) in seen:
            continue
        seen.add((run.case_id, run.model_name))
        for finding in run.findings:
            if finding["positive"]:
                one = ShownFinding(
                    run_id=run.id,
                    model=f"{run.model_name} {run.model_version}",
                    text_zh=finding["text_zh"],
                    text_en=finding["text_en"],
                    probability=finding["probability"],
                    minutes_earlier=finding["minutes_earlier"],
                    has_heat_map=run.heat_map_key is not None,
                )
                shown.setdefault(run.case_id, []).append(one)
    for flags in shown.values():
        flags.sort(key=lambda flag: -flag.probability)
    return shown
