"""Commit: a staged pack becomes archived instances and a signed receipt, once, however often it is asked for.

Order, and what a crash after each step leaves behind:

1. fetch and prove the staged bytes (nothing);
2. PUT the proved bytes and the sidecar under the final key, which names the digest and which no gateway can address
   (an object without rows: written again by the next commit);
3. rows, events, receipt and completeness in one transaction (a receipted pack whose staging object is still there);
4. remove the staging object.

So the same commit again repairs any crash, and two at once end in the same receipt: the transactions of step 3 of one
site come one after another, and the second finds the first one's receipt.
"""

import contextlib
from dataclasses import dataclass
from datetime import UTC

import sqlalchemy as sa
import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy.orm import Session

from routing import completion, staged
from routing.gateways import Caller
from routing.staged import FetchedPack, VerifiedInstance
from storage import archive, content, receipts, transitions
from storage.archive import NewInstance, StoredPack
from storage.database import Database
from storage.errors import (
    DigestMismatchError,
    MalformedDataSetError,
    NotFoundError,
    ObjectMissingError,
    ObjectStoreError,
)
from storage.objects import Objects
from storage.packs import PackEntry
from storage.rows import Case, Instance, Pack, Study, Upload
from storage.sidecar import Sidecar, pack_sidecar
from storage.states import Transition
from storage.vocabulary import CaseState, StudyState, UploadState
from storage.wire import Commit, CommitAnswer, PackPlan, Receipt, ReceiptLine

_LOG = structlog.get_logger()
_ATTEMPTS = 5
_MAX_COMPARED_BYTES = 512 * 1024 * 1024
"""Larger instances are not compared by content, which holds both in memory: they count as different."""

Known = frozenset[tuple[int, str, bytes, bool]]
"""(study, SOP Instance UID, SHA-256, is a variant) of the site's stored instances that have one of the pack's UIDs."""


@dataclass(frozen=True, slots=True)
class _Decision:
    """Which of a pack's instances are written, by what was known when it was made."""

    known: Known
    new: list[NewInstance]
    already_stored: int
    same_content: int


