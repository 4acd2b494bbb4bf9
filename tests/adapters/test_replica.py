"""Copies of a store at a URL: they follow it, fetch what is needed, and believe nothing."""

import json
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from adapters.bundle import Bundle
from adapters.errors import (
    AdapterCorruptError,
    CapacityError,
    InvalidAdapterError,
    ReadOnlyStoreError,
    StoreUnreachableError,
)
from adapters.facts import AdapterState, StoredFile
from adapters.files import WEIGHTS_FILE
from adapters.layout import BaseLayout
from adapters.manifest import facts_json
from adapters.mirror import files_of
from adapters.remote import RemotePlace, name_of, snapshot_of
from adapters.remote_push import push_store
from adapters.replica import ReplicaStore
from adapters.retention import RetentionPolicy
from adapters.store import AdapterStore
from tests.adapters.builders import put
from tests.adapters.published import blobs, listed, spoil, weights_of
from tests.adapters.staging import references, snapshot, staged_by_anyone


@pytest.fixture
def replica(origin: AdapterStore, place: RemotePlace, tmp_path: Path) -> Iterator[ReplicaStore]:
    """A copy of the origin, with no file yet."""
    push_store(origin, place)
    with ReplicaStore(tmp_path / "copies", place) as replica:
        assert replica.refresh()
        yield replica


def test_a_replica_lists_everything_and_fetches_what_is_needed(
    origin: AdapterStore, replica: ReplicaStore
) -> None:
    assert listed(replica) == listed(origin)
    assert (blobs(replica.root), replica.total_bytes()) == (set(), 0)
    record, lease = replica.hold("sql:prod")
    assert lease is None
    replica.fetch(record.facts.digest)
    record, lease = replica.hold("sql:prod")
    assert lease is not None
    replica.verify(record.facts.digest)
    assert blobs(replica.root) == {record.facts.digest.removeprefix("sha256:")}
    assert replica.total_bytes() == record.facts.size_bytes
    assert not replica.refresh()


def test_a_replica_follows(
    origin: AdapterStore,
    place: RemotePlace,
    replica: ReplicaStore,
    folders: Mapping[str, Path],
    layout: BaseLayout,
) -> None:
    digest = replica.get("sql@2").facts.digest
    replica.fetch(digest)
    etag = replica.get("other@1").etag
    put(origin, "sql", folders["d"], layout)
    origin.update("sql", 4, set_aliases=["prod"], labels={"new": "yes"})
    origin.update("sql", 1, pinned=False)
    origin.delete("sql@2")
    push_store(origin, place)
    before = replica.changes.last()
    assert replica.refresh()
    assert listed(replica) == listed(origin)
    assert replica.get("other@1").etag == etag  # what did not change did not change
    changed = {(change.version, change.record is None) for change in replica.changes.after(before)}
    assert changed == {(1, False), (2, True), (4, False)}
    assert replica.remove_blob(digest)
    assert blobs(replica.root) == set()


def test_a_place_that_was_begun_anew(
    origin: AdapterStore,
    place: RemotePlace,
    replica: ReplicaStore,
    remote: Path,
    tmp_path: Path,
    folders: Mapping[str, Path],
    layout: BaseLayout,
) -> None:
    """Other content under the same number of snapshot, name and version."""
    shutil.rmtree(remote)
    with AdapterStore(tmp_path / "anew") as anew:
        put(anew, "sql", folders["d"], layout)
        anew.update("sql", 1, set_aliases=["prod"])
        assert push_store(anew, place).generation == replica.generation
        assert replica.refresh()
        assert listed(replica) == listed(anew)


def test_no_change_is_made_in_a_replica(replica: ReplicaStore) -> None:
    before = listed(replica)
    for change in (
        lambda: replica.update("sql", 1, set_aliases=["x"]),
        lambda: replica.delete("sql@1"),
        lambda: replica.collect(RetentionPolicy(1, 0), dry_run=False),
        replica.check_changeable,
    ):
        with pytest.raises(ReadOnlyStoreError, match="quickchange store push"):
            change()
    assert listed(replica) == before


@pytest.mark.parametrize("damage", ["flipped", "short", "long", "gone", "folder gone"])
def test_a_damaged_blob_fails_its_versions_and_no_others(
    damage: str, origin: AdapterStore, place: RemotePlace, replica: ReplicaStore, remote: Path
) -> None:
    weights = weights_of(origin, "sql@2", remote)
    raw = weights.read_bytes()
    match damage:
        case "flipped":
            spoil(weights)
        case "short" | "long":
            weights.write_bytes(raw[:-1] if damage == "short" else raw + b"x")
        case "gone":
            weights.unlink()
        case _:
            shutil.rmtree(weights.parent)
    digest = replica.get("sql@2").facts.digest
    with pytest.raises(AdapterCorruptError, match=f"blobs/sha256/{digest[7:]}/.* at file://"):
        replica.fetch(digest)
    failed = replica.get("sql@2")
    assert failed.state is AdapterState.FAILED
    assert "quickchange store push --verify" in failed.error
    with pytest.raises(AdapterCorruptError, match="sql@2 is FAILED"):
        replica.hold("sql@2")
    assert (blobs(replica.root), staged_by_anyone(replica.root)) == (set(), [])
    assert replica.resolve("sql").version == 1
    replica.fetch(replica.resolve("sql").facts.digest)

    assert not replica.refresh()  # nothing new: still FAILED
    healed = push_store(origin, place, verify=True)
    assert (healed.generation, healed.created) == (2, True)
    assert replica.refresh()
    replica.fetch(digest)
    replica.verify(digest)


