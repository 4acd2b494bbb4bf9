"""The database of a store: connections, transactions, and what the disk may do to them. Knows no rules."""

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

from adapters.errors import AdapterCorruptError, AdapterError, CapacityError
from adapters.rows import Rows
from adapters.schema import migrate
from adapters.transaction import Transaction

_BUSY_TIMEOUT_S = 10.0
_STORAGE_CODES = (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM)


class Catalogue:
    """The database of one store. Thread-safe; other processes may have it open too."""

    def __init__(self, path: Path) -> None:
        with _storage_errors():
            self._writer = _connect(path)
            migrate(self._writer)
            self._reader = _connect(path)
        self._write_lock, self._read_lock = threading.Lock(), threading.Lock()

    @contextlib.contextmanager
    def reading(self) -> Iterator[Rows]:
        """One consistent view; never waits for a writer."""
        with self._read_lock, _storage_errors():
            self._reader.execute("BEGIN")
            try:
                yield Rows(self._reader)
            finally:
                self._reader.execute("COMMIT")

    @contextlib.contextmanager
    def writing(self) -> Iterator[Transaction]:
        """One transaction, alone among all threads and processes; durable once the block ends well."""
        with self._write_lock, _storage_errors():
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield Transaction(self._writer)
                self._writer.execute("COMMIT")
            finally:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")

    def close(self) -> None:
        with self._write_lock, self._read_lock:
            self._reader.close()
            self._writer.close()


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


@contextlib.contextmanager
def _storage_errors() -> Iterator[None]:
    try:
        yield
    except sqlite3.DatabaseError as error:
        known = _known(error)
        if known is None:
            raise
        raise known from error


def _known(error: sqlite3.DatabaseError) -> AdapterError | None:
    """What the disk or another process did; None for an error of our own."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return CapacityError("the disk of the adapter store is full; make room and try again")
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return CapacityError("another process keeps the adapter store busy; try again", reason="STORE_BUSY")
    if code in _STORAGE_CODES:
        return CapacityError(f"the catalogue cannot be written or read: {error}", reason="STORAGE_FAILED")
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return AdapterCorruptError(
            f"the catalogue of the adapter store is damaged ({error}); restore it from a backup"
        )
    return None
