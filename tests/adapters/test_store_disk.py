"""A disk that is full or broken while a store is changed or cleaned up: nothing is half done, all goes on."""

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import CapacityError
from adapters.retention import RetentionPolicy
from adapters.store import AdapterStore
from tests.adapters.staging import digest_of, facts_of, publish, references, stage

Change = Callable[[AdapterStore], object]

LONG = {f"k{index}": "x" * 250 for index in range(32)}
CHANGES: dict[str, Change] = {
    "update": lambda store: store.update("sql", 1, set_aliases=["new"], labels=LONG),
    "mark failed": lambda store: store.mark_failed(digest_of("a"), "x" * 100_000),
}


@pytest.fixture
def filled(store: AdapterStore) -> AdapterStore:
    for content in ("a", "b", "c"):
        publish(store, "sql", content)
    store.update("sql", 1, set_aliases=["prod"])
    return store


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_full_disk_changes_nothing(filled: AdapterStore, change: Change) -> None:
    connection = filled._catalogue._writer  # the only way to make this database full without filling a disk
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count = {pages}")
    refusal = None
    for index in range(100):  # until the free pages are used up
        before, last = filled.list(), filled.changes.last()
        try:
            change(filled)
            before, last = filled.list(), filled.changes.last()
            filled.publish("more", stage(filled, str(index)), facts_of(str(index)), labels=LONG)
        except CapacityError as error:
            refusal = error
            break
    assert refusal is not None
    assert refusal.reason == "NO_CAPACITY"
    assert (filled.list(), filled.changes.last()) == (before, last)
    with pytest.raises(CapacityError):
        filled.update("sql", 2, labels=LONG)
    filled.resolve("sql:prod")
    connection.execute("PRAGMA max_page_count = 1000000")
    change(filled)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_an_error_while_bytes_are_removed_leaves_them_for_later(
    error: int, call: str, filled: AdapterStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **options: Any) -> None:
        raise OSError(error, os.strerror(error))

    collected = filled.collect(RetentionPolicy(1, 0), dry_run=False)
    assert [version.reference for version in collected.versions] == ["sql@2"]
    with monkeypatch.context() as patch:
        patch.setattr(os, call, broken)
        with pytest.raises(CapacityError) as refusal:
            filled.remove_blob(digest_of("b"))
        assert str(root) not in str(refusal.value)
        with suppress(CapacityError):  # with `fsync` broken there is nothing left to move out of sight
            filled.recover()
    assert references(filled) == ["sql@1", "sql@3"]
    for content in ("a", "c"):
        filled.verify(digest_of(content))
    assert publish(filled, "again", "b").state == "READY"  # whatever became of its files meanwhile
    filled.verify(digest_of("b"))
    filled.delete("again")
    assert filled.remove_blob(digest_of("b"))
    assert len(list((root / "blobs/sha256").iterdir())) == 2
