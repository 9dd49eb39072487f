"""The gateways' API: offer, commit, inventory, heartbeat (storage/wire.py, design §5).

Who may call: an enrolled gateway, by its client certificate, and only for its own site: every row is read and written
in the site's scope (row-level security), so another hospital's pack, study or report is not found. Messages are
validated by their models; what they say is checked again where it is used.
"""

import asyncio
import secrets
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from threading import RLock
from typing import Any

import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fastapi import APIRouter, Request
from sqlalchemy.orm import Session

from routing import completion
from routing.commit import Committer, signed_receipt
from routing.gateways import Caller, CallingGateway
from storage import archive, transitions
from storage.errors import IllegalTransitionError, PermanentError
from storage.objects import Objects
from storage.patients import may_be_same_patient
from storage.rows import Gateway, Instance, Study, Upload
from storage.states import Transition
from storage.vocabulary import StudyState, UploadState
from storage.wire import (
    WIRE_VERSION,
    Commit,
    CommitAnswer,
    Heartbeat,
    HeartbeatAnswer,
    Inventory,
    InventoryAnswer,
    Offer,
    OfferAnswer,
    PackPlan,
    PutOrder,
    Receipt,
    ReceiptLine,
)

MAX_BODY_BYTES = 32 * 1024 * 1024
"""An inventory of 100,000 instances is about 15 MB."""
COMMIT_WAIT_S = 20.0
"""A commit that takes longer is answered `verifying`: below the patience of proxies and of the gateway's client."""
_COMMIT_THREADS = 4
_MAX_OFFSET_MS = 2**31 - 1

router = APIRouter(prefix="/gateway/v1")


class Commits:
    """Commits being worked on: the same pack asked for twice waits for one piece of work, and no request holds a
    thread while it waits."""

    def __init__(self, committer: Committer) -> None:
        self._committer = committer
        self._pool = ThreadPoolExecutor(_COMMIT_THREADS, thread_name_prefix="commit")
        self._running: dict[tuple[int, str], Future[CommitAnswer]] = {}
        self._lock = RLock()  # a future that is done already calls `_forget` from within `answer`

    async def answer(self, caller: Caller, message: Commit, wait_s: float) -> CommitAnswer:
        """The committer's answer, or `verifying` if it is not there after `wait_s`. Raises as `Committer.commit`."""
        key = (caller.site_id, message.pack_id)
        with self._lock:
            work = self._running.get(key)
            if work is None:
                work = self._running[key] = self._pool.submit(self._committer.commit, caller, message)
                work.add_done_callback(lambda _: self._forget(key))
        finished = asyncio.Event()
        loop = asyncio.get_running_loop()
        work.add_done_callback(lambda _: loop.is_closed() or loop.call_soon_threadsafe(finished.set))
        try:
            await asyncio.wait_for(finished.wait(), wait_s)
        except TimeoutError:
            return CommitAnswer(status="verifying", retry_after_s=1.0)
        return CommitAnswer(status="verifying") if work.cancelled() else work.result()

    def _forget(self, key: tuple[int, str]) -> None:
        with self._lock:
            self._running.pop(key, None)

    def close(self) -> None:
        """Wait for what is running; what is not begun is asked for again by its gateway."""
        self._pool.shutdown(wait=True, cancel_futures=True)


@router.post("/offer")
def offer(message: Offer, caller: CallingGateway, request: Request) -> OfferAnswer:
    """What the centre lacks of an offer, with a presigned PUT for each pack. By an enrolled gateway, for its site."""
    state = request.app.state
    with state.database.county(caller.site_id) as session:
        return answer_offer(
            session, state.objects, state.receipt_key, caller, message, life_s=state.settings.staging_url_life_s
        )


@router.post("/commit")
async def commit(message: Commit, caller: CallingGateway, request: Request) -> CommitAnswer:
    """Verify, archive and sign for a pack that was PUT. By an enrolled gateway, for a pack of its site (else 404)."""
    commits: Commits = request.app.state.commits
    return await commits.answer(caller, message, COMMIT_WAIT_S)


