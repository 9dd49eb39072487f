"""After a crash: remove what nobody was promised, and say what is promised and not here."""

import os
import sqlite3

import structlog

from dicom_gateway.spool import PREFIXES, Spool, has_size

log = structlog.get_logger(__name__)


def sweep(spool: Spool) -> None:
    """Bring files and rows together, before the first association and the first pack."""
    temporary = orphans = 0
    for path in [*spool.incoming.iterdir(), *spool.packs.glob("*.tmp")]:
        path.unlink()
        temporary += 1
    lost: list[sqlite3.Row] = []
    for prefix in PREFIXES:
        here = {entry.name: entry.stat().st_size for entry in os.scandir(spool.objects / prefix)}
        promised = {
            row["sha256"]: row
            for row in spool.ledger.rows(
                "SELECT id, sop_instance_uid, sha256, size_bytes, archived_at, damaged_at FROM instance"
                " WHERE sha256 >= ? AND sha256 < ? AND freed_at IS NULL",
                prefix,
                prefix + "g",  # after every hexadecimal digit
            )
        }
        for name in here.keys() - promised.keys():
            (spool.objects / prefix / name).unlink()
            orphans += 1
        lost += [row for name, row in promised.items() if here.get(name) != row["size_bytes"]]
    for row in lost:
        if row["archived_at"] is None and row["damaged_at"] is None:
            spool.mark_damaged(row["id"], row["sop_instance_uid"], row["sha256"])
    _drop_unfinished_packs(spool)
    log.info("spool.swept", temporary=temporary, orphans=orphans, lost=len(lost))


def _drop_unfinished_packs(spool: Spool) -> None:
    """A pack under way whose file is not whole is planned anew; a file without an open row goes."""
    under_way = spool.ledger.rows("SELECT pack_id, state, size_bytes FROM pack WHERE state IN ('planned', 'put')")
    for row in under_way:
        if not has_size(spool.pack_path(row["pack_id"]), row["size_bytes"]):
            spool.release_pack(row["pack_id"])
    wanted = {spool.pack_path(row["pack_id"]).name for row in under_way}
    for path in spool.packs.iterdir():
        if path.name not in wanted:
            path.unlink()
