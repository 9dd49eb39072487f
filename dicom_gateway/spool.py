"""Durable intake: what was answered with Success is on this disk, with digest and facts, until the centre signs.

    spool_dir/
      spool.db            rows (dicom_gateway/schema.py), WAL, synchronous=FULL
      objects/ab/abcd…    one data set as received, named by its SHA-256
      objects/ab/abcd….json  what its rows are made of (enrol.KeptFacts): spool.db can be built again from these
      incoming/           being written; nothing here was ever answered with Success
      packs/              being sent; can be built again from objects
      quarantine/         bytes that were refused, with a row that says why
      quarantine/orphans/ objects that were found without rows and without facts
      lock                held by the one process that works here

Order of a store: write facts and bytes, fsync both, rename facts and then bytes to the digest's name, fsync the
directory, row in a committed transaction, and only then Success (design §4.1). Bytes that have their name therefore
have their facts, and are kept whatever becomes of the row: sweep.py makes it again at the next start.
"""

import errno
import fcntl
import hashlib
import os
import shutil
import sqlite3
import threading
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import structlog

from dicom_gateway.enrol import KeptFacts, StoreOutcome, enrol
from dicom_gateway.ledger import Ledger
from dicom_gateway.quarantine import note_quarantine, now
from dicom_gateway.settings import GatewaySettings
from storage.content import content_digests
from storage.dataset import Data
from storage.durable import sync_directory
from storage.errors import (
    ConfigurationError,
    MalformedDataSetError,
    OutOfSpaceError,
    RetryableError,
)
from storage.wire import InstanceFacts, StudyFacts

log = structlog.get_logger(__name__)

_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
FACTS_SUFFIX = ".json"
PREFIXES = tuple(f"{number:02x}" for number in range(256))


@dataclass(frozen=True)
class Backlog:
    """Instances kept and not yet archived at the centre."""

    instances: int
    size_bytes: int
    oldest_at: datetime | None


def _disk_error(error: OSError, doing: str) -> RetryableError:
    if error.errno in _NO_SPACE:
        return OutOfSpaceError(f"Disk full while {doing}")
    return RetryableError(f"Disk error {errno.errorcode.get(error.errno or 0, '?')} while {doing}")