@router.post("/inventory")
def inventory(message: Inventory, caller: CallingGateway, request: Request) -> InventoryAnswer:
    """What is missing of a study that went quiet. By an enrolled gateway, for its site's studies. A study the site has
    not offered misses all it lists, which makes the gateway offer it."""
    with request.app.state.database.county(caller.site_id) as session:
        study = _study_of(session, caller.site_id, message)
        if study is None:
            return InventoryAnswer(complete=False, missing=message.instances)
        missing = completion.record_inventory(session, study, message, actor=caller.actor)
        return InventoryAnswer(complete=not missing, missing=tuple(missing))


@router.post("/heartbeat")
def heartbeat(message: Heartbeat, caller: CallingGateway, request: Request) -> HeartbeatAnswer:
    """Keep the gateway's state of health and clock offset; give the centre's time. By an enrolled gateway."""
    with request.app.state.database.county(caller.site_id) as session:
        return HeartbeatAnswer(centre_time=_record_heartbeat(session, caller, message))


def check_offer(offer: Offer) -> dict[str, str]:
    """SOP Instance UID by SHA-256. Raises PermanentError where the message contradicts itself."""
    if offer.wire_version > WIRE_VERSION:
        raise PermanentError(f"Wire version {offer.wire_version} is newer than this centre's {WIRE_VERSION}")
    uids = {facts.sha256: facts.sop_instance_uid for facts in offer.instances}
    sizes = {facts.sha256: facts.size_bytes for facts in offer.instances}
    if len(uids) != len(offer.instances):
        raise PermanentError("One digest is offered for two instances")
    if max(Counter(pack.pack_id for pack in offer.packs).values()) > 1:
        raise PermanentError("One pack id is used twice")
    for pack in offer.packs:
        unknown = set(pack.digests) - uids.keys()
        if unknown or len(set(pack.digests)) != len(pack.digests):
            raise PermanentError(
                f"Pack {pack.pack_id} carries {len(unknown)} instances that are not offered, or one twice"
            )
        if pack.size_bytes < sum(sizes[digest] for digest in pack.digests):
            raise PermanentError(f"Pack {pack.pack_id} is smaller than the instances it carries")
    return uids


def answer_offer(
    session: Session, objects: Objects, key: Ed25519PrivateKey, caller: Caller, offer: Offer, *, life_s: int
) -> OfferAnswer:
    """Announce the study if it is new; for each pack a PUT order, or the receipt if all of it is archived.

    In the caller's transaction and scope. Raises PermanentError for an offer that contradicts itself.
    """
    uids = check_offer(offer)
    study = archive.open_study(
        session, caller.site_id, offer.study, actor=caller.actor, clock_offset_ms=caller.clock_offset_ms
    )
    raised = archive.raise_priority(session, study, offer.study.priority, actor=caller.actor)
    if raised and study.state is StudyState.COMPLETE:
        completion.route(session, caller.site_id, study.id)
    stored = sa.select(Instance.sha256).where(
        Instance.site_id == caller.site_id,
        Instance.sop_instance_uid.in_(set(uids.values())),
        Instance.sha256.in_([bytes.fromhex(digest) for digest in uids]),
    )
    archived = {digest.hex() for digest in session.scalars(stored)}
    puts: list[PutOrder] = []
    done: list[Receipt] = []
    for plan in offer.packs:
        upload = _open_upload(session, caller, study, plan)
        if upload.state is not UploadState.RECEIPTED and archived.issuperset(plan.digests):
            lines = [ReceiptLine(sop_instance_uid=uids[digest], sha256=digest) for digest in plan.digests]
            _settle_archived(
                session, caller, upload, signed_receipt(session, key, caller.site_code, plan.pack_id, lines)
            )
        if upload.state is UploadState.RECEIPTED:
            done.append(Receipt.model_validate(upload.receipt))
            continue
        expires_at = datetime.now(UTC) + timedelta(seconds=life_s)
        url = objects.presigned_put(upload.staging_key, life_s)
        puts.append(PutOrder(pack_id=plan.pack_id, url=url, expires_at=expires_at))
    return OfferAnswer(puts=tuple(puts), receipts=tuple(done))


