"""The store's promises: versions, aliases, deletion, damage, hostile names, many threads, several processes."""

import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adapters.catalogue import Content
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
from adapters.files import BUNDLE_FILE, CONFIG_FILE, WEIGHTS_FILE
from adapters.names import AliasOf, ContentOf, NewestOf, VersionOf, parse_reference
from adapters.store import AdapterStore
from tests.adapters.staging import digest_of, facts_of, publish, stage


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(root: Path) -> Iterator[AdapterStore]:
    with AdapterStore(root) as store:
        yield store


def _references(store: AdapterStore, **filters: Any) -> list[str]:
    return [record.reference for record in store.list(**filters)[0]]


def _snapshot(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# Publishing


def test_a_publish_is_there_at_once_and_after_a_restart(root: Path) -> None:
    began_s = time.time()
    with AdapterStore(root) as store:
        record, created = store.publish(
            "sql", stage(store, "one"), facts_of("one"), labels={"team": "data"}, description="first\ntry"
        )
        assert created
        assert store.resolve("sql") == record
    with AdapterStore(root) as store:
        assert store.resolve("sql") == record
        assert (store.path_of(digest_of("one")) / WEIGHTS_FILE).read_text() == "one"
        store.verify(digest_of("one"))
        assert store.total_bytes() == 5
    assert (record.name, record.version, record.state, record.error) == ("sql", 1, AdapterState.READY, "")
    assert (record.labels, record.description, record.aliases, record.pinned) == (
        {"team": "data"},
        "first\ntry",
        (),
        False,
    )
    assert record.facts == facts_of("one")
    assert [file.name for file in record.files] == [CONFIG_FILE, WEIGHTS_FILE]
    assert began_s <= record.created_s == record.updated_s <= time.time()


def test_versions_count_up_and_the_name_is_the_newest(store: AdapterStore) -> None:
    assert [publish(store, "sql", content).version for content in ("a", "b", "c")] == [1, 2, 3]
    assert store.resolve("sql").facts.digest == digest_of("c")
    assert store.resolve("sql@2").facts.digest == digest_of("b")
    assert store.resolve(digest_of("a")).reference == "sql@1"


def test_the_same_content_is_one_version_of_a_name_and_one_blob_of_all(
    store: AdapterStore, root: Path
) -> None:
    first = publish(store, "sql", "a")
    publish(store, "sql", "b")
    again, created = store.publish("sql", stage(store, "a"), facts_of("a"), labels={"ignored": "yes"})
    assert (again, created) == (first, False)
    assert publish(store, "other", "a").reference == "other@1"
    assert len(list((root / "blobs/sha256").iterdir())) == 2
    assert _staged(root) == []


def _staged(root: Path) -> list[str]:
    return [str(path) for path in (root / "staging").glob("*/*")]


def test_a_fixed_version_is_taken_only_by_its_own_content(store: AdapterStore) -> None:
    assert publish(store, "sql", "a", version=5).version == 5
    assert publish(store, "sql", "a", version=5).version == 5
    with pytest.raises(AdapterExistsError, match="sql@5 has other content"):
        publish(store, "sql", "b", version=5)
    with pytest.raises(AdapterExistsError, match="use 6 or more"):
        publish(store, "sql", "b", version=3)
    assert publish(store, "sql", "a", version=7).version == 7
    assert publish(store, "sql", "b").version == 8
    assert _references(store) == ["sql@5", "sql@7", "sql@8"]


def test_version_numbers_are_never_used_again(store: AdapterStore) -> None:
    publish(store, "sql", "a")
    publish(store, "sql", "b")
    store.delete("sql@2")
    with pytest.raises(AdapterExistsError, match="never used again"):
        publish(store, "sql", "c", version=2)
    assert publish(store, "sql", "c").version == 3
    store.delete("sql", all_versions=True)
    assert publish(store, "sql", "a").version == 4


def test_version_numbers_end(store: AdapterStore) -> None:
    publish(store, "sql", "a", version=2**31)
    with pytest.raises(CapacityError, match="another name"):
        publish(store, "sql", "b")
    for version in (0, -1, 2**31 + 1):
        with pytest.raises(InvalidAdapterError, match="no version"):
            publish(store, "other", "b", version=version)


def test_a_refused_publish_leaves_nothing_and_its_staging_to_the_caller(
    store: AdapterStore, root: Path
) -> None:
    publish(store, "sql", "a", version=1)
    staged = stage(store, "b")
    before = _snapshot(root / "blobs")
    with pytest.raises(AdapterExistsError):
        store.publish("sql", staged, facts_of("b"), version=1)
    assert _snapshot(root / "blobs") == before
    assert (staged / WEIGHTS_FILE).read_text() == "b"
    store.discard(staged)
    store.discard(staged)
    assert _staged(root) == []


def test_files_that_changed_after_their_check_are_not_published(store: AdapterStore) -> None:
    staged = stage(store, "a")
    (staged / WEIGHTS_FILE).write_text("a longer one")
    with pytest.raises(AdapterCorruptError, match="changed after they were checked"):
        store.publish("sql", staged, facts_of("a"))
    with pytest.raises(AdapterNotFoundError):
        store.get("sql")


def test_only_an_adapters_own_regular_files_are_published(store: AdapterStore, tmp_path: Path) -> None:
    for name, reason in (("evil.py", "UNEXPECTED_FILE"), (BUNDLE_FILE, "NOT_A_FILE")):
        staged = stage(store, "a")
        (staged / name).symlink_to(tmp_path / "canary")
        with pytest.raises(InvalidAdapterError) as refusal:
            store.publish("sql", staged, facts_of("a"))
        assert refusal.value.reason == reason
    with pytest.raises(ValueError, match="not from new_staging"):
        store.publish("sql", tmp_path, facts_of("a"))


def test_published_files_are_private_and_read_only(store: AdapterStore, root: Path) -> None:
    publish(store, "sql", "a")
    folder = store.path_of(digest_of("a"))
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o400}
    for private in (root, root / "blobs", root / "blobs/sha256", root / "staging", folder):
        assert stat.S_IMODE(private.stat().st_mode) == 0o700


