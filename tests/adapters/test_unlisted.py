"""Content that is in the store and that nobody can name: for an adapter that is still being judged."""

from pathlib import Path

import pytest

from adapters.errors import AdapterCorruptError, AdapterNotFoundError
from adapters.files import WEIGHTS_FILE
from adapters.store import AdapterStore
from tests.adapters.staging import digest_of, facts_of, publish, references, snapshot, stage

DIGEST = digest_of("x")


def test_it_can_be_read_by_digest_and_not_be_named(store: AdapterStore) -> None:
    assert store.keep_unlisted(stage(store, "x"), facts_of("x"))
    assert (store.path_of(DIGEST) / WEIGHTS_FILE).read_text() == "x"
    assert store.facts_of(DIGEST) == facts_of("x")
    store.verify(DIGEST)
    assert references(store) == []
    for read in (store.get, store.resolve):
        with pytest.raises(AdapterNotFoundError):
            read(DIGEST)


def test_publishing_it_finds_it_there(store: AdapterStore, root: Path) -> None:
    staged = stage(store, "x")
    store.keep_unlisted(staged, facts_of("x"))
    inode = (store.path_of(DIGEST) / WEIGHTS_FILE).stat().st_ino
    record, created = store.publish("sql", staged, facts_of("x"))
    assert (created, record.reference, store.resolve("sql").facts.digest) == (True, "sql@1", DIGEST)
    assert (store.path_of(DIGEST) / WEIGHTS_FILE).stat().st_ino == inode
    assert not [path for path in snapshot(root) if path.startswith("staging/") and path.count("/") > 1]


def test_removing_it_leaves_nothing(store: AdapterStore, root: Path) -> None:
    before = snapshot(root / "blobs")
    staged = stage(store, "x")
    store.keep_unlisted(staged, facts_of("x"))
    store.remove_blob(DIGEST)
    store.discard(staged)
    assert snapshot(root / "blobs") == before
    assert store.total_bytes() == 0


def test_it_does_not_outlive_its_process(root: Path) -> None:
    with AdapterStore(root) as store:
        store.keep_unlisted(stage(store, "x"), facts_of("x"))
    with AdapterStore(root) as store:
        assert snapshot(root / "blobs" / "sha256") == set()
        with pytest.raises(AdapterNotFoundError):
            store.facts_of(DIGEST)


def test_what_somebody_has_published_stays_theirs(store: AdapterStore) -> None:
    publish(store, "sql", "x")
    assert not store.keep_unlisted(stage(store, "x"), facts_of("x"))
    store.remove_blob(DIGEST)
    assert store.resolve("sql").facts.digest == DIGEST
    store.verify(DIGEST)


def test_until_it_is_published_its_files_may_be_written_by_who_uploads_them(store: AdapterStore) -> None:
    staged = stage(store, "x")
    store.keep_unlisted(staged, facts_of("x"))
    assert (staged / WEIGHTS_FILE).stat().st_mode & 0o200
    store.publish("sql", staged, facts_of("x"))
    assert (store.path_of(DIGEST) / WEIGHTS_FILE).stat().st_mode & 0o777 == 0o400


def test_it_replaces_damaged_files_of_what_is_published(store: AdapterStore) -> None:
    publish(store, "sql", "x")
    path = store.path_of(DIGEST) / WEIGHTS_FILE
    path.unlink()
    store.mark_failed(DIGEST, "its weights are gone")
    assert not store.keep_unlisted(stage(store, "x"), facts_of("x"))
    store.verify(DIGEST)
    assert path.stat().st_mode & 0o777 == 0o400


def test_files_that_changed_after_the_checks_are_not_taken(store: AdapterStore, root: Path) -> None:
    staged = stage(store, "x")
    (staged / WEIGHTS_FILE).write_text("longer")
    with pytest.raises(AdapterCorruptError):
        store.keep_unlisted(staged, facts_of("x"))
    assert snapshot(root / "blobs" / "sha256") == set()
