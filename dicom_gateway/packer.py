"""Which kept instances travel together: packs of one series, built on disk as they are about to be sent (design §5).

A series waits only `gather_s` after its last instance, or until a pack is full; nobody waits for a study to be whole.
Packs are built a few ahead of the link, not for the whole backlog, so a long outage does not fill the disk twice. A
pack can always be built again: its file is not synced, and one that a power cut tore is found by size or by the centre.
Packs that the centre fails on are not ahead of anything: what is behind them goes on, up to a bound for the disk.
"""

import sqlite3
import time
import uuid
from dataclasses import dataclass

import structlog

from dicom_gateway.settings import GatewaySettings
from dicom_gateway.spool import Spool
from storage.errors import MalformedDataSetError, OutOfSpaceError, RetryableError
from storage.packs import write_pack
from storage.wire import MAX_INSTANCES_PER_OFFER, MAX_PACK_BYTES, InstanceFacts, StudyFacts

log = structlog.get_logger(__name__)

_READY = """
    SELECT i.study_id, i.series_instance_uid, s.lane_rank, s.facts FROM instance i JOIN study s ON s.id = i.study_id
    WHERE i.pack_id IS NULL AND i.archived_at IS NULL AND i.damaged_at IS NULL
    GROUP BY i.study_id, i.series_instance_uid
    HAVING sum(i.size_bytes) >= ? OR max(i.received_at_s) <= ?
    ORDER BY s.lane_rank, min(i.id) LIMIT 1
"""
_OF_SERIES = """
    SELECT * FROM instance
    WHERE pack_id IS NULL AND archived_at IS NULL AND damaged_at IS NULL AND study_id = ? AND series_instance_uid = ?
    ORDER BY id LIMIT ?
"""


_OPEN_FOR_EACH_AHEAD = 4
"""Open packs in all, those that the centre fails on too, for each that may be ahead: the disk's bound."""


@dataclass(frozen=True)
class _Chosen:
    study_id: int
    facts: StudyFacts
    rows: list[sqlite3.Row]


class Packer:
    """Plans packs. Used by one thread."""

    def __init__(self, settings: GatewaySettings, spool: Spool) -> None:
        self._settings = settings
        self._spool = spool
        self._ahead = 2 * settings.uplink_threads

    def plan(self) -> int:
        """Build what is ready and wanted. Returns the number of packs. OutOfSpaceError: not even a pack fits."""
        self._reopen_refused()
        built = 0
        while (chosen := self._choose()) is not None:
            built += self._build(chosen)
        return built

    def _reopen_refused(self) -> None:
        """What the centre refused is asked again after refused_retry_s: it may have been corrected there."""
        for row in self._spool.ledger.rows(
            "SELECT pack_id FROM pack WHERE state = 'refused' AND next_try_at_s <= ?", time.time()
        ):
            self._spool.release_pack(row["pack_id"])

    def _choose(self) -> _Chosen | None:
        """The most urgent series that is ready, if its lane has no more than enough packs ahead of it already."""
        ledger = self._spool.ledger
        ahead = ledger.rows(
            "SELECT s.lane_rank, count(*) AS open, sum(p.centre_faults = 0) AS packs FROM pack p"
            " JOIN study s ON s.id = p.study_id WHERE p.state IN ('planned', 'put') GROUP BY s.lane_rank"
        )
        series = ledger.row(_READY, MAX_PACK_BYTES, time.time() - self._settings.gather_s)
        if series is None:
            return None
        if sum(row["packs"] for row in ahead if row["lane_rank"] <= series["lane_rank"]) >= self._ahead:
            return None
        if sum(row["open"] for row in ahead) >= _OPEN_FOR_EACH_AHEAD * self._ahead:
            return None
        rows: list[sqlite3.Row] = []
        size = 0
        waiting = ledger.rows(_OF_SERIES, series["study_id"], series["series_instance_uid"], MAX_INSTANCES_PER_OFFER)
        for row in waiting:
            if rows and size + row["size_bytes"] > MAX_PACK_BYTES:
                break
            rows.append(row)
            size += row["size_bytes"]
        return _Chosen(series["study_id"], StudyFacts.model_validate_json(series["facts"]), rows)

    def _build(self, chosen: _Chosen) -> bool:
        pack_id = uuid.uuid4().hex
        path = self._spool.pack_path(pack_id)
        temporary = path.with_suffix(".tmp")
        facts = [InstanceFacts.model_validate_json(row["facts"]) for row in chosen.rows]
        files = [(one, self._spool.object_path(one.sha256)) for one in facts]
        try:
            with temporary.open("xb") as out:
                size_bytes, sha256 = write_pack(out, chosen.facts, files)
            temporary.rename(path)
        except (MalformedDataSetError, FileNotFoundError) as error:
            temporary.unlink(missing_ok=True)
            log.error("packer.damaged", study_id=chosen.study_id, error=str(error))
            self._find_damaged(chosen)
            return False
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise OutOfSpaceError("No room to build a pack") from error

        def plan(connection: sqlite3.Connection) -> None:
            connection.execute(
                "INSERT INTO pack (pack_id, study_id, state, size_bytes, sha256, planned_at_s)"
                " VALUES (?, ?, 'planned', ?, ?, ?)",
                (pack_id, chosen.study_id, size_bytes, sha256, time.time()),
            )
            connection.executemany(
                "UPDATE instance SET pack_id = ? WHERE id = ?", [(pack_id, row["id"]) for row in chosen.rows]
            )

        self._spool.ledger.write(plan)
        return True

    def _find_damaged(self, chosen: _Chosen) -> None:
        damaged = [row for row in chosen.rows if not self._spool.is_whole(row["sha256"])]
        if not damaged:
            raise RetryableError("A spool file could not be read, and then it could")
        for row in damaged:
            self._spool.mark_damaged(row["id"], row["sop_instance_uid"], row["sha256"])
