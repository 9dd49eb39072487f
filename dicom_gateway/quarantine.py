"""What a person must look at: rows that the gateway only ever adds to and resolves, never deletes (design §4.5)."""

import sqlite3
from datetime import UTC, datetime
from typing import Literal

from dicom_gateway.ledger import Ledger

Kind = Literal[
    "refused_data_set", "variant", "damaged", "refused_by_centre", "missing_at_centre", "report_refused", "orphan"
]
"""As in the table's CHECK (schema.py)."""


def now() -> datetime:
    """The gateway's clock."""
    return datetime.now(UTC)


def note_quarantine(
    connection: sqlite3.Connection,
    *,
    kind: Kind,
    subject: str,
    reason: str,
    sha256: str | None = None,
    size_bytes: int | None = None,
    calling_ae_title: str = "",
) -> None:
    """Tell a person, in the caller's transaction; the same thing again is counted on the same row, and open again."""
    at = now().isoformat()
    connection.execute(
        "INSERT INTO quarantine (kind, subject, reason, sha256, size_bytes, calling_ae_title, first_at, last_at)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (kind, subject, reason) DO UPDATE SET times = times + 1,"
        " last_at = excluded.last_at, resolved_at = NULL, sha256 = coalesce(excluded.sha256, sha256)",
        (kind, subject, reason, sha256, size_bytes, calling_ae_title, at, at),
    )


def open_count(ledger: Ledger) -> int:
    """How many rows wait for a person."""
    row = ledger.row("SELECT count(*) AS open FROM quarantine WHERE resolved_at IS NULL")
    return int(row["open"]) if row else 0
