"""Carries what is kept to the centre: offer, PUT, commit, verified receipt; then the inventory of a study gone quiet.

This is the one place that retries on the way up, and it never gives up (design §4.5): after a link error with full
jitter up to `retry_ceiling_s`, after a refusal every `refused_retry_s`, with a row in the quarantine until it passes.
A pack that the centre fails on (HTTP 500) again and again counts as refused, so that it does not hold up the others.
Where a pack stands is in its row, so a restart goes on with the pack, not with the study:

    planned --offer, PUT--> put --commit--> receipted
       ^                     |
       +-- rejected, unknown-+        refused (from either): instances are packed and offered again later

Only a receipt that verifies, for this site, and names UID and digest marks an instance as archived (design §4.4).
"""

import random
import sqlite3
import threading
import time
from collections.abc import Callable

import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from dicom_gateway.client import CentreClient, CentreFaultError
from dicom_gateway.packer import Packer
from dicom_gateway.quarantine import note_quarantine, now
from dicom_gateway.settings import GatewaySettings
from dicom_gateway.spool import Spool
from storage import receipts
from storage.errors import (
    LinkError,
    NotFoundError,
    PermanentError,
    RetryableError,
    SignatureInvalidError,
    YuanzhenError,
)
from storage.vocabulary import Lane
from storage.wire import Commit, InstanceFacts, Inventory, Offer, PackPlan, Receipt, ReceiptLine, StudyFacts

log = structlog.get_logger(__name__)

_IDLE_S = 0.5
"""How long a sender without work waits, unless the planner wakes it: what waits for its time is seen this late."""
_PLAN_S = 0.2
"""How long the planner waits, unless an arrival wakes it: a series gone quiet is seen this late."""
_VERIFYING_PATIENCE_S = 120.0
"""After this long in `verifying` the thread turns to another pack; the commit is asked again later."""
_INVENTORY_BATCH = 20


_FAULTS_BEFORE_REFUSED = 8
"""Failures of the centre on one pack before it waits as a refused one does: about a minute, a restart of the centre."""


class RejectedPackError(RetryableError):
    """The centre could not verify the pack's bytes: offer it again."""


def backoff_s(tries: int, base_s: float, ceiling_s: float, retry_after_s: float | None = None) -> float:
    """Full jitter: uniform in (0, min(ceiling, base · 2^tries)), but not before Retry-After, under the same ceiling."""
    wait_s = random.uniform(0, min(ceiling_s, base_s * 2 ** min(tries, 30)))  # noqa: S311 - spreads load, no secret
    return max(wait_s, min(retry_after_s or 0.0, ceiling_s))


