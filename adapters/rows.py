"""What can be asked of a catalogue's tables. Knows no files, no rules, no connections; changes nothing.

A `Content` is what lies in one blob; versions point at it by digest. A deleted version is gone at once, its
content stays listed until its blob is removed.
"""

import json
import sqlite3
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from adapters.facts import AdapterFacts, AdapterRecord, AdapterState, StoredFile
from adapters.schema import KEPT_CHANGES


@dataclass(frozen=True, slots=True)
class Content:
    """What one blob holds and how it is."""

    facts: AdapterFacts
    files: tuple[StoredFile, ...]
    state: AdapterState
    error: str


@dataclass(frozen=True, slots=True)
class Change:
    """A version that changed, and how it is now.

    Attributes:
        record: None if it was deleted.
        is_orphan: no version has its content any more.
        is_pinned: a version with its content is.
    """

    sequence: int
    name: str
    version: int
    digest: str
    record: AdapterRecord | None
    is_orphan: bool
    is_pinned: bool


@dataclass(frozen=True, slots=True)
class Holding:
    """A content as far as its files are concerned."""

    digest: str
    files: tuple[StoredFile, ...]
    state: AdapterState
    is_referenced: bool


@dataclass(frozen=True, slots=True)
class Entry:
    """A version without what was found out about its tensors, so that thousands can be looked through."""

    name: str
    version: int
    digest: str
    state: AdapterState
    size_bytes: int
    pinned: bool
    aliases: tuple[str, ...]
    labels: Mapping[str, str]
    description: str
    created_s: float

    @property
    def reference(self) -> str:
        """ "name@3"."""
        return f"{self.name}@{self.version}"


# As adapters.names.is_visible; the tenant comes first.
_VISIBLE = "(?1 IS NULL OR instr(name, '.') = 0 OR substr(name, 1, instr(name, '.') - 1) = ?1)"