def test_content_checked_for_another_base_gets_its_new_facts(store: AdapterStore) -> None:
    publish(store, "sql", "a")
    record, created = store.publish("sql", stage(store, "a"), facts_of("a", fingerprint="sha256:new"))
    assert (record.facts.base_fingerprint, created) == ("sha256:new", False)


# References


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("sql", NewestOf("sql")),
        ("a", NewestOf("a")),
        ("0.9_b-c", NewestOf("0.9_b-c")),
        ("a" * 128, NewestOf("a" * 128)),
        ("sql@3", VersionOf("sql", 3)),
        ("sql@2147483648", VersionOf("sql", 2**31)),
        ("sql:prod", AliasOf("sql", "prod")),
        ("sql:v1.2-rc", AliasOf("sql", "v1.2-rc")),
        ("sha256:" + "0f" * 32, ContentOf("sha256:" + "0f" * 32)),
    ],
)
def test_references_are_read(text: str, parsed: object) -> None:
    assert parse_reference(text) == parsed


HOSTILE = [
    "", " ", "..", "a..b", "../a", "a/b", "/etc/passwd", "a\\b", "a\x00b", "a\n", "\na", "a b", ".a", "a.", "-a", "a-",
    "_a", "Sql", "SQL", "ä", "аdapter", "ａ", "a\u200bb", "ﬁ", "①", "٣", "a" * 129, "%2e%2e", "~", "*", "con:",
    "sha256", "sql@", "sql@0", "sql@-1", "sql@03", "sql@x", "sql@1.0", "sql@2147483649", "sql@" + "9" * 99, "sql@٣",
    "sql:", "sql:3", "sql:33", "sql:Prod", "sql:a..b", "sql:a/b", "sql:prod@3", "sql@3:prod", "sql@3@4", "sql:a:b",
    "@3", ":prod", "sha256:", "sha256:" + "0" * 63, "sha256:" + "0" * 65, "sha256:" + "A" * 64,
    "sha256:../../../../etc", "sha256:" + "0" * 63 + "\n",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_anything_else_is_refused_everywhere_and_touches_nothing(
    text: str, store: AdapterStore, root: Path, tmp_path: Path
) -> None:
    publish(store, "sql", "a")
    before = _snapshot(tmp_path)
    for use in (store.resolve, store.get, store.delete):
        with pytest.raises(InvalidAdapterError) as refusal:
            use(text)
        assert refusal.value.reason in ("BAD_NAME", "BAD_REFERENCE", "BAD_ALIAS")
        assert str(refusal.value).isprintable()
    for by_digest in (store.path_of, store.verify, store.remove_blob, store.facts_of):
        with pytest.raises(InvalidAdapterError):
            by_digest(text)
    staged = stage(store, "b")
    with pytest.raises(InvalidAdapterError):
        store.publish(text, staged, facts_of("b"))
    with pytest.raises(InvalidAdapterError):
        store.update("sql", 1, set_aliases=[text])
    store.discard(staged)
    assert _snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("nosql", "no adapter 'nosql'"),
        ("sql@9", "has no version 9; newest version: 2, aliases: prod"),
        ("sql:dev", "has no alias 'dev'; newest version: 2, aliases: prod"),
        (digest_of("x"), "no adapter has the digest"),
    ],
)
def test_what_is_not_there_is_said_precisely(reference: str, message: str, store: AdapterStore) -> None:
    publish(store, "sql", "a")
    publish(store, "sql", "b")
    store.update("sql", 1, set_aliases=["prod"])
    for use in (store.resolve, store.get):
        with pytest.raises(AdapterNotFoundError, match=message):
            use(reference)


