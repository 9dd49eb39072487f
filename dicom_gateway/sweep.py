"""At the start: bring files and rows together. What may have been answered with Success is never removed here.

An object without a row is enrolled from the facts beside it: after a crash before the row, and after the loss of
spool.db or its replacement by an older copy, when it may be any number of objects (the centre answers for what it has
already). An object without row and facts goes to quarantine/orphans/ with a row that tells a person. Only what a row
says was freed, and what never got its name, is removed.
"""

import os
import sqlite3
from pathlib import Path

import structlog
from pydantic import ValidationError

from dicom_gateway.enrol import KeptFacts
from dicom_gateway.quarantine import note_quarantine
from dicom_gateway.spool import FACTS_SUFFIX, PREFIXES, Spool, facts_beside, has_size, remove_object
from storage.wire import InstanceFacts, StudyFacts

log = structlog.get_logger(__name__)

_BATCH = 500
_ORPHAN = "A file of the spool without a row and without readable facts; kept in quarantine/orphans"


def sweep(spool: Spool) -> None:
    """Do all of it, before the first association and the first pack."""
    temporary = 0
    for path in [*spool.incoming.iterdir(), *spool.packs.glob("*.tmp")]:
        path.unlink()
        temporary += 1
    adopted = orphans = 0
    found: list[KeptFacts] = []
    for prefix in PREFIXES:
        for path in _without_row(spool, prefix):
            kept = _facts_of(spool, path)
            if kept is None:
                _set_aside(spool, path)
                orphans += 1
            else:
                found.append(kept)
    found.sort(key=lambda kept: kept.instance.received_at)  # as they came: the first of a study names its facts
    for start in range(0, len(found), _BATCH):
        spool.enrol(found[start : start + _BATCH])
        adopted += len(found[start : start + _BATCH])
    if adopted:
        log.warning("spool.rebuilt", instances=adopted)
    lost = _mark_lost(spool)
    _drop_unfinished_packs(spool)
    log.info("spool.swept", temporary=temporary, adopted=adopted, orphans=orphans, lost=lost)


def _promised(spool: Spool, prefix: str) -> dict[str, sqlite3.Row]:
    rows = spool.ledger.rows(
        "SELECT id, sop_instance_uid, sha256, size_bytes, archived_at, damaged_at FROM instance"
        " WHERE sha256 >= ? AND sha256 < ? AND freed_at IS NULL",
        prefix,
        prefix + "g",  # after every hexadecimal digit
    )
    return {row["sha256"]: row for row in rows}


def _without_row(spool: Spool, prefix: str) -> list[Path]:
    """Objects that no row names. Removes what was freed and facts without an object; adds facts that are missing."""
    promised = _promised(spool, prefix)
    names = {entry.name for entry in os.scandir(spool.objects / prefix)}
    unknown: list[Path] = []
    for name in sorted(names):
        path = spool.objects / prefix / name
        if name.endswith(FACTS_SUFFIX):
            if name.removesuffix(FACTS_SUFFIX) not in names:
                path.unlink()
        elif name in promised:
            if name + FACTS_SUFFIX not in names:
                _add_facts(spool, promised[name]["id"])
        elif spool.ledger.rows("SELECT 1 FROM instance WHERE sha256 = ?", name):  # its row says that it was freed
            remove_object(path)
        else:
            unknown.append(path)
    return unknown


def _add_facts(spool: Spool, instance_id: int) -> None:
    row = spool.ledger.row(
        "SELECT i.facts, s.facts AS study_facts FROM instance i JOIN study s ON s.id = i.study_id WHERE i.id = ?",
        instance_id,
    )
    if row is not None:
        study = StudyFacts.model_validate_json(row["study_facts"])
        spool.keep_facts(KeptFacts(study=study, instance=InstanceFacts.model_validate_json(row["facts"])))


def _facts_of(spool: Spool, path: Path) -> KeptFacts | None:
    try:
        kept = KeptFacts.model_validate_json(facts_beside(path).read_bytes())
    except (OSError, ValidationError):
        return None
    return kept if spool.object_path(kept.instance.sha256) == path else None


def _set_aside(spool: Spool, path: Path) -> None:
    """Tell a person first, then move: a crash in between does both again."""
    size_bytes = path.stat().st_size
    spool.ledger.write(
        lambda connection: note_quarantine(
            connection, kind="orphan", subject=path.name[:64], reason=_ORPHAN, size_bytes=size_bytes
        )
    )
    path.rename(spool.orphans / path.name)
    facts_beside(path).unlink(missing_ok=True)
    log.error("spool.orphan", size_bytes=size_bytes)


def _mark_lost(spool: Spool) -> int:
    """Instances that are promised and whose file is gone or has another length. Returns how many."""
    lost = 0
    for prefix in PREFIXES:
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(spool.objects / prefix)}
        for name, row in _promised(spool, prefix).items():
            if sizes.get(name) == row["size_bytes"]:
                continue
            lost += 1
            if row["archived_at"] is None and row["damaged_at"] is None:
                spool.mark_damaged(row["id"], row["sop_instance_uid"], row["sha256"])
    return lost


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
