"""What can be changed in a catalogue's tables. Knows no files, no rules, no connections."""

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict

from adapters.rows import Content, Rows


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
        self,
        name: str,
        version: int,
        digest: str,
        labels: Mapping[str, str],
        description: str,
        created_s: float | None = None,
    ) -> None:
        """Lists a version; created_s is None for one that is made now."""
        now_s = time.time()
        created_s = now_s if created_s is None else created_s
        self._connection.execute(
            "INSERT INTO names VALUES (?1, ?2) ON CONFLICT (name) DO UPDATE SET last_version = ?2",
            (name, version),
        )
        self._connection.execute(
            "INSERT INTO versions VALUES (?, ?, ?, 0, ?, ?, ?, ?, ?)",
            (
                name,
                version,
                digest,
                json.dumps(dict(labels)),
                description,
                _new_etag(),
                created_s or now_s,
                now_s,
            ),
        )

    def raise_last_version(self, name: str, version: int) -> None:
        """No number up to this one is given to a version of the name from now on."""
        self._connection.execute(
            "INSERT INTO names VALUES (?1, ?2) "
            "ON CONFLICT (name) DO UPDATE SET last_version = max(last_version, ?2)",
            (name, version),
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


def _new_etag() -> str:
    return secrets.token_hex(8)