# Updating


def test_an_alias_moves_between_versions(store: AdapterStore) -> None:
    for content in ("a", "b"):
        publish(store, "sql", content)
    assert store.update("sql", 1, set_aliases=["prod", "stable"]).aliases == ("prod", "stable")
    before = store.get("sql@1")
    assert store.update("sql", 2, set_aliases=["prod"]).aliases == ("prod",)
    assert store.resolve("sql:prod").version == 2
    after = store.get("sql@1")
    assert after.aliases == ("stable",)
    assert after.etag != before.etag
    with pytest.raises(AdapterNotFoundError, match="sql@1 has no alias 'prod'"):
        store.update("sql", 1, remove_aliases=["prod"])
    assert store.update("sql", 2, remove_aliases=["prod"]).aliases == ()
    store.delete("sql@1")
    with pytest.raises(AdapterNotFoundError):
        store.resolve("sql:stable")


def test_an_update_with_a_stale_etag_changes_nothing(store: AdapterStore) -> None:
    first = publish(store, "sql", "a")
    second = store.update("sql", 1, etag=first.etag, pinned=True, labels={"team": "x"})
    assert (second.pinned, second.labels) == (True, {"team": "x"})
    assert second.etag != first.etag
    with pytest.raises(StaleEtagError):
        store.update("sql", 1, etag=first.etag, pinned=False, set_aliases=["prod"])
    with pytest.raises(StaleEtagError):
        store.delete("sql@1", etag=first.etag)
    assert store.get("sql@1") == second
    assert store.update("sql", 1, labels={}).labels == {}
    assert store.get("sql@1").pinned


def test_an_update_is_all_or_nothing(store: AdapterStore) -> None:
    before = publish(store, "sql", "a")
    with pytest.raises(InvalidAdapterError):
        store.update("sql", 1, set_aliases=["prod"], pinned=True, labels={"Bad Key": "x"})
    with pytest.raises(AdapterNotFoundError):
        store.update("sql", 1, set_aliases=["prod"], remove_aliases=["dev"])
    assert store.get("sql@1") == before


@pytest.mark.parametrize(
    "labels",
    [
        {"": "x"},
        {"A": "x"},
        {"a" * 64: "x"},
        {"k": "x" * 257},
        {"k": "a\x00"},
        {"k": "\ud800"},
        {str(i): "" for i in range(33)},
    ],
)
def test_labels_are_bounded(labels: dict[str, str], store: AdapterStore) -> None:
    with pytest.raises(InvalidAdapterError):
        store.publish("sql", stage(store, "a"), facts_of("a"), labels=labels)
    with pytest.raises(InvalidAdapterError):
        store.publish("sql", stage(store, "a"), facts_of("a"), description="x\x00")


# Listing