class Committer:
    """Verifies, archives and signs. Thread-safe; one per process."""

    def __init__(self, database: Database, objects: Objects, key: Ed25519PrivateKey) -> None:
        self._database = database
        self._objects = objects
        self._key = key

    def commit(self, caller: Caller, message: Commit) -> CommitAnswer:
        """Answer one commit. Raises NotFoundError for a pack that the caller's site did not offer, RetryableError where
        a server is away."""
        with self._database.county(caller.site_id) as session:
            upload, study = _load(session, caller.site_id, message)
            session.expunge_all()
        if upload.state is not UploadState.OFFERED:
            return self._settled(upload)
        plan = PackPlan.model_validate(upload.plan)
        with contextlib.ExitStack() as stack:
            try:
                pack = stack.enter_context(staged.fetched(self._objects, upload.staging_key, plan))
                instances = staged.verify(pack, plan, study)
            except ObjectMissingError:
                return self._reject(caller, upload, "Nothing was PUT under the pack's staging key, or it has expired")
            except (DigestMismatchError, MalformedDataSetError) as error:
                return self._reject(caller, upload, error.reason)
            return self._archive(caller, upload, study, plan, pack, instances)

    def _settled(self, upload: Upload) -> CommitAnswer:
        """The answer for a pack that is receipted or rejected; what it left under staging/ goes."""
        with contextlib.suppress(ObjectStoreError, ObjectMissingError):
            self._objects.delete(upload.staging_key)
        if upload.state is UploadState.RECEIPTED:
            return CommitAnswer(status="receipted", receipt=Receipt.model_validate(upload.receipt))
        return CommitAnswer(status="rejected", reason="The pack was rejected before: offer it again")

    def _reject(self, caller: Caller, upload: Upload, reason: str) -> CommitAnswer:
        """Lifecycle A, unless another commit came first."""
        with self._database.county(caller.site_id) as session:
            now = _reload(session, upload.id)
            if now.state is UploadState.OFFERED and now.staging_key == upload.staging_key:
                transitions.move(
                    session, Transition.UPLOAD_REJECTED, upload.id, actor=caller.actor, details={"reason": reason}
                )
                _LOG.warning("ingest.rejected", site_id=caller.site_id, upload_id=upload.id, reason=reason)
            elif now.state is UploadState.RECEIPTED:
                return self._settled(now)
        with contextlib.suppress(ObjectStoreError, ObjectMissingError):
            self._objects.delete(upload.staging_key)
        return CommitAnswer(status="rejected", reason=reason)

    def _archive(
        self,
        caller: Caller,
        upload: Upload,
        study: Study,
        plan: PackPlan,
        pack: FetchedPack,
        instances: list[VerifiedInstance],
    ) -> CommitAnswer:
        stored: StoredPack | None = None
        for attempt in range(_ATTEMPTS):
            decision = self._decide(study, pack, instances)
            if decision.new and stored is None:
                stored = self._write(caller, study, plan, pack, instances)
            try:
                with self._database.county(caller.site_id) as session:
                    settled = self._record(session, caller, upload, stored, decision, instances)
            except archive.ChangedMeanwhileError:
                if attempt + 1 == _ATTEMPTS:
                    raise
                continue
            return self._settled(settled)
        raise AssertionError("unreachable")

    def _decide(self, study: Study, pack: FetchedPack, instances: list[VerifiedInstance]) -> _Decision:
        """Sort instances into new, already stored, the same in another encoding, and variants (design §4.8).

        A UID whose first bytes are in another study (sent again under a corrected Study Instance UID) is no variant
        here: it would be shown to nobody.
        """
        with self._database.county(study.site_id) as session:
            stored = _stored(session, study.site_id, instances)
            keys = dict(
                session.execute(sa.select(Pack.id, Pack.pack_key).where(Pack.id.in_({row.pack_id for row in stored})))
                .tuples()
                .all()
            )
            session.expunge_all()
        new: list[NewInstance] = []
        already = same = 0
        for verified in instances:
            entry = verified.entry
            rows = [row for row in stored if row.sop_instance_uid == entry.facts.sop_instance_uid]
            here = [other for other in new if other.entry.facts.sop_instance_uid == entry.facts.sop_instance_uid]
            digest = bytes.fromhex(entry.facts.sha256)
            if any(row.sha256 == digest for row in rows) or any(
                other.entry.facts.sha256 == entry.facts.sha256 for other in here
            ):
                already += 1
            elif self._is_stored_otherwise(pack, entry, rows, here, keys):
                same += 1
            else:
                variant = bool(here) or any(row.study_id == study.id for row in rows)
                others = tuple(sorted({row.study_id for row in rows} - {study.id}))
                digests = verified.header_sha256, verified.pixel_sha256
                new.append(NewInstance(entry, verified.sidecar, *digests, variant, others))
        return _Decision(_known(stored), new, already, same)

    def _is_stored_otherwise(
        self,
        pack: FetchedPack,
        entry: PackEntry,
        rows: list[Instance],
        here: list[NewInstance],
        keys: dict[int, str],
    ) -> bool:
        """Whether one of the stored, or of this pack's earlier ones, says the same in another encoding."""
        if not (rows or here) or entry.length > _MAX_COMPARED_BYTES:
            return False
        mine = _content(_bytes_of(pack, entry), entry.facts.transfer_syntax_uid)
        if mine is None:
            return False
        for row in rows:
            if row.size_bytes > _MAX_COMPARED_BYTES:
                continue
            try:
                theirs = archive.read_bytes(self._objects, keys[row.pack_id], row)
            except (ObjectMissingError, DigestMismatchError):
                # What is stored is damaged: the sound bytes at hand must not be thrown away for it.
                _LOG.error("ingest.damaged", site_id=row.site_id, instance_id=row.id)
                continue
            if _content(memoryview(theirs), row.transfer_syntax_uid) == mine:
                return True
        return any(
            _content(_bytes_of(pack, other.entry), other.entry.facts.transfer_syntax_uid) == mine for other in here
        )

    def _write(
        self, caller: Caller, study: Study, plan: PackPlan, pack: FetchedPack, instances: list[VerifiedInstance]
    ) -> StoredPack:
        # The digest is in the key: a slow commit of an older plan of this pack id cannot overwrite a newer one.
        # The study is named by its row: its UID is another's text, which a store may take for a path.
        stem = f"packs/{caller.site_code}/{study.id}/{plan.pack_id}-{plan.sha256[:16]}"
        sidecar = pack_sidecar(Sidecar(instances=[verified.sidecar for verified in instances]))
        pack.file.seek(0)
        self._objects.put(f"{stem}.pack", pack.file, plan.size_bytes)
        self._objects.put(f"{stem}.sidecar", sidecar)
        return StoredPack(f"{stem}.pack", f"{stem}.sidecar", plan.size_bytes, plan.sha256)

    def _record(
        self,
        session: Session,
        caller: Caller,
        upload: Upload,
        stored: StoredPack | None,
        decision: _Decision,
        instances: list[VerifiedInstance],
    ) -> Upload:
        """Step 3. Returns the upload as it is now. Raises ChangedMeanwhileError if the decision is out of date."""
        others = {study_id for new in decision.new for study_id in new.other_studies}
        _take_turns(session, caller.site_id, others | {upload.study_id})
        now = _reload(session, upload.id)
        if now.state is not UploadState.OFFERED or now.staging_key != upload.staging_key:
            return now
        if _known(_stored(session, caller.site_id, instances)) != decision.known:
            raise archive.ChangedMeanwhileError("Another commit stored one of these instances first")
        study = session.get_one(Study, upload.study_id, populate_existing=True)
        if decision.new and stored is not None:
            _add(session, caller, study, stored, decision.new)
        _hold_contradictions(session, caller, study.id, instances)
        receipt = self._receipt(session, caller, upload.pack_id, instances)
        details = {
            "new": len(decision.new),
            "already_stored": decision.already_stored,
            "same_content": decision.same_content,
            "bytes": sum(new.entry.length for new in decision.new),
        }
        transitions.move(
            session,
            Transition.UPLOAD_RECEIPTED,
            upload.id,
            actor=caller.actor,
            details=details,
            values={"receipt": receipt.model_dump(mode="json")},
        )
        completion.check(session, study.id, actor=caller.actor)
        return _reload(session, upload.id)

    def _receipt(self, session: Session, caller: Caller, pack_id: str, instances: list[VerifiedInstance]) -> Receipt:
        facts = [verified.entry.facts for verified in instances]
        lines = [ReceiptLine(sop_instance_uid=fact.sop_instance_uid, sha256=fact.sha256) for fact in facts]
        return signed_receipt(session, self._key, caller.site_code, pack_id, lines)


