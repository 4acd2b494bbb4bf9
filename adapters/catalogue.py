"""The catalogue of a store, in SQLite: which names and versions have which content. Knows no files, no rules.

A `Content` is what lies in one blob; versions point at it by digest. A deleted version is gone at once, its
content stays listed until its blob is removed.
"""

import contextlib
import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from adapters.errors import AdapterCorruptError, AdapterError, CapacityError
from adapters.facts import AdapterFacts, AdapterRecord, AdapterState, StoredFile

_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE contents (
    digest     TEXT PRIMARY KEY,
    state      TEXT NOT NULL,
    error      TEXT NOT NULL,
    facts      TEXT NOT NULL,
    files      TEXT NOT NULL,
    size_bytes INTEGER NOT NULL
);
CREATE TABLE names (
    name         TEXT PRIMARY KEY,
    last_version INTEGER NOT NULL  -- outlives its versions: a number is never used again
);
CREATE TABLE versions (
    name        TEXT NOT NULL REFERENCES names,
    version     INTEGER NOT NULL,
    digest      TEXT NOT NULL REFERENCES contents,
    pinned      INTEGER NOT NULL,
    labels      TEXT NOT NULL,
    description TEXT NOT NULL,
    etag        TEXT NOT NULL,
    created_s   REAL NOT NULL,
    updated_s   REAL NOT NULL,
    PRIMARY KEY (name, version)
);
CREATE INDEX versions_by_digest ON versions (digest);
CREATE TABLE aliases (
    name    TEXT NOT NULL,
    alias   TEXT NOT NULL,
    version INTEGER NOT NULL,
    PRIMARY KEY (name, alias),
    FOREIGN KEY (name, version) REFERENCES versions ON DELETE CASCADE
);
CREATE INDEX aliases_by_version ON aliases (name, version);
CREATE VIEW records AS
    SELECT v.*, c.state, c.error, c.facts, c.files,
           (SELECT group_concat(a.alias, ' ') FROM aliases a WHERE a.name = v.name AND a.version = v.version)
               AS aliases
    FROM versions v JOIN contents c ON c.digest = v.digest;
"""
_BUSY_TIMEOUT_S = 10.0
_STORAGE_CODES = (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM)


@dataclass(frozen=True, slots=True)
class Content:
    """What one blob holds and how it is."""

    facts: AdapterFacts
    files: tuple[StoredFile, ...]
    state: AdapterState
    error: str


class Rows:
    """Questions to the catalogue, all answered from one moment."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def content(self, digest: str) -> Content | None:
        rows = self._connection.execute("SELECT * FROM contents WHERE digest = ?", (digest,))
        return next((_content(row) for row in rows), None)

    def contents(self) -> list[Content]:
        return [_content(row) for row in self._connection.execute("SELECT * FROM contents")]

    def is_referenced(self, digest: str) -> bool:
        return bool(self._value("SELECT EXISTS (SELECT 1 FROM versions WHERE digest = ?)", digest))

    def record(self, name: str, version: int) -> AdapterRecord | None:
        return self._first("SELECT * FROM records WHERE name = ? AND version = ?", name, version)

    def newest(self, name: str, state: AdapterState | None = None) -> AdapterRecord | None:
        return self._first(
            "SELECT * FROM records WHERE name = ?1 AND (?2 IS NULL OR state = ?2) "
            "ORDER BY version DESC LIMIT 1",
            name,
            state,
        )

    def aliased(self, name: str, alias: str) -> AdapterRecord | None:
        return self._first(
            "SELECT * FROM records WHERE name = ?1 "
            "AND version = (SELECT version FROM aliases WHERE name = ?1 AND alias = ?2)",
            name,
            alias,
        )

    def with_digest(self, digest: str, name: str | None = None) -> AdapterRecord | None:
        """The newest version with this content, of one name or of the first that has it."""
        return self._first(
            "SELECT * FROM records WHERE digest = ?1 AND (?2 IS NULL OR name = ?2) "
            "ORDER BY name, version DESC LIMIT 1",
            digest,
            name,
        )

    def versions(self, name: str) -> list[AdapterRecord]:
        rows = self._connection.execute("SELECT * FROM records WHERE name = ? ORDER BY version", (name,))
        return [_record(row) for row in rows]

    def last_version(self, name: str) -> int:
        """The highest version there ever was; 0 if there was none."""
        found = self._value("SELECT last_version FROM names WHERE name = ?", name)
        return 0 if found is None else int(found)

    def page(
        self,
        *,
        after: tuple[str, int],
        name: str | None,
        state: AdapterState | None,
        labels: Mapping[str, str],
        limit: int,
    ) -> list[AdapterRecord]:
        """Records after a (name, version), in that order; all of `labels` must be there."""
        rows = self._connection.execute(
            """
            SELECT * FROM records
            WHERE (name, version) > (?1, ?2) AND (?3 IS NULL OR name = ?3) AND (?4 IS NULL OR state = ?4)
              AND NOT EXISTS (
                SELECT 1 FROM json_each(?5) AS want WHERE NOT EXISTS (
                  SELECT 1 FROM json_each(labels) AS has WHERE has.key = want.key AND has.value = want.value))
            ORDER BY name, version LIMIT ?6
            """,
            (*after, name, state, json.dumps(dict(labels)), limit),
        )
        return [_record(row) for row in rows]

    def total_bytes(self) -> int:
        return int(self._value("SELECT coalesce(sum(size_bytes), 0) FROM contents"))

    def _value(self, query: str, *values: object) -> Any:
        row = self._connection.execute(query, values).fetchone()
        return None if row is None else row[0]

    def _first(self, query: str, *values: object) -> AdapterRecord | None:
        row = self._connection.execute(query, values).fetchone()
        return None if row is None else _record(row)