class Rows:
    """Questions to the catalogue, all answered from one moment."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def content(self, digest: str) -> Content | None:
        rows = self._connection.execute("SELECT * FROM contents WHERE digest = ?", (digest,))
        return next((_content(row) for row in rows), None)

    def holdings(self) -> Iterator[Holding]:
        """Every content's files, one after the other."""
        for row in self._connection.execute(
            "SELECT digest, files, state, EXISTS (SELECT 1 FROM versions v WHERE v.digest = c.digest) "
            "AS is_referenced FROM contents c"
        ):
            yield Holding(
                row["digest"],
                _files(row["files"]),
                AdapterState(row["state"]),
                bool(row["is_referenced"]),
            )

    def is_referenced(self, digest: str) -> bool:
        return bool(self._value("SELECT EXISTS (SELECT 1 FROM versions WHERE digest = ?)", digest))

    def is_pinned(self, digest: str) -> bool:
        """Whether any version with this content is."""
        return bool(self._value("SELECT EXISTS (SELECT 1 FROM versions WHERE digest = ? AND pinned)", digest))

    def pinned(self) -> dict[str, str]:
        """Every pinned content, with a name that pins it."""
        rows = self._connection.execute("SELECT digest, name FROM versions WHERE pinned")
        return {row["digest"]: row["name"] for row in rows}

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

    def with_digest(
        self, digest: str, name: str | None = None, tenant: str | None = None
    ) -> AdapterRecord | None:
        """The newest version with this content, of one name or of the first that the tenant sees."""
        return self._first(
            # _VISIBLE is a constant of this file; what callers give is bound.
            f"SELECT * FROM records WHERE {_VISIBLE} AND digest = ?2 AND (?3 IS NULL OR name = ?3) "  # noqa: S608
            "ORDER BY name, version DESC LIMIT 1",
            tenant,
            digest,
            name,
        )

    def versions(self, name: str) -> list[AdapterRecord]:
        rows = self._connection.execute("SELECT * FROM records WHERE name = ? ORDER BY version", (name,))
        return [_record(row) for row in rows]

    def with_content(
        self, digest: str, *, after: tuple[str, int] = ("", 0), limit: int
    ) -> list[AdapterRecord]:
        """Versions of any name with this content, after a (name, version), in that order."""
        rows = self._connection.execute(
            "SELECT * FROM records WHERE digest = ? AND (name, version) > (?, ?) "
            "ORDER BY name, version LIMIT ?",
            (digest, *after, limit),
        )
        return [_record(row) for row in rows]

    def entries(self, *, after: tuple[str, int] = ("", 0), limit: int | None = None) -> Iterator[Entry]:
        """Versions after a (name, version), in that order; all of them without a limit."""
        rows = self._connection.execute(
            """
            SELECT v.name, v.version, v.digest, v.pinned, v.labels, v.description, v.created_s,
                   c.state, c.size_bytes,
                   (SELECT group_concat(a.alias, ' ') FROM aliases a
                    WHERE a.name = v.name AND a.version = v.version) AS aliases
            FROM versions v JOIN contents c INDEXED BY contents_by_state ON c.digest = v.digest
            WHERE (v.name, v.version) > (?, ?) ORDER BY v.name, v.version LIMIT ?
            """,
            (*after, -1 if limit is None else limit),
        )
        for row in rows:
            yield Entry(
                name=row["name"],
                version=row["version"],
                digest=row["digest"],
                state=AdapterState(row["state"]),
                size_bytes=row["size_bytes"],
                pinned=bool(row["pinned"]),
                aliases=_aliases(row),
                labels=json.loads(row["labels"]),
                description=row["description"],
                created_s=row["created_s"],
            )

    def last_change(self) -> int:
        """The number of the newest change; 0 if there was none."""
        return int(self._value("SELECT coalesce(max(sequence), 0) FROM changes"))

    def knows_changes_since(self, sequence: int) -> bool:
        """Whether every change after this one is still known; only the newest are kept."""
        return self.last_change() - sequence < KEPT_CHANGES

    def changes(self, after: int, limit: int) -> list[Change]:
        """Versions that changed after a change, in order; each as it is now."""
        rows = self._connection.execute(
            "SELECT * FROM changes WHERE sequence > ? ORDER BY sequence LIMIT ?", (after, limit)
        ).fetchall()
        return [
            Change(
                sequence=row["sequence"],
                name=row["name"],
                version=row["version"],
                digest=row["digest"],
                record=self.record(row["name"], row["version"]),
                is_orphan=not self.is_referenced(row["digest"]),
                is_pinned=self.is_pinned(row["digest"]),
            )
            for row in rows
        ]

    def last_versions(self) -> dict[str, int]:
        """The highest version there ever was, by name."""
        rows = self._connection.execute("SELECT name, last_version FROM names")
        return {row["name"]: row["last_version"] for row in rows}

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
        tenant: str | None = None,
        limit: int,
    ) -> list[AdapterRecord]:
        """Records after a (name, version), in that order, that the tenant sees; with all of `labels`."""
        rows = self._connection.execute(
            f"""
            SELECT * FROM records
            WHERE {_VISIBLE}
              AND (name, version) > (?2, ?3) AND (?4 IS NULL OR name = ?4) AND (?5 IS NULL OR state = ?5)
              AND NOT EXISTS (
                SELECT 1 FROM json_each(?6) AS want WHERE NOT EXISTS (
                  SELECT 1 FROM json_each(labels) AS has WHERE has.key = want.key AND has.value = want.value))
            ORDER BY name, version LIMIT ?7
            """,  # noqa: S608 - constants of this file; what callers give is bound
            (tenant, *after, name, state, json.dumps(dict(labels)), limit),
        )
        return [_record(row) for row in rows]

    def failed(self) -> list[tuple[str, int, bool]]:
        """Digest and bytes of every FAILED content, and whether a version has it."""
        rows = self._connection.execute(
            "SELECT digest, size_bytes, EXISTS (SELECT 1 FROM versions v WHERE v.digest = c.digest) "
            "AS is_referenced FROM contents c INDEXED BY contents_by_state WHERE state = ?",
            (AdapterState.FAILED,),
        )
        return [(row["digest"], row["size_bytes"], bool(row["is_referenced"])) for row in rows]

    def total_bytes(self) -> int:
        return int(self._value("SELECT coalesce(sum(size_bytes), 0) FROM contents"))

    def usage_of(self, name: str) -> tuple[int, int]:
        """How many versions a name has, and their bytes together."""
        query = (
            "SELECT count(*), coalesce(sum(c.size_bytes), 0) "
            "FROM versions v JOIN contents c ON c.digest = v.digest WHERE v.name = ?"
        )
        versions, size_bytes = self._connection.execute(query, (name,)).fetchone()
        return versions, size_bytes

    def bytes_of_tenant(self, tenant: str) -> int:
        """Of all versions whose names are the tenant's; a content that two of them have counts twice."""
        query = (
            "SELECT coalesce(sum(c.size_bytes), 0) FROM versions v JOIN contents c ON c.digest = v.digest "
            "WHERE substr(v.name, 1, length(?1) + 1) = ?1 || '.'"
        )
        return int(self._value(query, tenant))

    def digests_of(self, files: Sequence[StoredFile]) -> list[str]:
        """The contents that have exactly these files."""
        size_bytes = sum(file.size_bytes for file in files)
        rows = self._connection.execute(
            "SELECT digest, files FROM contents WHERE size_bytes = ?", (size_bytes,)
        )
        return [row["digest"] for row in rows if frozenset(_files(row["files"])) == frozenset(files)]

    def unreferenced_bytes(self) -> int:
        """Of the contents that no version has."""
        return int(
            self._value(
                "SELECT coalesce(sum(size_bytes), 0) FROM contents c INDEXED BY contents_by_state "
                "WHERE NOT EXISTS (SELECT 1 FROM versions v WHERE v.digest = c.digest)"
            )
        )

    def _value(self, query: str, *values: object) -> Any:
        row = self._connection.execute(query, values).fetchone()
        return None if row is None else row[0]

    def _first(self, query: str, *values: object) -> AdapterRecord | None:
        row = self._connection.execute(query, values).fetchone()
        return None if row is None else _record(row)


def _record(row: sqlite3.Row) -> AdapterRecord:
    return AdapterRecord(
        name=row["name"],
        version=row["version"],
        facts=_facts(row["facts"]),
        files=_files(row["files"]),
        etag=row["etag"],
        state=AdapterState(row["state"]),
        pinned=bool(row["pinned"]),
        aliases=_aliases(row),
        labels=json.loads(row["labels"]),
        description=row["description"],
        created_s=row["created_s"],
        updated_s=row["updated_s"],
        error=row["error"],
    )


def _aliases(row: sqlite3.Row) -> tuple[str, ...]:
    return tuple(sorted((row["aliases"] or "").split()))


def _content(row: sqlite3.Row) -> Content:
    return Content(_facts(row["facts"]), _files(row["files"]), AdapterState(row["state"]), row["error"])


@lru_cache(maxsize=1024)  # long lists of modules, read with every request
def _facts(text: str) -> AdapterFacts:
    members: dict[str, Any] = json.loads(text)
    for field in ("target_modules", "matched_modules"):
        # All adapters of a base name the same modules: one copy of each name is enough.
        members[field] = tuple(map(sys.intern, members[field]))
    return AdapterFacts(**members)


@lru_cache(maxsize=1024)
def _files(text: str) -> tuple[StoredFile, ...]:
    return tuple(StoredFile(**file) for file in json.loads(text))
