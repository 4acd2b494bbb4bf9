"""The store's promises on quiet days: versions, aliases, pages and deletion."""

import stat
import time
from pathlib import Path

import pytest

from adapters.catalogue import Catalogue
from adapters.errors import (
    AdapterCorruptError,
    AdapterExistsError,
    AdapterNotFoundError,
    CapacityError,
    InvalidAdapterError,
    StaleEtagError,
)
from adapters.facts import AdapterState
from adapters.files import BUNDLE_FILE, CONFIG_FILE, WEIGHTS_FILE
from adapters.rows import Content
from adapters.store import AdapterStore
from tests.adapters.staging import digest_of, facts_of, publish, references, snapshot, stage, staged_by_anyone


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
    assert staged_by_anyone(root) == []


def test_a_fixed_version_is_taken_only_by_its_own_content(store: AdapterStore) -> None:
    assert publish(store, "sql", "a", version=5).version == 5
    assert publish(store, "sql", "a", version=5).version == 5
    with pytest.raises(AdapterExistsError, match="sql@5 has other content"):
        publish(store, "sql", "b", version=5)
    with pytest.raises(AdapterExistsError, match="use 6 or more"):
        publish(store, "sql", "b", version=3)
    assert publish(store, "sql", "a", version=7).version == 7
    assert publish(store, "sql", "b").version == 8
    assert references(store) == ["sql@5", "sql@7", "sql@8"]


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
    before = snapshot(root / "blobs")
    with pytest.raises(AdapterExistsError):
        store.publish("sql", staged, facts_of("b"), version=1)
    assert snapshot(root / "blobs") == before
    assert (staged / WEIGHTS_FILE).read_text() == "b"
    store.discard(staged)
    store.discard(staged)
    assert staged_by_anyone(root) == []


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


def test_an_alias_moves_only_from_where_it_was_seen(store: AdapterStore) -> None:
    for content in ("a", "b", "c"):
        publish(store, "sql", content)
    assert store.update("sql", 1, set_aliases=["prod"], aliases_from=0).aliases == ("prod",)
    with pytest.raises(StaleEtagError, match="sql:prod is at sql@1, and was to be moved from no version"):
        store.update("sql", 2, set_aliases=["prod"], aliases_from=0)
    store.update("sql", 2, set_aliases=["prod"], aliases_from=1)
    third = store.get("sql@3")  # which the other move does not touch: its etag would notice nothing
    with pytest.raises(StaleEtagError, match="sql:prod is at sql@2, and was to be moved from sql@1"):
        store.update("sql", 3, etag=third.etag, set_aliases=["prod"], aliases_from=1)
    assert store.get("sql@3") == third
    store.update("sql", 2, remove_aliases=["prod"])
    with pytest.raises(StaleEtagError, match="sql:prod is at no version, and was to be moved from sql@2"):
        store.update("sql", 3, set_aliases=["prod"], aliases_from=2)


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
    assert references(store, page_token=token, name="a") == ["a@4", "a@5"]


def test_listing_filters(store: AdapterStore) -> None:
    for name, labels in (("a", {"team": "x", "tier": "1"}), ("b", {"team": "x"}), ("c", {})):
        store.publish(name, stage(store, name), facts_of(name), labels=labels)
    store.mark_failed(digest_of("b"), "broken")
    assert references(store, labels={"team": "x"}) == ["a@1", "b@1"]
    assert references(store, labels={"team": "x", "tier": "1"}) == ["a@1"]
    assert references(store, labels={"team": "y"}) == []
    assert references(store, state=AdapterState.FAILED) == ["b@1"]
    assert references(store, state=AdapterState.READY, labels={"team": "x"}) == ["a@1"]
    assert references(store, name="c") == ["c@1"]
    assert references(store, name="d") == []


@pytest.mark.parametrize(
    "token", ["x", "====", "bnVsbA==", "WyJhIl0=", "WyIuLi8iLCAxXQ==", "\x00", "é", "WyJhIiwgInkiXQ=="]
)
def test_a_made_up_page_token_is_refused(token: str, store: AdapterStore) -> None:
    with pytest.raises(InvalidAdapterError) as refusal:
        store.list(page_token=token)
    assert refusal.value.reason == "BAD_PAGE_TOKEN"
    with pytest.raises(InvalidAdapterError):
        store.list(page_size=0)


def test_ten_thousand_adapters_are_no_burden(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "catalogue.sqlite3")
    with catalogue.writing() as rows:
        for index in range(10_000):
            rows.put_content(Content(facts_of(str(index)), (), AdapterState.READY, ""))
            rows.add_version(
                f"adapter-{index:05}", 1, digest_of(str(index)), {"even": str(index % 2 == 0)}, ""
            )
    began_s = time.perf_counter()
    with catalogue.reading() as rows:
        page = rows.page(
            after=("adapter-05000", 1), name=None, state=None, labels={"even": "True"}, limit=100
        )
        for index in range(0, 10_000, 100):
            assert rows.newest(f"adapter-{index:05}") is not None
        assert rows.with_digest(digest_of("77")) is not None
    assert time.perf_counter() - began_s < 0.5
    assert [record.name for record in page] == [f"adapter-{index:05}" for index in range(5002, 5202, 2)]
    catalogue.close()


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
    assert staged_by_anyone(root) == []
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
    assert references(store) == ["sql@1", "sql@2"]
    assert store.delete("sql@2", etag=etag) == [digest_of("b")]
    assert store.delete("sql") == [digest_of("a")]