def test_facts_that_are_gone_or_forged(
    origin: AdapterStore, place: RemotePlace, remote: Path, tmp_path: Path
) -> None:
    push_store(origin, place)
    by_digest = {json.loads(path.read_text())["digest"]: path for path in (remote / "facts").iterdir()}
    gone = by_digest[origin.get("sql@2").facts.digest]
    gone.unlink()
    with ReplicaStore(tmp_path / "copies", place) as replica:
        replica.refresh()
        failed = replica.get("sql@2")
        assert (failed.state, failed.facts.rank) == (AdapterState.FAILED, 0)
        assert f"facts/{gone.name} at {place.url} is not there" in failed.error
        assert replica.resolve("sql@1").state is AdapterState.READY
        push_store(origin, place)  # sees by itself that it is missing
        replica.refresh()
        assert listed(replica) == listed(origin)


def test_content_under_a_false_digest_is_refused(
    origin: AdapterStore, replica: ReplicaStore, place: RemotePlace, remote: Path
) -> None:
    """Sizes and hashes agree with a forged manifest, and the digest is another content's."""
    latest = place.latest()
    assert latest is not None
    one, two = (origin.get(reference).facts.digest for reference in ("sql@1", "sql@2"))
    contents = dict(latest.manifest.contents)
    facts, *_ = contents[one]
    contents[one] = (facts, *contents[two][1:])
    folder = remote / "blobs/sha256"
    shutil.rmtree(folder / one[7:])
    shutil.copytree(folder / two[7:], folder / one[7:])
    place.publish(snapshot_of(2, type(latest.manifest)({}, latest.manifest.versions, contents)))
    replica.refresh()
    with pytest.raises(AdapterCorruptError, match=f"has the content {two} under the digest {one}"):
        replica.fetch(one)
    assert blobs(replica.root) == set()


def test_facts_that_name_another_base_than_the_adapter_does_are_refused(
    origin: AdapterStore,
    place: RemotePlace,
    tmp_path: Path,
    folders: Mapping[str, Path],
    layout: BaseLayout,
) -> None:
    """Facts are what tells a server, without the files, whether an adapter is for its base."""
    told = Path(shutil.copytree(folders["d"], tmp_path / "told"))
    (told / "quickchange.json").write_text(Bundle(layout.fingerprint).to_json())
    digest = put(origin, "told", told, layout)
    push_store(origin, place)
    latest = place.latest()
    assert latest is not None
    raw = facts_json(replace(origin.facts_of(digest), base_fingerprint="sha256:" + "0" * 64))
    forged = StoredFile("facts.json", len(raw), sha256(raw).hexdigest())
    place.files.put(name_of(digest, forged), raw)
    contents = dict(latest.manifest.contents) | {
        digest: (forged, *files_of(latest.manifest.contents[digest]))
    }
    place.publish(snapshot_of(2, replace(latest.manifest, contents=contents)))
    with ReplicaStore(tmp_path / "copies", place) as replica:
        replica.refresh()
        with pytest.raises(AdapterCorruptError, match="it was made for"):
            replica.fetch(digest)
        assert blobs(replica.root) == set()


@pytest.mark.parametrize("name", ["latest", "00000002.json"])
def test_a_catalogue_that_is_damaged_changes_nothing(
    name: str, origin: AdapterStore, place: RemotePlace, replica: ReplicaStore, remote: Path
) -> None:
    origin.update("sql", 2, set_aliases=["next"])
    push_store(origin, place)
    spoil(remote / "catalogue" / name)
    before = listed(replica)
    with pytest.raises(AdapterCorruptError, match=f"catalogue/{name} at"):
        replica.refresh()
    assert listed(replica) == before
    if name != "latest":
        with pytest.raises(AdapterCorruptError):
            push_store(origin, place)
    push_store(origin, place, overwrite=True)
    assert replica.refresh()
    assert listed(replica) == listed(origin)


def test_a_place_that_is_gone_fails_nothing(replica: ReplicaStore, remote: Path, tmp_path: Path) -> None:
    replica.fetch(replica.get("sql@1").facts.digest)
    shutil.move(remote, tmp_path / "away")
    with pytest.raises(StoreUnreachableError):
        replica.refresh()
    with pytest.raises(StoreUnreachableError, match="is it mounted"):
        replica.fetch(replica.get("sql@2").facts.digest)
    assert replica.get("sql@2").state is AdapterState.READY
    assert replica.hold("sql@1")[1] is not None
    shutil.move(tmp_path / "away", remote)
    assert not replica.refresh()
    replica.fetch(replica.get("sql@2").facts.digest)