def test_pages_cover_everything_once_in_order(store: AdapterStore) -> None:
    for name in ("b", "a", "c"):
        for content in range(4):
            publish(store, name, f"{name}{content}")
    everything = [f"{name}@{version}" for name in "abc" for version in (1, 2, 3, 4)]
    for page_size in (1, 5, 11, 12, 13, 5000):
        seen: list[str] = []
        token = ""
        while True:
            page, token = store.list(page_size=page_size, page_token=token)
            assert 0 < len(page) <= page_size
            seen += [record.reference for record in page]
            if not token:
                break
        assert seen == everything
    page, token = store.list(page_size=2)
    store.delete("a@3")
    publish(store, "a", "new")
    assert _references(store, page_token=token, name="a") == ["a@4", "a@5"]


def test_listing_filters(store: AdapterStore) -> None:
    for name, labels in (("a", {"team": "x", "tier": "1"}), ("b", {"team": "x"}), ("c", {})):
        store.publish(name, stage(store, name), facts_of(name), labels=labels)
    store.mark_failed(digest_of("b"), "broken")
    assert _references(store, labels={"team": "x"}) == ["a@1", "b@1"]
    assert _references(store, labels={"team": "x", "tier": "1"}) == ["a@1"]
    assert _references(store, labels={"team": "y"}) == []
    assert _references(store, state=AdapterState.FAILED) == ["b@1"]
    assert _references(store, state=AdapterState.READY, labels={"team": "x"}) == ["a@1"]
    assert _references(store, name="c") == ["c@1"]
    assert _references(store, name="d") == []


@pytest.mark.parametrize(
    "token", ["x", "====", "bnVsbA==", "WyJhIl0=", "WyIuLi8iLCAxXQ==", "\x00", "é", "WyJhIiwgInkiXQ=="]
)
def test_a_made_up_page_token_is_refused(token: str, store: AdapterStore) -> None:
    with pytest.raises(InvalidAdapterError) as refusal:
        store.list(page_token=token)
    assert refusal.value.reason == "BAD_PAGE_TOKEN"
    with pytest.raises(InvalidAdapterError):
        store.list(page_size=0)


def test_ten_thousand_adapters_are_no_burden(root: Path) -> None:
    with AdapterStore(root) as store, store._catalogue.writing() as rows:
        store._recover = None  # type: ignore[method-assign,assignment]  # the blobs are not there
        for index in range(10_000):
            rows.put_content(Content(facts_of(str(index)), (), AdapterState.READY, ""))
            rows.add_version(
                f"adapter-{index:05}", 1, digest_of(str(index)), {"even": str(index % 2 == 0)}, ""
            )
        rows._connection.execute("COMMIT")
        rows._connection.execute("BEGIN")
        began_s = time.perf_counter()
        page, token = store.list(page_size=100, labels={"even": "True"})
        for index in range(0, 10_000, 100):
            store.resolve(f"adapter-{index:05}")
        assert time.perf_counter() - began_s < 2
        assert [record.name for record in page] == [f"adapter-{index:05}" for index in range(0, 200, 2)]
        assert token


# Deleting


def test_deleted_versions_are_gone_and_their_files_stay_until_removed(
    store: AdapterStore, root: Path
) -> None:
    publish(store, "sql", "a")
    digest = digest_of("a")
    assert store.delete("sql@1") == [digest]
    for use in (store.resolve, store.get):
        for reference in ("sql", "sql@1", digest):
            with pytest.raises(AdapterNotFoundError):
                use(reference)
    store.verify(digest)  # a running request may still load it
    assert store.facts_of(digest) == facts_of("a")
    assert (store.path_of(digest) / WEIGHTS_FILE).exists()
    assert store.total_bytes() == 3

    store.remove_blob(digest)
    for use in (store.path_of, store.facts_of, store.verify):
        with pytest.raises(AdapterNotFoundError):
            use(digest)
    assert store.total_bytes() == 0
    assert list((root / "blobs/sha256").iterdir()) == []
    assert _staged(root) == []
    store.remove_blob(digest)


def test_content_that_another_version_has_is_kept(store: AdapterStore) -> None:
    for name in ("sql", "other"):
        publish(store, name, "a")
    assert store.delete("sql@1") == []
    store.remove_blob(digest_of("a"))
    store.verify(digest_of("a"))
    assert store.delete("other") == [digest_of("a")]
    assert publish(store, "third", "a").state == AdapterState.READY
    store.remove_blob(digest_of("a"))  # the deletion's late clean-up must not take it from its new owner
    store.verify(digest_of("a"))


