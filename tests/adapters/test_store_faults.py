"""The store on bad days: damage, full disks, many threads, several processes."""

import contextlib
import errno
import itertools
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import (
    AdapterCorruptError,
    AdapterError,
    AdapterExistsError,
    AdapterNotFoundError,
    CapacityError,
    InvalidAdapterError,
    StaleEtagError,
)
from adapters.facts import AdapterState
from adapters.files import WEIGHTS_FILE
from adapters.store import AdapterStore
from tests.adapters.staging import digest_of, facts_of, publish, references, snapshot, stage


def _damage(root: Path, content: str) -> Path:
    path = root / "blobs/sha256" / digest_of(content).removeprefix("sha256:") / WEIGHTS_FILE
    path.chmod(0o600)
    return path


def test_a_flipped_byte_is_found_and_only_its_adapter_fails(store: AdapterStore, root: Path) -> None:
    publish(store, "sql", "good old")
    publish(store, "sql", "bad")
    publish(store, "other", "fine")
    _damage(root, "bad").write_text("bat")
    with pytest.raises(AdapterCorruptError, match=f"{WEIGHTS_FILE} has SHA-256"):
        store.verify(digest_of("bad"))
    store.mark_failed(digest_of("bad"), "bit rot")
    with pytest.raises(AdapterCorruptError, match="sql@2 is FAILED: bit rot") as refusal:
        store.resolve("sql@2")
    assert refusal.value.reason == "ADAPTER_FAILED"
    with pytest.raises(AdapterCorruptError):
        store.resolve(digest_of("bad"))
    assert store.get("sql@2").state is AdapterState.FAILED
    assert store.get("sql@2").error.startswith("bit rot; the damaged files were moved to quarantine/")
    assert store.resolve("sql").version == 1  # the newest that works
    assert store.resolve("other").version == 1

    record = publish(store, "sql", "bad")  # the same content again, sound this time
    assert (record.version, record.state, record.error) == (2, AdapterState.READY, "")
    store.verify(digest_of("bad"))


def test_a_name_with_no_version_that_works_says_why(store: AdapterStore) -> None:
    publish(store, "sql", "a")
    store.mark_failed(digest_of("a"), "bit rot")
    with pytest.raises(AdapterCorruptError, match="bit rot"):
        store.resolve("sql")
    with pytest.raises(AdapterNotFoundError):
        store.mark_failed(digest_of("b"), "not there")


@pytest.mark.parametrize(
    "damage", ["truncated", "file missing", "folder missing", "file a link", "folder a link"]
)
def test_damage_is_found_at_the_next_start_and_others_are_served(
    damage: str, root: Path, tmp_path: Path
) -> None:
    with AdapterStore(root) as store:
        publish(store, "sql", "victim")
        publish(store, "sql", "fine")
    canary = tmp_path / "canary"
    canary.mkdir()
    (canary / WEIGHTS_FILE).write_text("victim")
    path = _damage(root, "victim")
    if damage == "truncated":
        path.write_text("vic")
    elif damage == "file missing":
        path.unlink()
    elif damage == "file a link":
        path.unlink()
        path.symlink_to(canary / WEIGHTS_FILE)
    else:
        path.parent.rename(tmp_path / "elsewhere")
        if damage == "folder a link":
            path.parent.symlink_to(canary)

    with AdapterStore(root) as store:
        assert store.get("sql@1").state == AdapterState.FAILED
        assert "publish it again" in store.get("sql@1").error
        with pytest.raises(AdapterCorruptError):
            store.verify(digest_of("victim"))
        store.verify(store.resolve("sql").facts.digest)
        assert publish(store, "sql", "victim").state == AdapterState.READY
        store.verify(digest_of("victim"))
    assert (canary / WEIGHTS_FILE).read_text() == "victim"