class Transaction(Rows):
    """Changes to the catalogue, visible together or never."""

    def put_content(self, content: Content) -> None:
        """Adds a content or replaces what is known of it; every version with it changes its etag."""
        self._connection.execute(
            "INSERT INTO contents VALUES (?1, ?2, ?3, ?4, ?5, ?6) ON CONFLICT (digest) DO UPDATE SET "
            "state = ?2, error = ?3, facts = ?4, files = ?5, size_bytes = ?6",
            (
                content.facts.digest,
                content.state,
                content.error,
                json.dumps(asdict(content.facts)),
                json.dumps([asdict(file) for file in content.files]),
                sum(file.size_bytes for file in content.files),
            ),
        )
        for name, version in self._connection.execute(
            "SELECT name, version FROM versions WHERE digest = ?", (content.facts.digest,)
        ).fetchall():
            self._touch(name, version)

    def drop_content(self, digest: str) -> None:
        self._connection.execute("DELETE FROM contents WHERE digest = ?", (digest,))

    def add_version(
        self, name: str, version: int, digest: str, labels: Mapping[str, str], description: str
    ) -> None:
        now_s = time.time()
        self._connection.execute(
            "INSERT INTO names VALUES (?1, ?2) ON CONFLICT (name) DO UPDATE SET last_version = ?2",
            (name, version),
        )
        self._connection.execute(
            "INSERT INTO versions VALUES (?, ?, ?, 0, ?, ?, ?, ?, ?)",
            (name, version, digest, json.dumps(dict(labels)), description, _new_etag(), now_s, now_s),
        )

    def remove_version(self, name: str, version: int) -> None:
        self._connection.execute("DELETE FROM versions WHERE name = ? AND version = ?", (name, version))

    def set_alias(self, name: str, alias: str, version: int) -> None:
        """Points the alias at a version, away from wherever it pointed."""
        self.remove_alias(name, alias)
        self._connection.execute("INSERT INTO aliases VALUES (?, ?, ?)", (name, alias, version))
        self._touch(name, version)

    def remove_alias(self, name: str, alias: str) -> None:
        before = self.aliased(name, alias)
        if before is not None:
            self._connection.execute("DELETE FROM aliases WHERE name = ? AND alias = ?", (name, alias))
            self._touch(name, before.version)

    def set_pinned(self, name: str, version: int, pinned: bool) -> None:
        self._connection.execute(
            "UPDATE versions SET pinned = ? WHERE name = ? AND version = ?", (pinned, name, version)
        )
        self._touch(name, version)

    def set_labels(self, name: str, version: int, labels: Mapping[str, str]) -> None:
        self._connection.execute(
            "UPDATE versions SET labels = ? WHERE name = ? AND version = ?",
            (json.dumps(dict(labels)), name, version),
        )
        self._touch(name, version)

    def _touch(self, name: str, version: int) -> None:
        self._connection.execute(
            "UPDATE versions SET etag = ?, updated_s = ? WHERE name = ? AND version = ?",
            (_new_etag(), time.time(), name, version),
        )


class Catalogue:
    """The database of one store. Thread-safe; other processes may have it open too."""

    def __init__(self, path: Path) -> None:
        with _storage_errors():
            self._writer = _connect(path)
            _prepare(self._writer)
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


def _prepare(connection: sqlite3.Connection) -> None:
    connection.execute("BEGIN IMMEDIATE")
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version == 0:
        for statement in _SCHEMA.split(";"):
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
    connection.execute("COMMIT")
    if version not in (0, _SCHEMA_VERSION):
        raise AdapterCorruptError(
            f"the adapter store has catalogue version {version}, this server knows {_SCHEMA_VERSION}; "
            "start the server version that wrote it, or choose another --store"
        )


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


def _record(row: sqlite3.Row) -> AdapterRecord:
    return AdapterRecord(
        name=row["name"],
        version=row["version"],
        facts=_facts(row["facts"]),
        files=_files(row["files"]),
        etag=row["etag"],
        state=AdapterState(row["state"]),
        pinned=bool(row["pinned"]),
        aliases=tuple(sorted((row["aliases"] or "").split())),
        labels=json.loads(row["labels"]),
        description=row["description"],
        created_s=row["created_s"],
        updated_s=row["updated_s"],
        error=row["error"],
    )


def _content(row: sqlite3.Row) -> Content:
    return Content(_facts(row["facts"]), _files(row["files"]), AdapterState(row["state"]), row["error"])


@lru_cache(maxsize=1024)  # long lists of modules, read with every request
def _facts(text: str) -> AdapterFacts:
    members: dict[str, Any] = json.loads(text)
    for field in ("target_modules", "matched_modules"):
        members[field] = tuple(members[field])
    return AdapterFacts(**members)


@lru_cache(maxsize=1024)
def _files(text: str) -> tuple[StoredFile, ...]:
    return tuple(StoredFile(**file) for file in json.loads(text))


def _new_etag() -> str:
    return secrets.token_hex(8)