def _open_upload(session: Session, caller: Caller, study: Study, plan: PackPlan) -> Upload:
    """The upload row of an offered pack, locked: new, as it stands, or open again (lifecycle B).

    The same plan keeps its staging key, so that a PUT made before a restart still counts; another plan gets a new
    key. Raises IllegalTransitionError if the pack id stands for something else already.
    """
    wanted = plan.model_dump(mode="json")
    upload = session.scalars(
        sa.select(Upload)
        .where(Upload.site_id == caller.site_id, Upload.pack_id == plan.pack_id)
        .execution_options(populate_existing=True)
        .with_for_update()
    ).one_or_none()
    if upload is None:
        upload = Upload(
            site_id=caller.site_id,
            study_id=study.id,
            gateway_id=caller.gateway_id,
            pack_id=plan.pack_id,
            staging_key=_staging_key(caller, plan),
            plan=wanted,
            state=UploadState.OFFERED,
        )
        session.add(upload)
        session.flush()
        return upload
    same = upload.plan == wanted
    if upload.study_id != study.id or (upload.state is UploadState.RECEIPTED and not same):
        raise IllegalTransitionError(f"Pack {plan.pack_id} was offered before, for something else")
    if upload.state is UploadState.RECEIPTED:
        return upload
    renewed: dict[str, Any] = {
        "plan": wanted,
        "attempts": upload.attempts + 1,
        "gateway_id": caller.gateway_id,
        "offered_at": sa.func.clock_timestamp(),
    }
    if not same or upload.state is UploadState.REJECTED:
        renewed["staging_key"] = _staging_key(caller, plan)
    if upload.state is UploadState.REJECTED:
        transitions.move(session, Transition.UPLOAD_RENEWED, upload.id, actor=caller.actor, values=renewed)
    else:
        session.execute(sa.update(Upload).where(Upload.id == upload.id).values(renewed))
    session.refresh(upload)
    return upload


def _staging_key(caller: Caller, plan: PackPlan) -> str:
    return f"staging/{caller.site_code}/{plan.pack_id}-{secrets.token_hex(8)}"


def _settle_archived(session: Session, caller: Caller, upload: Upload, receipt: Receipt) -> None:
    """All of the pack is archived, from an earlier pack: no byte need travel (`AlreadyStored`)."""
    details = {"new": 0, "already_stored": len(receipt.instances), "same_content": 0, "bytes": 0}
    transitions.move(
        session,
        Transition.UPLOAD_RECEIPTED,
        upload.id,
        actor=caller.actor,
        details=details,
        values={"receipt": receipt.model_dump(mode="json")},
    )
    session.refresh(upload)


def _study_of(session: Session, site_id: int, message: Inventory) -> Study | None:
    """The row an inventory is about, locked: by patient, where the Study Instance UID has several. Of those that it may
    be (an older gateway says the Patient ID alone) it is the one whose instances these are."""
    rows = archive.studies_of(session, site_id, message.study_instance_uid, lock=True)
    if len(rows) == 1 and not message.patient_id:
        return rows[0]
    texts = ("patient_id", "issuer_of_patient_id", "patient_name", "patient_birth_date", "patient_sex")
    message = message.model_copy(update={name: archive.clean(getattr(message, name)) for name in texts})
    rows = [row for row in rows if may_be_same_patient(row, message)]
    if len(rows) < 2:
        return rows[0] if rows else None
    keys = [archive.line_key(line.sop_instance_uid, line.sha256) for line in message.instances]
    return min(rows, key=lambda row: len(archive.unanswered(session, row.id, keys)))


def _record_heartbeat(session: Session, caller: Caller, message: Heartbeat) -> datetime:
    """Returns the centre's time. Running out of space at the gateway is an event, once for each time it begins."""
    now: datetime = session.execute(sa.select(sa.func.clock_timestamp())).scalar_one()
    gateway = session.get_one(Gateway, caller.gateway_id, with_for_update=True)
    sent_at = message.sent_at if message.sent_at.tzinfo else message.sent_at.replace(tzinfo=UTC)
    offset_ms = round((sent_at - now).total_seconds() * 1000)
    was_out = bool((gateway.heartbeat or {}).get("out_of_space"))
    if message.out_of_space != was_out:
        name = "gateway.out_of_space" if message.out_of_space else "gateway.space_again"
        transitions.note_outside_study(
            session, caller.site_id, name, subject="gateway", subject_id=gateway.id, actor=caller.actor
        )
    gateway.last_heartbeat_at = now
    gateway.heartbeat = message.model_dump(mode="json")
    gateway.clock_offset_ms = max(-_MAX_OFFSET_MS, min(_MAX_OFFSET_MS, offset_ms))
    session.flush()
    return now