def test_left_overs_are_removed_at_the_next_start_and_nothing_else(root: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    canary.mkdir()
    (canary / "file").write_text("precious")
    with AdapterStore(root) as store:
        publish(store, "sql", "a")
        publish(store, "gone", "deleted, not removed")
        store.delete("gone")
    orphan = root / "blobs/sha256" / ("0" * 64)
    orphan.mkdir()
    (orphan / WEIGHTS_FILE).write_text("orphan")
    (root / "blobs/sha256" / ("1" * 64)).symlink_to(canary)
    (root / "blobs/sha256/lost+found").mkdir()
    dead = root / "staging" / ("2" * 32)
    dead.mkdir()
    (dead / "tmpabc").mkdir()
    (dead / "link").symlink_to(canary)
    (root / "staging" / ("3" * 32)).symlink_to(canary)

    with AdapterStore(root) as store:
        store.verify(digest_of("a"))
        assert store.total_bytes() == 3
        assert {path.name for path in (root / "blobs/sha256").iterdir()} == {
            digest_of("a").removeprefix("sha256:"),
            "lost+found",
        }
        assert len(list((root / "staging").iterdir())) == 2  # this opening and its lock
    assert (canary / "file").read_text() == "precious"


def test_a_link_in_place_of_a_folder_is_not_used(root: Path, tmp_path: Path) -> None:
    root.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (root / "blobs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterCorruptError, match="is a link"):
        AdapterStore(root)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_damaged_or_later_catalogue_is_said_to_be(root: Path) -> None:
    with AdapterStore(root):
        pass
    with contextlib.closing(sqlite3.connect(root / "catalogue.sqlite3")) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(AdapterCorruptError, match="catalogue version 99"):
        AdapterStore(root)
    for path in root.glob("catalogue.sqlite3*"):
        path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(AdapterCorruptError, match="restore it from a backup"):
        AdapterStore(root)
    assert list((root / "staging").iterdir()) == []


def test_a_full_disk_under_the_catalogue_is_survived(store: AdapterStore, root: Path) -> None:
    publish(store, "sql", "a")
    connection = store._catalogue._writer  # the only way to make this database full without filling a disk
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count = {pages}")
    refused = None
    for index in range(100):
        staged = stage(store, f"{index}")
        try:
            store.publish("sql", staged, facts_of(f"{index}"), description="x" * 4000)
        except CapacityError as error:
            refused = error
            break
    assert refused is not None
    assert (refused.reason, "full" in str(refused)) == ("NO_CAPACITY", True)
    assert (staged / WEIGHTS_FILE).parent.parent.exists()
    listed = {record.facts.digest.removeprefix("sha256:") for record in store.list(page_size=1000)[0]}
    assert {path.name for path in (root / "blobs/sha256").iterdir()} == listed
    store.resolve("sql@1")
    connection.execute("PRAGMA max_page_count = 1000000")
    publish(store, "sql", "after")


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left"), OSError(errno.EIO, "Input/output error")]
)
@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_an_error_of_the_disk_publishes_nothing(
    error: OSError, call: str, store: AdapterStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, "sql", "a")
    before = snapshot(root / "blobs")
    for failing in range(20):
        staged = stage(store, "b")
        with monkeypatch.context() as patch:
            patch.setattr(os, call, _failing_at(failing, getattr(os, call), error))
            try:
                store.publish("sql", staged, facts_of("b"))
                break
            except CapacityError as refusal:
                refused = refusal
        assert refused.reason == ("NO_CAPACITY" if error.errno == errno.ENOSPC else "STORAGE_FAILED")
        assert str(root) not in str(refused)
        assert snapshot(root / "blobs") == before
        assert references(store) == ["sql@1"]
        store.discard(staged)
    assert failing > 0
    assert references(store) == ["sql@1", "sql@2"]
    store.verify(digest_of("b"))


def _failing_at(number: int, call: Callable[..., Any], error: OSError) -> Callable[..., Any]:
    """The call, except that its number-th time is an error of the disk."""
    calls = itertools.count()

    def counted(*arguments: Any, **options: Any) -> Any:
        if next(calls) == number:
            raise error
        return call(*arguments, **options)

    return counted


def test_publishes_of_one_name_at_once_are_versions_in_order(root: Path) -> None:
    """Two open stores are two processes as far as files, locks and SQLite are concerned."""
    with AdapterStore(root) as one, AdapterStore(root) as two:
        staged = [
            (store, stage(store, f"c{index % 6}"), f"c{index % 6}")
            for index, store in enumerate([one, two] * 8)
        ]
        outcomes: list[tuple[int, str, bool]] = []
        errors: list[BaseException] = []

        def run(store: AdapterStore, path: Path, content: str) -> None:
            try:
                record, created = store.publish("sql", path, facts_of(content))
                outcomes.append((record.version, record.facts.digest, created))
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=arguments) for arguments in staged]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert len(outcomes) == 16
        assert sorted(version for version, _, created in outcomes if created) == [1, 2, 3, 4, 5, 6]
        versions = {record.version: record.facts.digest for record in one.list(page_size=1000)[0]}
        assert {version: digest for version, digest, _ in outcomes} == versions
        for digest in versions.values():
            two.verify(digest)


def test_publish_resolve_and_delete_at_once_never_show_half_a_state(root: Path) -> None:
    stop = threading.Event()
    errors: list[BaseException] = []
    with AdapterStore(root) as store:
        publish(store, "sql", "kept")

        def churn(content: str) -> None:
            for _ in range(15):
                record = publish(store, "sql", content)
                for digest in store.delete(record.reference):
                    store.remove_blob(digest)

        def read() -> None:
            while not stop.is_set():
                record = store.resolve("sql")
                assert record.state == AdapterState.READY
                store.resolve("sql@1")
                store.verify(digest_of("kept"))
                store.list()

        def guarded(work: Any, *arguments: Any) -> None:
            try:
                work(*arguments)
            except BaseException as error:
                errors.append(error)

        readers = [threading.Thread(target=guarded, args=(read,)) for _ in range(2)]
        writers = [threading.Thread(target=guarded, args=(churn, content)) for content in ("x", "y", "z")]
        for thread in readers + writers:
            thread.start()
        for thread in writers:
            thread.join()
        stop.set()
        for thread in readers:
            thread.join()
        assert not errors
        assert references(store) == ["sql@1"]
        assert len(list((root / "blobs/sha256").iterdir())) == 1


def test_staging_of_a_living_process_is_left_alone(root: Path) -> None:
    with AdapterStore(root) as living:
        staged = stage(living, "a")
        with AdapterStore(root):
            assert (staged / WEIGHTS_FILE).exists()
        living.publish("sql", staged, facts_of("a"))
        living.verify(digest_of("a"))


def test_the_store_needs_no_torch() -> None:
    code = "import adapters.store, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_every_error_of_the_store_is_an_adapter_error_with_a_reason() -> None:
    for error in (
        InvalidAdapterError,
        AdapterNotFoundError,
        AdapterExistsError,
        StaleEtagError,
        CapacityError,
    ):
        assert issubclass(error, AdapterError)
        assert error("x").reason.isupper()
