"""The spool's SQLite database: one committer thread for all writes, a few connections for reads.

`synchronous=FULL` with WAL makes one fsync a transaction, so the committer takes all that waits, runs each piece in a
savepoint of its own, commits once, and only then lets the callers go on: with several associations one fsync answers
several C-STOREs. A write that returned survives a power cut; a write that raised left nothing.
"""

import queue
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from dicom_gateway.schema import VERSIONS
from storage.errors import ConfigurationError, OutOfSpaceError, RetryableError

T = TypeVar("T")
_Piece = tuple[Callable[[sqlite3.Connection], Any], "Future[Any]"]

_BATCH = 64
_READERS = 4
_DISK_CODES = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR})


class LedgerClosedError(RetryableError):
    """The gateway is stopping: the sender tries again when it is back."""


def _translated(error: sqlite3.Error) -> Exception:
    """What a disk or a lock did, as the project's own errors; anything else (a mistake of ours) as it is."""
    if getattr(error, "sqlite_errorcode", -1) & 0xFF in _DISK_CODES:  # the primary code of an extended one
        return OutOfSpaceError("The spool's database cannot be written: disk full or failing")
    if isinstance(error, sqlite3.OperationalError):
        return RetryableError("The spool's database could not be written")
    return error


class Ledger:
    """Opens (and if need be creates or upgrades) the database at `path`. Thread safe. `close()` when done."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigurationError if the file is damaged or from a newer version."""
        self._path = path
        self._pieces: queue.SimpleQueue[_Piece | None] = queue.SimpleQueue()
        self._readers: queue.LifoQueue[sqlite3.Connection] = queue.LifoQueue()
        self._gate = threading.Lock()
        self._closed = False
        self._writer = self._open()
        self._prepare()
        for _ in range(_READERS):
            self._readers.put(self._connect())
        self._thread = threading.Thread(target=self._commit_for_ever, name="committer", daemon=True)
        self._thread.start()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, timeout=10.0)
        connection.row_factory = sqlite3.Row
        try:
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=10000"):
                connection.execute(f"PRAGMA {pragma}").close()
        except sqlite3.Error:
            connection.close()
            raise
        return connection

    def _open(self) -> sqlite3.Connection:
        try:
            connection = self._connect()
            verdict = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        except sqlite3.DatabaseError as error:
            verdict = str(error)
        if verdict != "ok":
            raise ConfigurationError(
                f"{self._path}: the spool's database is damaged ({verdict}); move spool.db* away and start again:"
                " it is built from objects/"
            )
        return connection

    def _prepare(self) -> None:
        version = self._writer.execute("PRAGMA user_version").fetchone()[0]
        if version > len(VERSIONS):
            raise ConfigurationError(
                f"{self._path}: written by a newer gateway (schema {version}, here {len(VERSIONS)})"
            )
        for number, statements in enumerate(VERSIONS[version:], start=version + 1):
            self._writer.execute("BEGIN IMMEDIATE")
            for statement in statements:
                self._writer.execute(statement)
            self._writer.execute(f"PRAGMA user_version = {number}")
            self._writer.execute("COMMIT")

    # Reading

    @contextmanager
    def reader(self) -> Iterator[sqlite3.Connection]:
        """A connection to read with, for the length of the block."""
        connection = self._readers.get()
        try:
            yield connection
        finally:
            self._readers.put(connection)

    def rows(self, sql: str, *values: object) -> list[sqlite3.Row]:
        """All rows of one SELECT."""
        with self.reader() as connection, closing(connection.execute(sql, values)) as cursor:
            return cursor.fetchall()

    def row(self, sql: str, *values: object) -> sqlite3.Row | None:
        """The first row of one SELECT, or None."""
        found = self.rows(sql, *values)
        return found[0] if found else None

    # Writing

    def write(self, piece: Callable[[sqlite3.Connection], T]) -> T:
        """Run `piece` in the committer's thread and return its result once it is on disk.

        It runs in a savepoint: if it raises, what it did is undone and the error comes out here; others in the same
        transaction are not touched. Raises OutOfSpaceError on a full disk, LedgerClosedError when stopping.
        """
        future: Future[T] = Future()
        with self._gate:
            if self._closed:
                raise LedgerClosedError("The gateway is stopping")
            self._pieces.put((piece, future))
        return future.result()

    def execute(self, sql: str, *values: object) -> int:
        """One INSERT, UPDATE or DELETE, durable on return. Returns the number of rows changed."""
        return self.write(lambda connection: connection.execute(sql, values).rowcount)

    def _commit_for_ever(self) -> None:
        while True:
            batch: list[_Piece] = []
            stop = False
            first = self._pieces.get()
            while first is not None:
                batch.append(first)
                if len(batch) >= _BATCH or self._pieces.empty():
                    break
                first = self._pieces.get()
            stop = first is None
            if batch:
                self._commit(batch)
            if stop:
                return

    def _commit(self, batch: list[_Piece]) -> None:
        done: list[tuple[Future[Any], Any]] = []
        try:
            self._writer.execute("BEGIN IMMEDIATE")
            for piece, future in batch:
                self._writer.execute("SAVEPOINT piece")
                try:
                    result = piece(self._writer)
                except Exception as error:  # it belongs to the caller, who gets it
                    if not self._writer.in_transaction:  # SQLite rolled everything back (full disk, I/O error)
                        raise
                    self._writer.execute("ROLLBACK TO piece")
                    self._writer.execute("RELEASE piece")
                    future.set_exception(_translated(error) if isinstance(error, sqlite3.Error) else error)
                else:
                    self._writer.execute("RELEASE piece")
                    done.append((future, result))
            self._writer.execute("COMMIT")
        except Exception as error:  # noqa: BLE001 - nothing of this batch is on disk, and each caller must hear so
            if self._writer.in_transaction:
                self._writer.execute("ROLLBACK")
            failure = _translated(error) if isinstance(error, sqlite3.Error) else error
            for _, future in batch:
                if not future.done():
                    future.set_exception(failure)
            return
        for future, result in done:
            future.set_result(result)

    def close(self) -> None:
        """Finish what was handed in, then close. Later writes raise LedgerClosedError."""
        with self._gate:
            if self._closed:
                return
            self._closed = True
            self._pieces.put(None)
        self._thread.join()
        for _ in range(_READERS):
            self._readers.get().close()
        self._writer.close()