class Uplink:
    """Starts its threads with `start()`, ends them with `stop()`."""

    def __init__(
        self, settings: GatewaySettings, spool: Spool, client: CentreClient, receipt_key: Ed25519PublicKey
    ) -> None:
        self._settings = settings
        self._spool = spool
        self._client = client
        self._key = receipt_key
        self._packer = Packer(settings, spool)
        self._stop = threading.Event()
        self._planned = threading.Condition()
        self._taken: set[str] = set()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begin to send."""
        work: list[tuple[str, Callable[[], bool]]] = [("planner", self._plan), ("inventory", self._announce)]
        work += [(f"sender-{number}", self._send_one) for number in range(self._settings.uplink_threads)]
        for name, step in work:
            thread = threading.Thread(target=self._run, args=(step,), name=name, daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self, timeout_s: float = 10.0) -> None:
        """Ask the threads to end and wait; what is cut short goes on after the next start."""
        self._stop.set()
        self._spool.arrived.set()
        with self._planned:
            self._planned.notify_all()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def retry_now(self) -> None:
        """On a person's command: all that waits for its time is tried at once, refused packs too."""

        def forget_times(connection: sqlite3.Connection) -> None:
            connection.execute("UPDATE pack SET next_try_at_s = 0 WHERE state <> 'receipted'")
            connection.execute(
                "UPDATE study SET inventory_due_at_s = 0 WHERE complete_at IS NULL AND inventory_tries > 0"
            )

        self._spool.ledger.write(forget_times)
        self._spool.arrived.set()

    def _run(self, step: Callable[[], bool]) -> None:
        """Repeat a step that says whether there was work. No trouble ends the thread."""
        while not self._stop.is_set():
            try:
                worked = step()
            except RetryableError as error:
                log.warning("uplink.waits", reason=error.reason)
                self._stop.wait(1.0)
                continue
            except Exception:  # the edge of the thread: a mistake of ours must not end the uplink in silence
                log.exception("uplink.step_failed")
                self._stop.wait(5.0)
                continue
            if not worked:
                with self._planned:
                    if not self._stop.is_set():
                        self._planned.wait(_IDLE_S)

    # Planning

    def _plan(self) -> bool:
        self._spool.arrived.wait(_PLAN_S)
        self._spool.arrived.clear()
        if self._packer.plan():
            with self._planned:
                self._planned.notify_all()
        return True  # it has done its waiting

    # Sending

    def _send_one(self) -> bool:
        pack = self._take()
        if pack is None:
            return False
        try:
            self._send(pack)
        except PermanentError as error:
            self._refused(pack, error)
        except CentreFaultError as error:
            if pack["centre_faults"] + 1 >= _FAULTS_BEFORE_REFUSED:
                self._refused(pack, error)
            else:
                self._later(pack, error, faults=1)
        except YuanzhenError as error:
            self._later(pack, error)
        finally:
            with self._planned:
                self._taken.discard(pack["pack_id"])
            self._spool.arrived.set()
        return True

    def _take(self) -> sqlite3.Row | None:
        """The open pack whose turn it is: highest lane, then oldest; one thread a pack."""
        with self._planned:
            for row in self._spool.ledger.rows(
                "SELECT p.*, s.facts, s.lane, s.study_instance_uid FROM pack p JOIN study s ON s.id = p.study_id"
                " WHERE p.state IN ('planned', 'put') AND p.next_try_at_s <= ?"
                " ORDER BY s.lane_rank, p.planned_at_s LIMIT ?",
                time.time(),
                self._settings.uplink_threads + 1,
            ):
                if row["pack_id"] not in self._taken:
                    self._taken.add(row["pack_id"])
                    return row
        return None

    def _send(self, pack: sqlite3.Row) -> None:
        instances = [
            InstanceFacts.model_validate_json(row["facts"])
            for row in self._spool.ledger.rows(
                "SELECT facts FROM instance WHERE pack_id = ? ORDER BY id", pack["pack_id"]
            )
        ]
        if pack["state"] == "planned":
            signed = self._offer_and_put(pack, instances)
            if signed:
                self._receipted(pack, instances, signed)
                return
            self._spool.ledger.execute("UPDATE pack SET state = 'put' WHERE pack_id = ?", pack["pack_id"])
        try:
            receipt = self._commit(pack)
        except (RejectedPackError, NotFoundError) as error:
            # Rejected: the bytes were hurt on the way, or here. Unknown: the centre was set back. Both: offer again.
            self._spool.ledger.execute("UPDATE pack SET state = 'planned' WHERE pack_id = ?", pack["pack_id"])
            raise RejectedPackError(error.reason) from error
        self._receipted(pack, instances, [receipt])

    def _offer_and_put(self, pack: sqlite3.Row, instances: list[InstanceFacts]) -> list[Receipt]:
        """Receipts, if the centre has it all; otherwise the pack is in the store and the list is empty."""
        plan = PackPlan(
            pack_id=pack["pack_id"],
            size_bytes=pack["size_bytes"],
            sha256=pack["sha256"],
            digests=tuple(instance.sha256 for instance in instances),
        )
        study = StudyFacts.model_validate_json(pack["facts"])
        answer = self._client.offer(
            Offer(lane=Lane(pack["lane"]), study=study, instances=tuple(instances), packs=(plan,))
        )
        order = next((order for order in answer.puts if order.pack_id == pack["pack_id"]), None)
        if order is not None:
            self._client.put_pack(order, self._spool.pack_path(pack["pack_id"]))
            return []
        if not answer.receipts:
            raise LinkError("The centre neither asked for the pack nor signed for it")
        return list(answer.receipts)

    def _commit(self, pack: sqlite3.Row) -> Receipt:
        commit = Commit(study_instance_uid=pack["study_instance_uid"], pack_id=pack["pack_id"])
        deadline = time.monotonic() + _VERIFYING_PATIENCE_S
        while True:
            answer = self._client.commit(commit)
            if answer.status == "rejected":
                raise RejectedPackError(f"The centre rejected the pack: {answer.reason}")
            if answer.status == "receipted":
                if answer.receipt is None:
                    raise LinkError("The centre says receipted and gives no receipt")
                return answer.receipt
            if time.monotonic() > deadline or self._stop.wait(min(max(answer.retry_after_s, 0.05), 30.0)):
                raise LinkError("The centre is still verifying the pack")

    def _receipted(self, pack: sqlite3.Row, instances: list[InstanceFacts], signed: list[Receipt]) -> None:
        """Check the receipts and, in one transaction, mark what they name. Raises SignatureInvalidError."""
        named: set[tuple[str, str]] = set()
        for receipt in signed:
            receipts.verify(receipt, self._key, site=self._settings.site)
            named |= {(line.sop_instance_uid, line.sha256) for line in receipt.instances}
        missing = sum((one.sop_instance_uid, one.sha256) not in named for one in instances)
        if missing:
            raise SignatureInvalidError(
                f"The receipt does not name {missing} of {len(instances)} instances of the pack"
            )
        proof = "[" + ",".join(receipt.model_dump_json() for receipt in signed) + "]"

        def mark(connection: sqlite3.Connection) -> None:
            at = now()
            connection.execute(
                "UPDATE instance SET archived_at = ?, archived_at_s = ? WHERE pack_id = ?",
                (at.isoformat(), at.timestamp(), pack["pack_id"]),
            )
            connection.execute(
                "UPDATE pack SET state = 'receipted', receipt = ?, last_error = '' WHERE pack_id = ?",
                (proof, pack["pack_id"]),
            )
            connection.execute(
                "UPDATE study SET inventory_due_at_s = min(inventory_due_at_s, max(?, last_received_at_s + ?))"
                " WHERE id = ?",
                (at.timestamp(), self._settings.quiet_s, pack["study_id"]),
            )
            connection.execute(
                "UPDATE quarantine SET resolved_at = ? WHERE kind = 'refused_by_centre' AND subject = ?"
                " AND resolved_at IS NULL",
                (at.isoformat(), pack["study_instance_uid"]),
            )

        self._spool.ledger.write(mark)
        self._spool.pack_path(pack["pack_id"]).unlink(missing_ok=True)
        log.info(
            "uplink.receipted", pack_id=pack["pack_id"], study_id=pack["study_id"],
            instances=len(instances), size_bytes=pack["size_bytes"], tries=pack["tries"],
        )  # fmt: skip

    def _later(self, pack: sqlite3.Row, error: YuanzhenError, faults: int = 0) -> None:
        settings = self._settings
        wait_s = backoff_s(
            pack["tries"], settings.retry_base_s, settings.retry_ceiling_s, getattr(error, "retry_after_s", None)
        )
        self._spool.ledger.execute(
            "UPDATE pack SET tries = tries + 1, centre_faults = centre_faults + ?, next_try_at_s = ?, last_error = ?"
            " WHERE pack_id = ?",
            faults,
            time.time() + wait_s,
            error.reason,
            pack["pack_id"],
        )
        log.warning(
            "uplink.retry", pack_id=pack["pack_id"], tries=pack["tries"] + 1,
            wait_s=round(wait_s, 2), reason=error.reason,
        )  # fmt: skip
        if isinstance(error, RejectedPackError) and not self._spool.is_whole_pack(pack["pack_id"], pack["sha256"]):
            self._spool.release_pack(pack["pack_id"])  # it was hurt here: build it again

    def _refused(self, pack: sqlite3.Row, error: YuanzhenError) -> None:
        """Show it, keep it, ask again later. The file goes: it is built again from the instances."""

        def refuse(connection: sqlite3.Connection) -> None:
            connection.execute(
                "UPDATE pack SET state = 'refused', tries = tries + 1, next_try_at_s = ?, last_error = ?"
                " WHERE pack_id = ?",
                (time.time() + self._settings.refused_retry_s, error.reason, pack["pack_id"]),
            )
            note_quarantine(
                connection, kind="refused_by_centre", subject=pack["study_instance_uid"], reason=error.reason,
                size_bytes=pack["size_bytes"],
            )  # fmt: skip

        self._spool.ledger.write(refuse)
        self._spool.pack_path(pack["pack_id"]).unlink(missing_ok=True)
        log.error("uplink.refused", pack_id=pack["pack_id"], reason=error.reason)

    # Inventory

    def _announce(self) -> bool:
        due = self._spool.ledger.rows(
            "SELECT * FROM study WHERE complete_at IS NULL AND inventory_due_at_s <= ? ORDER BY lane_rank,"
            " inventory_due_at_s LIMIT ?",
            time.time(),
            _INVENTORY_BATCH,
        )
        for study in due:
            if self._stop.is_set():
                break
            self._announce_study(study)
        return bool(due)

    def _announce_study(self, study: sqlite3.Row) -> None:
        lines = self._spool.ledger.rows("SELECT * FROM instance WHERE study_id = ? ORDER BY id", study["id"])
        facts = StudyFacts.model_validate_json(study["facts"])
        settings, wait_s = self._settings, None
        try:
            answer = self._client.inventory(
                Inventory(
                    study_instance_uid=facts.study_instance_uid,
                    patient_id=facts.patient_id,
                    issuer_of_patient_id=facts.issuer_of_patient_id,
                    patient_name=facts.patient_name,
                    patient_birth_date=facts.patient_birth_date,
                    patient_sex=facts.patient_sex,
                    instances=tuple(
                        ReceiptLine(sop_instance_uid=row["sop_instance_uid"], sha256=row["sha256"]) for row in lines
                    ),
                    quiet_since=InstanceFacts.model_validate_json(lines[-1]["facts"]).received_at,
                )
            )
        except (NotFoundError, RetryableError) as error:  # unknown there as long as no offer came through
            retry_after_s = error.retry_after_s if isinstance(error, LinkError) else None
            wait_s = backoff_s(study["inventory_tries"], settings.retry_base_s, settings.retry_ceiling_s, retry_after_s)
        except PermanentError as error:
            reason = error.reason
            wait_s = settings.refused_retry_s
            self._spool.ledger.write(
                lambda connection: note_quarantine(
                    connection, kind="refused_by_centre", subject=facts.study_instance_uid, reason=reason
                )
            )
        else:
            if answer.complete:
                self._complete(study)
                return
            missing = {(line.sop_instance_uid, line.sha256) for line in answer.missing}
            self._offer_again([row for row in lines if (row["sop_instance_uid"], row["sha256"]) in missing])
            wait_s = backoff_s(study["inventory_tries"], settings.retry_base_s, settings.retry_ceiling_s)
        self._spool.ledger.execute(
            "UPDATE study SET inventory_tries = inventory_tries + 1, inventory_due_at_s = ? WHERE id = ?",
            time.time() + wait_s,
            study["id"],
        )

    def _complete(self, study: sqlite3.Row) -> None:
        """The centre has it all, unless something came in the meantime."""
        changed = self._spool.ledger.execute(
            "UPDATE study SET complete_at = ? WHERE id = ? AND last_received_at_s = ?",
            now().isoformat(),
            study["id"],
            study["last_received_at_s"],
        )
        if changed:
            log.info("uplink.complete", study_id=study["id"])

    def _offer_again(self, rows: list[sqlite3.Row]) -> None:
        """What the centre once signed for and now lacks; what is still on its way needs nothing."""

        def reopen(connection: sqlite3.Connection) -> None:
            for row in rows:
                if row["archived_at"] is None:
                    continue
                if row["freed_at"] is None:
                    connection.execute(
                        "UPDATE instance SET archived_at = NULL, archived_at_s = NULL, pack_id = NULL WHERE id = ?",
                        (row["id"],),
                    )
                else:
                    note_quarantine(
                        connection, kind="missing_at_centre", subject=row["sop_instance_uid"],
                        reason="The centre signed for this image, lacks it now, and it was freed here",
                        sha256=row["sha256"],
                    )  # fmt: skip

        self._spool.ledger.write(reopen)
        self._spool.arrived.set()