class Spool:
    """The one owner of a spool directory. Thread safe. `close()` when done."""

    def __init__(self, settings: GatewaySettings) -> None:
        """Open; `sweep.sweep` is called next. Raises ConfigurationError if another process holds the directory, or if
        the database is damaged."""
        self._settings = settings
        self.directory = settings.spool_dir
        self.zone = settings.zone
        self.objects, self.packs = self.directory / "objects", self.directory / "packs"
        self.incoming, self.refused = self.directory / "incoming", self.directory / "quarantine"
        self.orphans = self.refused / "orphans"
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.directory.chmod(0o700)  # patient data: also where the directory was made by somebody else
        for path in (self.objects, self.packs, self.incoming, self.refused, self.orphans):
            path.mkdir(parents=True, exist_ok=True)
        for prefix in PREFIXES:  # here and now, so that no store has to sync a new directory's parent
            (self.objects / prefix).mkdir(exist_ok=True)
        for path in (self.objects, self.directory, self.directory.parent):
            sync_directory(path)
        self._lock = self._hold()
        self.ledger = Ledger(self.directory / "spool.db")
        sync_directory(self.directory)
        self._digest_locks = [threading.Lock() for _ in PREFIXES]
        self.arrived = threading.Event()  # set after each store: the uplink need not look for work all the time

    def close(self) -> None:
        """Finish writes and let go of the directory."""
        self.ledger.close()
        os.close(self._lock)

    def _hold(self) -> int:
        handle = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            raise ConfigurationError(f"{self.directory}: another gateway is working in this spool") from error
        return handle

    def object_path(self, sha256: str) -> Path:
        """Where the data set with this digest lies."""
        return self.objects / sha256[:2] / sha256

    def facts_path(self, sha256: str) -> Path:
        """Where the facts of the data set with this digest lie."""
        return facts_beside(self.object_path(sha256))

    # Intake

    def store(self, study: StudyFacts, instance: InstanceFacts, data: Data) -> StoreOutcome:
        """Keep one data set; on return it survives a power cut. OutOfSpaceError, RetryableError: nothing was kept."""
        digest, kept = instance.sha256, KeptFacts(study=study, instance=instance)
        with self._digest_locks[int(digest[:2], 16)]:
            known = self.ledger.row(
                "SELECT archived_at, damaged_at FROM instance WHERE sop_instance_uid = ? AND sha256 = ?",
                instance.sop_instance_uid,
                digest,
            )
            path = self.object_path(digest)
            if known is not None:
                if known["archived_at"] is None and (known["damaged_at"] or not has_size(path, len(data))):
                    self._keep(path, data, kept)  # the sender brings back what this disk lost
                    self._mark_whole(instance)
                return StoreOutcome.ALREADY_STORED
            if self._is_known_in_another_encoding(instance, data):
                return StoreOutcome.ALREADY_STORED
            self._keep(path, data, kept)
            try:
                outcome = self.enrol([kept])[0]
            except BaseException:
                remove_object(path)  # no row names it, and this digest's lock is ours
                raise
        self.arrived.set()
        return outcome

    def _require_space(self, size_bytes: int) -> None:
        free = shutil.disk_usage(self.directory).free
        if free - size_bytes < self._settings.free_disk_watermark_bytes:
            raise OutOfSpaceError(f"Spool disk at its watermark, {free // 1024**2} MiB free")

    @property
    def out_of_space(self) -> bool:
        """Whether the next C-STORE would be answered A700."""
        return self.free_disk_bytes < self._settings.free_disk_watermark_bytes

    @property
    def free_disk_bytes(self) -> int:
        """Free bytes on the spool's disk."""
        return shutil.disk_usage(self.directory).free

    def backlog(self) -> Backlog:
        """What the centre has not signed for yet."""
        row = self.ledger.row(
            "SELECT count(*) AS instances, coalesce(sum(size_bytes), 0) AS size_bytes, min(received_at_s) AS oldest"
            " FROM instance WHERE archived_at IS NULL"
        )
        if row is None:
            return Backlog(0, 0, None)
        oldest = None if row["oldest"] is None else datetime.fromtimestamp(row["oldest"], UTC)
        return Backlog(row["instances"], row["size_bytes"], oldest)

    def enrol(self, kept: list[KeptFacts]) -> list[StoreOutcome]:
        """Rows for instances whose files are here, in one transaction."""
        quiet_s = self._settings.quiet_s
        return self.ledger.write(lambda connection: [enrol(connection, one, quiet_s) for one in kept])

    def keep_facts(self, kept: KeptFacts) -> None:
        """Facts for an object that has none beside it."""
        self._write([(self.facts_path(kept.instance.sha256), kept.model_dump_json().encode())])

    def _keep(self, path: Path, data: Data, kept: KeptFacts) -> None:
        self._write([(facts_beside(path), kept.model_dump_json().encode()), (path, data)])

    def _write(self, files: list[tuple[Path, Data]]) -> None:
        """Durably write files of one directory; the last has its name only when all others have theirs."""
        self._require_space(sum(len(data) for _, data in files))
        temporary = [self.incoming / uuid.uuid4().hex for _ in files]
        try:
            for place, (_, data) in zip(temporary, files, strict=True):
                with place.open("xb") as out:
                    out.write(data)
                    out.flush()
                    os.fsync(out.fileno())
            for place, (path, _) in zip(temporary, files, strict=True):
                place.rename(path)
            sync_directory(files[-1][0].parent)
        except OSError as error:
            for place in temporary:
                place.unlink(missing_ok=True)
            raise _disk_error(error, "keeping an instance") from error

    def _mark_whole(self, instance: InstanceFacts) -> None:
        self.ledger.execute(
            "UPDATE instance SET damaged_at = NULL WHERE sop_instance_uid = ? AND sha256 = ?",
            instance.sop_instance_uid,
            instance.sha256,
        )
        self.ledger.execute(
            "UPDATE quarantine SET resolved_at = ? WHERE kind = 'damaged' AND subject = ? AND resolved_at IS NULL",
            now().isoformat(),
            instance.sop_instance_uid,
        )
        self.arrived.set()

    def _is_known_in_another_encoding(self, instance: InstanceFacts, data: Data) -> bool:
        """Compare with what is kept under the same UID; what was freed cannot be compared, and counts as other."""
        mine: tuple[str, str] | None = None
        for row in self.ledger.rows(
            "SELECT sha256, facts FROM instance WHERE sop_instance_uid = ?", instance.sop_instance_uid
        ):
            other = InstanceFacts.model_validate_json(row["facts"])
            try:
                kept = self.object_path(row["sha256"]).read_bytes()
                mine = mine or content_digests(data, instance.transfer_syntax_uid)
                if content_digests(kept, other.transfer_syntax_uid) == mine:
                    return True
            except (OSError, MalformedDataSetError):
                continue
        return False

    def keep_refused(self, data: Data, sha256: str, *, subject: str, reason: str, calling_ae_title: str) -> bool:
        """Keep bytes that were refused, and why, for a person. Returns whether there was room for the bytes.

        The sender got a failure and still has the object, so a full disk only costs the copy, never the row.
        """
        path, kept = self.refused / sha256, len(data) <= self._settings.refused_keep_bytes
        try:
            if kept and not path.exists():
                self._write([(path, data)])
        except RetryableError:
            kept = False
        self.ledger.write(
            lambda connection: note_quarantine(
                connection,
                kind="refused_data_set",
                subject=subject,
                reason=reason,
                sha256=sha256 if kept else None,
                size_bytes=len(data),
                calling_ae_title=calling_ae_title,
            )
        )
        if kept:
            self._drop_refused()
        return kept

    def _drop_refused(self) -> None:
        """Keep to `refused_keep_bytes`: the oldest bytes go, their rows stay and say so (`sha256` is NULL). None of
        them was ever answered with Success, so their senders have them still."""
        rows = self.ledger.rows(
            "SELECT sha256, max(size_bytes) AS size_bytes FROM quarantine"
            " WHERE kind = 'refused_data_set' AND sha256 IS NOT NULL GROUP BY sha256 ORDER BY max(last_at)"
        )
        over = sum(row["size_bytes"] for row in rows) - self._settings.refused_keep_bytes
        for row in rows:
            if over <= 0:
                break
            self.ledger.execute(
                "UPDATE quarantine SET sha256 = NULL WHERE kind = 'refused_data_set' AND sha256 = ?", row["sha256"]
            )
            (self.refused / row["sha256"]).unlink(missing_ok=True)
            over -= row["size_bytes"]

    # Housekeeping

    def free_kept(self) -> int:
        """Remove the files of instances whose receipt is older than keep_days. Returns how many."""
        before_s = now().timestamp() - self._settings.keep_days * 86400
        rows = self.ledger.rows(
            "SELECT id, sha256 FROM instance WHERE archived_at IS NOT NULL AND freed_at IS NULL AND archived_at_s <= ?"
            " ORDER BY archived_at_s LIMIT 10000",
            before_s,
        )
        for row in rows:
            with self._digest_locks[int(row["sha256"][:2], 16)]:
                # The row first: a crash in between leaves a file that may go, which the next sweep removes.
                self.ledger.execute("UPDATE instance SET freed_at = ? WHERE id = ?", now().isoformat(), row["id"])
                remove_object(self.object_path(row["sha256"]))
        if rows:
            log.info("spool.freed", instances=len(rows))
        return len(rows)

    def pack_path(self, pack_id: str) -> Path:
        """Where the file of a pack on its way lies."""
        return self.packs / f"{pack_id}.pack"

    def is_whole(self, sha256: str) -> bool:
        """Whether the file of a kept data set still has its digest."""
        return _has_digest(self.object_path(sha256), sha256)

    def is_whole_pack(self, pack_id: str, sha256: str) -> bool:
        """Whether a pack's file has the digest that was offered."""
        return _has_digest(self.pack_path(pack_id), sha256)

    def release_pack(self, pack_id: str) -> None:
        """Forget a pack that was not receipted: its instances wait to be packed again."""

        def release(connection: sqlite3.Connection) -> None:
            connection.execute("UPDATE instance SET pack_id = NULL WHERE pack_id = ?", (pack_id,))
            connection.execute("DELETE FROM pack WHERE pack_id = ? AND state <> 'receipted'", (pack_id,))

        self.ledger.write(release)
        self.pack_path(pack_id).unlink(missing_ok=True)
        self.arrived.set()

    def mark_damaged(self, instance_id: int, sop_instance_uid: str, sha256: str) -> None:
        """The disk no longer gives back what was received: tell a person, do not send it."""

        def mark(connection: sqlite3.Connection) -> None:
            connection.execute(
                "UPDATE instance SET damaged_at = ?, pack_id = NULL WHERE id = ?", (now().isoformat(), instance_id)
            )
            note_quarantine(
                connection,
                kind="damaged",
                subject=sop_instance_uid,
                reason="The spool file is missing or changed: send this image again",
                sha256=sha256,
            )

        self.ledger.write(mark)
        log.error("spool.damaged", instance_id=instance_id)


def facts_beside(path: Path) -> Path:
    """Where the facts of an object lie: beside it, so that one directory sync is for both."""
    return path.with_name(path.name + FACTS_SUFFIX)


def remove_object(path: Path) -> None:
    """Remove an object and its facts, the object first: facts alone mean nothing."""
    path.unlink(missing_ok=True)
    facts_beside(path).unlink(missing_ok=True)


def has_size(path: Path, size_bytes: int) -> bool:
    """Whether the file is there with that size."""
    try:
        return path.stat().st_size == size_bytes
    except FileNotFoundError:
        return False


def _has_digest(path: Path, sha256: str) -> bool:
    try:
        with path.open("rb") as source:
            return hashlib.file_digest(source, "sha256").hexdigest() == sha256
    except OSError:
        return False