def signed_receipt(
    session: Session, key: Ed25519PrivateKey, site_code: str, pack_id: str, lines: list[ReceiptLine]
) -> Receipt:
    """The centre's word that it has these instances."""
    now = session.execute(sa.select(sa.func.clock_timestamp())).scalar_one().astimezone(UTC)
    unsigned = Receipt(site=site_code, pack_id=pack_id, instances=tuple(lines), archived_at=now, key_id="")
    return receipts.sign(unsigned, key)


def _load(session: Session, site_id: int, message: Commit) -> tuple[Upload, Study]:
    row = session.execute(
        sa.select(Upload, Study)
        .join(Study, Study.id == Upload.study_id)
        .where(
            Upload.site_id == site_id,
            Upload.pack_id == message.pack_id,
            Study.study_instance_uid == message.study_instance_uid,
        )
    ).one_or_none()
    if row is None:
        raise NotFoundError("No such pack was offered")
    return row[0], row[1]


def _take_turns(session: Session, site_id: int, study_ids: set[int]) -> None:
    """Wait for the site's other commits, of whose instances this one must know; then lock the studies, in id order."""
    turn = sa.func.hashtextextended(f"commit {site_id}", 0)
    session.execute(sa.select(sa.func.pg_advisory_xact_lock(turn)))
    session.execute(sa.select(Study.id).where(Study.id.in_(study_ids)).order_by(Study.id).with_for_update())


