"""When is a study all there? When every instance of the gateway's newest inventory is archived (lifecycle b).

Without an inventory (an old gateway, or one that died) silence decides: the clock calls `complete_quiet`. In the same
transaction as the completion the job that routes the study is written. A study that has no image of its own, because
all its bytes are archived under another patient, is held for a person: nobody can read it.
"""

from datetime import timedelta

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import Session

from storage import archive, jobs, transitions
from storage.database import Database
from storage.rows import Instance, Study, StudyInventory
from storage.states import Transition
from storage.transitions import SYSTEM
from storage.vocabulary import StudyState
from storage.wire import Inventory, ReceiptLine

ROUTE_QUEUE = "route"
ROUTE_ACTOR = "route_study"
_BATCH = 100


def record_inventory(session: Session, study: Study, inventory: Inventory, *, actor: str) -> list[ReceiptLine]:
    """Keep the inventory (the newest stands), complete the study if that is now so. Returns what is missing.

    The caller holds the study's row. A complete study of which more is announced is receiving again (lifecycle c).
    """
    lines = {archive.line_key(line.sop_instance_uid, line.sha256): line for line in inventory.instances}
    values = {"instances": dict.fromkeys(lines, 1), "received_at": sa.func.clock_timestamp()}
    session.execute(
        postgresql.insert(StudyInventory)
        .values(study_id=study.id, site_id=study.site_id, **values)
        .on_conflict_do_update(index_elements=[StudyInventory.study_id], set_=values)
    )
    session.execute(sa.update(Study).where(Study.id == study.id).values(expected_count=len(lines)))
    missing = archive.unanswered(session, study.id, lines)
    if missing and study.state is StudyState.COMPLETE:
        details = {"announced": len(missing)}
        transitions.move(session, Transition.STUDY_EXTENDED, study.id, actor=actor, details=details)
    elif not missing:
        check(session, study.id, actor=actor)
    return [line for key, line in lines.items() if key in missing]


def check(session: Session, study_id: int, *, actor: str) -> bool:
    """Complete a receiving study whose newest inventory is archived. Returns whether it was completed now.

    An inventory older than an instance it does not name is out of date: the gateway will send another.
    """
    state = session.execute(sa.select(Study.state).where(Study.id == study_id).with_for_update()).scalar_one()
    if state is not StudyState.RECEIVING:
        return False
    inventory = session.get(StudyInventory, study_id, populate_existing=True)
    if (
        inventory is None
        or _is_outdated(session, inventory)
        or archive.unanswered(session, study_id, inventory.instances)
    ):
        return False
    return _complete(session, study_id, actor=actor, why="inventory")


def _is_outdated(session: Session, inventory: StudyInventory) -> bool:
    later = sa.select(Instance.sop_instance_uid, Instance.sha256).where(
        Instance.study_id == inventory.study_id, Instance.archived_at > inventory.received_at
    )
    keys = {archive.line_key(uid, digest.hex()) for uid, digest in session.execute(later)}
    return not keys <= inventory.instances.keys()


def _complete(session: Session, study_id: int, *, actor: str, why: str) -> bool:
    study = session.execute(sa.select(Study.site_id, Study.instance_count).where(Study.id == study_id)).one()
    if not study.instance_count:
        archive.hold(session, study_id, actor=actor, details={"reason": "no image of its own"})
        return False
    details = {"by": why, "instances": study.instance_count}
    transitions.move(session, Transition.STUDY_COMPLETED, study_id, actor=actor, details=details)
    route(session, study.site_id, study_id)
    return True


def route(session: Session, site_id: int, study_id: int) -> None:
    """Have a complete study routed, again if something about it changed; in the caller's transaction."""
    jobs.enqueue(session, site_id=site_id, queue=ROUTE_QUEUE, actor=ROUTE_ACTOR, subject_id=study_id)


def complete_quiet(database: Database, quiet_s: float) -> int:
    """Complete studies that nothing arrived for since `quiet_s` seconds and whose gateway promises nothing more.

    A study with an inventory that is not yet archived in full is waited for, however long: the gateway has the rest.
    Returns how many were completed. Several clocks may call it at once.
    """
    completed = 0
    last_id = 0
    while True:
        with database.centre() as session:
            quiet = (
                sa.select(Study.id)
                .where(
                    Study.state == StudyState.RECEIVING,
                    Study.instance_count > 0,
                    Study.last_arrived_at < sa.func.clock_timestamp() - timedelta(seconds=quiet_s),
                    Study.id > last_id,
                )
                .order_by(Study.id)
                .limit(_BATCH)
                .with_for_update(skip_locked=True)
            )
            ids = session.scalars(quiet).all()
            for study_id in ids:
                inventory = session.get(StudyInventory, study_id)
                if inventory is None or not archive.unanswered(session, study_id, inventory.instances):
                    completed += _complete(session, study_id, actor=SYSTEM, why="quiet")
        if len(ids) < _BATCH:
            return completed
        last_id = ids[-1]
