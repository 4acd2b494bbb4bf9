"""The tables of a catalogue, and the way from each earlier version of them to today's. Knows no adapters."""

import sqlite3

from adapters.errors import AdapterCorruptError

KEPT_CHANGES = 100_000
"""Whoever follows the changes of a catalogue may be so many behind, and no more."""

_TABLES = (
    """
    CREATE TABLE contents (
        digest     TEXT PRIMARY KEY,
        state      TEXT NOT NULL,
        error      TEXT NOT NULL,
        facts      TEXT NOT NULL,
        files      TEXT NOT NULL,
        size_bytes INTEGER NOT NULL
    )
    """,
    """
    CREATE TABLE names (
        name         TEXT PRIMARY KEY,
        last_version INTEGER NOT NULL  -- outlives its versions: a number is never used again
    )
    """,
    """
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
    )
    """,
    "CREATE INDEX versions_by_digest ON versions (digest)",
    """
    CREATE TABLE aliases (
        name    TEXT NOT NULL,
        alias   TEXT NOT NULL,
        version INTEGER NOT NULL,
        PRIMARY KEY (name, alias),
        FOREIGN KEY (name, version) REFERENCES versions ON DELETE CASCADE
    )
    """,
    "CREATE INDEX aliases_by_version ON aliases (name, version)",
    """
    CREATE VIEW records AS
        SELECT v.*, c.state, c.error, c.facts, c.files,
               (SELECT group_concat(a.alias, ' ') FROM aliases a
                WHERE a.name = v.name AND a.version = v.version) AS aliases
        FROM versions v JOIN contents c ON c.digest = v.digest
    """,
)

# Which versions changed, in order, each once with its last change. Triggers write it, so that no way of
# changing a version can forget to. What happens to a content touches its versions, and is seen there.
_CHANGES = (
    """
    CREATE TABLE changes (
        sequence INTEGER PRIMARY KEY AUTOINCREMENT,
        name     TEXT NOT NULL,
        version  INTEGER NOT NULL,
        digest   TEXT NOT NULL,
        UNIQUE (name, version)
    )
    """,
    """
    CREATE TRIGGER version_added AFTER INSERT ON versions BEGIN
        INSERT OR REPLACE INTO changes (name, version, digest) VALUES (new.name, new.version, new.digest);
    END
    """,
    """
    CREATE TRIGGER version_updated AFTER UPDATE ON versions BEGIN
        INSERT OR REPLACE INTO changes (name, version, digest) VALUES (new.name, new.version, new.digest);
    END
    """,
    """
    CREATE TRIGGER version_removed AFTER DELETE ON versions BEGIN
        INSERT OR REPLACE INTO changes (name, version, digest) VALUES (old.name, old.version, old.digest);
    END
    """,
    """
    CREATE TRIGGER changes_are_bounded AFTER INSERT ON changes BEGIN
        DELETE FROM changes WHERE sequence <= new.sequence - {kept};
    END
    """.replace("{kept}", str(KEPT_CHANGES)),
)

# Without these, ten thousand long lists of modules are read to add up sizes or to find what is pinned.
_INDEXES = (
    "CREATE INDEX contents_by_size ON contents (size_bytes)",
    "CREATE INDEX contents_by_state ON contents (digest, state, size_bytes)",
    "CREATE INDEX versions_pinned ON versions (digest) WHERE pinned",
)

_MIGRATIONS = (_TABLES, _CHANGES + _INDEXES)
"""Statements that lead from version n to n + 1; a new catalogue starts at 0 and takes the same way."""

VERSION = len(_MIGRATIONS)


def migrate(connection: sqlite3.Connection) -> None:
    """Brings a catalogue to today's version, all of the way or not at all.

    Raises:
        AdapterCorruptError: a later version wrote it.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > VERSION:
            raise AdapterCorruptError(
                f"the adapter store has catalogue version {version}, this server knows {VERSION}; "
                "start the server version that wrote it, or choose another --store"
            )
        for statements in _MIGRATIONS[version:]:
            for statement in statements:
                connection.execute(statement)
        if version < VERSION:
            connection.execute(f"PRAGMA user_version = {VERSION}")
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
