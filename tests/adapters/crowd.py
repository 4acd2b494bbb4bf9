"""A store with very many adapters, made quickly: copies of one real adapter under other digests. No torch."""

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path


def crowd(root: Path, count: int, names: int) -> None:
    """Adds versions to a store that nobody has open and that holds exactly one adapter.

    Each has a content of its own, whose files are hard links to those of the one that is there, so that every
    one of them can be served.
    """
    with closing(sqlite3.connect(root / "catalogue.sqlite3", isolation_level=None)) as connection:
        ((digest, facts, files, size_bytes),) = connection.execute(
            "SELECT digest, facts, files, size_bytes FROM contents"
        ).fetchall()
        original = _blob(root, digest)
        connection.execute("BEGIN")
        for name, version, copy in _copies(count, names):
            _blob(root, copy).mkdir(mode=0o700)
            for file in original.iterdir():
                os.link(file, _blob(root, copy) / file.name)
            text = json.dumps(json.loads(facts) | {"digest": copy})
            connection.execute(
                "INSERT INTO contents VALUES (?, 'READY', '', ?, ?, ?)", (copy, text, files, size_bytes)
            )
            connection.execute(
                "INSERT INTO names VALUES (?1, ?2) ON CONFLICT (name) DO UPDATE SET last_version = ?2",
                (name, version),
            )
            connection.execute(
                "INSERT INTO versions VALUES (?, ?, ?, 0, ?, '', ?, 1.0, 1.0)",
                (name, version, copy, json.dumps({"even": str(version % 2 == 0)}), copy[7:23]),
            )
        connection.execute("COMMIT")


def _copies(count: int, names: int) -> Iterator[tuple[str, int, str]]:
    for index in range(count):
        copy = f"sha256:{hashlib.sha256(f'copy {index}'.encode()).hexdigest()}"
        yield f"crowd-{index % names:05}", index // names + 1, copy


def _blob(root: Path, digest: str) -> Path:
    return root / "blobs/sha256" / digest.removeprefix("sha256:")