def test_a_deletion_says_exactly_what_it_means(store: AdapterStore) -> None:
    for content in ("a", "b"):
        publish(store, "sql", content)
    store.update("sql", 1, set_aliases=["prod"])
    etag = store.get("sql@2").etag
    for reference, options, message in (
        ("sql", {}, "has 2 versions"),
        ("sql:prod", {}, "by name@version"),
        (digest_of("a"), {}, "by name@version"),
        ("sql@1", {"all_versions": True}, "bare name"),
        ("sql", {"all_versions": True, "etag": etag}, "guards one version"),
    ):
        with pytest.raises(InvalidAdapterError, match=message):
            store.delete(reference, **options)
    for reference in ("nosql", "sql@3"):
        with pytest.raises(AdapterNotFoundError):
            store.delete(reference)
    with pytest.raises(AdapterNotFoundError):
        store.delete("nosql", all_versions=True)
    assert _references(store) == ["sql@1", "sql@2"]
    assert store.delete("sql@2", etag=etag) == [digest_of("b")]
    assert store.delete("sql") == [digest_of("a")]


# Damage


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
    assert (store.get("sql@2").state, store.get("sql@2").error) == (AdapterState.FAILED, "bit rot")
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
        assert len(list((root / "staging").iterdir())) == 2  # this session and its lock
    assert (canary / "file").read_text() == "precious"


def test_a_link_in_place_of_a_folder_is_not_used(root: Path, tmp_path: Path) -> None:
    root.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (root / "blobs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterCorruptError, match="is a link"):
        AdapterStore(root)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_damaged_or_later_catalogue_is_said_to_be(root: Path) -> None:
    with AdapterStore(root) as store, store._catalogue.writing() as rows:
        rows._connection.execute("PRAGMA user_version = 99")
    with pytest.raises(AdapterCorruptError, match="catalogue version 99"):
        AdapterStore(root)
    for path in root.glob("catalogue.sqlite3*"):
        path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(AdapterCorruptError, match="restore it from a backup"):
        AdapterStore(root)
    assert list((root / "staging").iterdir()) == []


# Disks


def test_a_full_disk_under_the_catalogue_is_survived(store: AdapterStore, root: Path) -> None:
    publish(store, "sql", "a")
    connection = store._catalogue._writer
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(CapacityError, match="full") as refusal:
        for index in range(100):
            staged = stage(store, f"{index}")
            store.publish("sql", staged, facts_of(f"{index}"), description="x" * 4000)
    assert refusal.value.reason == "NO_CAPACITY"
    assert staged.parent.exists()
    listed = {record.facts.digest.removeprefix("sha256:") for record in store.list(page_size=1000)[0]}
    assert {path.name for path in (root / "blobs/sha256").iterdir()} == listed
    store.resolve("sql@1")
    connection.execute("PRAGMA max_page_count = 1000000")
    publish(store, "sql", "after")


@pytest.mark.parametrize("error", [OSError(28, "No space left"), OSError(5, "Input/output error")])
@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_an_error_of_the_disk_publishes_nothing(
    error: OSError, call: str, store: AdapterStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, "sql", "a")
    before = _snapshot(root / "blobs")
    real = getattr(os, call)
    for failing in range(20):
        calls = iter(range(1000))

        def fail(
            *arguments: Any, failing: int = failing, calls: Iterator[int] = calls, **options: Any
        ) -> Any:
            if next(calls) == failing:
                raise error
            return real(*arguments, **options)

        staged = stage(store, "b")
        monkeypatch.setattr(os, call, fail)
        try:
            store.publish("sql", staged, facts_of("b"))
        except CapacityError as refusal:
            assert refusal.reason == ("NO_CAPACITY" if error.errno == 28 else "STORAGE_FAILED")
            assert str(root) not in str(refusal)
        else:
            assert failing > 0
            break
        finally:
            monkeypatch.undo()
        assert _snapshot(root / "blobs") == before
        assert _references(store) == ["sql@1"]
        store.discard(staged)
    assert _references(store) == ["sql@1", "sql@2"]


# Threads and processes


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
        assert _references(store) == ["sql@1"]
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