def _reload(session: Session, upload_id: int) -> Upload:
    """The upload as it is now, its study's row locked first (lock order)."""
    study_id = sa.select(Upload.study_id).where(Upload.id == upload_id).scalar_subquery()
    session.execute(sa.select(Study.id).where(Study.id == study_id).with_for_update())
    return session.get_one(Upload, upload_id, populate_existing=True, with_for_update=True)


def _stored(session: Session, site_id: int, instances: list[VerifiedInstance]) -> list[Instance]:
    uids = {verified.entry.facts.sop_instance_uid for verified in instances}
    query = sa.select(Instance).where(Instance.site_id == site_id, Instance.sop_instance_uid.in_(uids))
    return list(session.scalars(query.order_by(Instance.is_variant, Instance.id)))


def _known(rows: list[Instance]) -> Known:
    return frozenset((row.study_id, row.sop_instance_uid, row.sha256, row.is_variant) for row in rows)


def _bytes_of(pack: FetchedPack, entry: PackEntry) -> memoryview:
    return pack.view[entry.offset : entry.offset + entry.length]


def _content(data: memoryview, transfer_syntax_uid: str) -> tuple[str, str] | None:
    """What a data set says, or None where it cannot be read: then only equal bytes are equal."""
    try:
        return content.content_digests(data, transfer_syntax_uid)
    except MalformedDataSetError:
        return None


def _add(session: Session, caller: Caller, study: Study, stored: StoredPack, new: list[NewInstance]) -> None:
    """Rows of the new instances, and what more images mean for a study that was complete, or being read."""
    ids = archive.add_pack(session, study, stored, new)
    differing = {one.entry.facts.sha256: one.other_studies for one in new if one.is_variant or one.other_studies}
    if differing:
        archive.flag_variants(session, {study.id}.union(*differing.values()))
    for one in new:
        if one.entry.facts.sha256 in differing:
            transitions.note(
                session,
                study.id,
                "instance.variant",
                subject="instance",
                subject_id=ids[one.entry.facts.sha256],
                actor=caller.actor,
                details={
                    "sop_instance_uid": one.entry.facts.sop_instance_uid,
                    "is_variant": one.is_variant,
                    "other_studies": list(one.other_studies),
                },
            )
        if one.sidecar.note:
            _LOG.warning("ingest.note", site_id=study.site_id, instance_id=ids[one.entry.facts.sha256])
    if study.state is StudyState.COMPLETE:
        details = {"new": len(new)}
        transitions.move(session, Transition.STUDY_EXTENDED, study.id, actor=caller.actor, details=details)
    case = session.execute(
        sa.select(Case.id, Case.state, Case.new_images).where(Case.study_id == study.id)
    ).one_or_none()
    if case is None:
        return
    if case.state is CaseState.REPORTED:
        values = {"new_images": True, "claimed_by": None, "lease_token": None, "lease_expires_at": None}
        transitions.move(session, Transition.CASE_REOPENED, case.id, actor=caller.actor, values=values)
    elif case.state is CaseState.CLAIMED and not case.new_images:
        session.execute(sa.update(Case).where(Case.id == case.id).values(new_images=True))
        transitions.note(
            session, study.id, "case.new_images", subject="reading_case", subject_id=case.id, actor=caller.actor
        )


def _hold_contradictions(session: Session, caller: Caller, study_id: int, instances: list[VerifiedInstance]) -> None:
    """A data set that names another patient or study than its offer: kept, and the study is held for a person."""
    attributes = sorted({verified.contradicts for verified in instances} - {""})
    if attributes:
        details = {"reason": "data set contradicts its offer", "attributes": attributes}
        archive.hold(session, study_id, actor=caller.actor, details=details)