def test_a_damaged_copy_is_fetched_again(replica: ReplicaStore) -> None:
    digest = replica.get("sql@1").facts.digest
    replica.fetch(digest)
    spoil(replica.path_of(digest) / WEIGHTS_FILE)
    with pytest.raises(AdapterCorruptError) as damage:
        replica.verify(digest)
    replica.mark_failed(digest, str(damage.value))  # as a load does
    assert replica.hold("sql@1")[1] is None
    replica.fetch(digest)
    replica.verify(digest)


def test_copies_outlast_a_restart_and_damaged_ones_do_not(
    replica: ReplicaStore, place: RemotePlace, remote: Path
) -> None:
    for reference in ("sql@1", "sql@2"):
        replica.fetch(replica.get(reference).facts.digest)
    (replica.path_of(replica.get("sql@2").facts.digest) / WEIGHTS_FILE).unlink()
    shutil.rmtree(remote)
    with ReplicaStore(replica.root, place) as again:
        assert again.generation == 1
        assert references(again) == ["other@1", "sql@1", "sql@2"]
        assert again.hold("sql@1")[1] is not None
        assert again.hold("sql@2")[1] is None
        assert again.get("sql@2").state is AdapterState.READY


def test_two_processes_share_a_folder_of_copies(
    origin: AdapterStore, replica: ReplicaStore, place: RemotePlace
) -> None:
    digest = replica.get("sql@2").facts.digest
    with ReplicaStore(replica.root, place) as other, ThreadPoolExecutor(2) as pool:
        for fetch in [pool.submit(each.fetch, digest) for each in (replica, other)]:
            fetch.result()
        assert (blobs(replica.root), staged_by_anyone(replica.root)) == ({digest[7:]}, [])
        lease = other.hold("sql@2")[1]
        assert lease is not None
        origin.delete("sql@2")
        push_store(origin, place)
        assert replica.refresh()
        assert not replica.remove_blob(digest)  # the other one's requests use it
        other.verify(digest)
        assert other.refresh()
        assert listed(other) == listed(replica) == listed(origin)
        lease.release()
        assert replica.remove_blob(digest)
        assert blobs(replica.root) == set()


def test_a_fetch_that_is_told_to_stop_leaves_nothing(replica: ReplicaStore) -> None:
    digest = replica.get("sql@1").facts.digest
    with pytest.raises(StoreUnreachableError, match="stopping"):
        replica.fetch(digest, lambda: False)
    assert (blobs(replica.root), staged_by_anyone(replica.root)) == (set(), [])


def test_copies_leave_the_reserve_free(origin: AdapterStore, place: RemotePlace, tmp_path: Path) -> None:
    push_store(origin, place)
    with ReplicaStore(tmp_path / "copies", place, reserve_bytes=1 << 60) as replica:
        replica.refresh()
        with pytest.raises(CapacityError, match="in reserve"):
            replica.fetch(replica.get("sql@1").facts.digest)


def test_a_folder_is_a_store_or_copies_of_one(
    origin: AdapterStore, replica: ReplicaStore, place: RemotePlace, tmp_path: Path
) -> None:
    before = snapshot(origin.root)
    with pytest.raises(InvalidAdapterError, match="would be replaced"):
        ReplicaStore(origin.root, place)
    assert snapshot(origin.root) == before
    with pytest.raises(InvalidAdapterError, match="holds copies of the store at"):
        AdapterStore(replica.root)
    with pytest.raises(InvalidAdapterError, match="give another folder"):
        ReplicaStore(replica.root, RemotePlace((tmp_path / "elsewhere").as_uri()))


def test_over_http(origin: AdapterStore, place: RemotePlace, web: str, tmp_path: Path, remote: Path) -> None:
    push_store(origin, place)
    with ReplicaStore(tmp_path / "copies", RemotePlace(web)) as replica:
        assert replica.refresh()
        assert not replica.refresh()
        assert listed(replica) == listed(origin)
        digest = replica.get("sql@1").facts.digest
        replica.fetch(digest)
        replica.verify(digest)
        spoil(weights_of(origin, "sql@2", remote))
        with pytest.raises(AdapterCorruptError, match="SHA-256"):
            replica.fetch(replica.get("sql@2").facts.digest)
        origin.update("sql", 1, labels={"now": "this"})
        push_store(origin, place)
        assert replica.refresh()
        assert replica.get("sql@1").labels == {"now": "this"}


def test_nobody_listens(tmp_path: Path) -> None:
    with (
        ReplicaStore(tmp_path / "copies", RemotePlace("http://127.0.0.1:9")) as replica,
        pytest.raises(StoreUnreachableError, match="cannot be reached"),
    ):
        replica.refresh()
