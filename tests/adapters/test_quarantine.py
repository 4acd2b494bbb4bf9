"""Damaged files go out of the way, whole, once nobody uses them, and are counted until they are collected."""

import errno
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import AdapterCorruptError, CapacityError
from adapters.facts import AdapterState
from adapters.files import CONFIG_FILE, WEIGHTS_FILE
from adapters.quarantine import Quarantined
from adapters.quota import StoreQuota
from adapters.retention import RetentionPolicy
from adapters.store import AdapterStore
from quickchange.cli import main
from tests.adapters.neighbour import Neighbour
from tests.adapters.staging import digest_of, facts_of, publish, stage


@pytest.fixture
def neighbour(root: Path) -> Iterator[Neighbour]:
    with Neighbour(root) as process:
        yield process


def blob_of(root: Path, content: str) -> Path:
    return root / "blobs/sha256" / digest_of(content).removeprefix("sha256:")


def rot(root: Path, content: str, text: str) -> None:
    path = blob_of(root, content) / WEIGHTS_FILE
    path.chmod(0o600)
    path.write_text(text)


def the_one(store: AdapterStore) -> Quarantined:
    (entry,) = store.quarantined()
    return entry


def rotten(store: AdapterStore, root: Path) -> Quarantined:
    """sql@1, whose files were found damaged and are in quarantine; sql@2 is sound."""
    for content in ("bad", "fine"):
        publish(store, "sql", content)
    rot(root, "bad", "bat")
    with pytest.raises(AdapterCorruptError) as damage:
        store.verify(digest_of("bad"))
    store.mark_failed(digest_of("bad"), str(damage.value))
    return the_one(store)


def test_what_is_damaged_goes_to_quarantine_with_the_reason(store: AdapterStore, root: Path) -> None:
    entry = rotten(store, root)
    assert (entry.digest, entry.size_bytes) == (digest_of("bad"), 5)
    assert re.fullmatch(r"quarantine/[0-9a-f]{64}\.1", entry.place)
    assert "has SHA-256" in entry.reason
    assert store.get("sql@1").error == f"{entry.reason}; the damaged files were moved to {entry.place}"
    assert sorted(os.listdir(root / entry.place / "files")) == [CONFIG_FILE, WEIGHTS_FILE]
    assert (root / entry.place / "files" / WEIGHTS_FILE).read_text() == "bat"
    assert json.loads((root / entry.place / "reason.json").read_text())["reason"] == entry.reason
    assert not blob_of(root, "bad").exists()
    assert store.resolve("sql").version == 2
    store.verify(digest_of("fine"))


def test_damage_that_a_start_finds_goes_there_too(root: Path) -> None:
    with AdapterStore(root) as store:
        for content in ("bad", "fine"):
            publish(store, "sql", content)
    rot(root, "bad", "b")
    with AdapterStore(root) as store:
        entry = the_one(store)
        assert f"{WEIGHTS_FILE} has 1 bytes instead of 3" in entry.reason
        assert store.get("sql@1").error.endswith(entry.place)
        store.verify(store.resolve("sql").facts.digest)
        etag = store.get("sql@1").etag
    with AdapterStore(root) as store:  # and the next one has nothing more to say
        assert store.quarantined() == [entry]
        assert store.get("sql@1").etag == etag


def test_the_same_content_heals_it_and_can_be_damaged_again(store: AdapterStore, root: Path) -> None:
    first = rotten(store, root)
    record = publish(store, "sql", "bad")
    assert (record.version, record.state, record.error) == (1, AdapterState.READY, "")
    store.verify(digest_of("bad"))
    assert store.quarantined() == [first]
    rot(root, "bad", "bet")
    store.mark_failed(digest_of("bad"), "again")
    assert [entry.place[-2:] for entry in store.quarantined()] == [".1", ".2"]
    assert store.get("sql@1").error.startswith("again; ")


def test_the_first_reason_is_kept(store: AdapterStore, root: Path) -> None:
    rotten(store, root)
    before = store.get("sql@1")
    store.mark_failed(digest_of("bad"), "its folder is missing")  # as whoever loads it now would say
    assert store.get("sql@1") == before
    assert store.put_away(digest_of("bad"))
    assert store.get("sql@1") == before


def test_a_folder_that_is_simply_missing_is_not_said_to_be_in_quarantine(root: Path) -> None:
    with AdapterStore(root) as store:
        rotten(store, root)
        publish(store, "sql", "bad")
    for path in blob_of(root, "bad").iterdir():
        path.unlink()
    blob_of(root, "bad").rmdir()
    with AdapterStore(root) as store:
        assert store.get("sql@1").error == "its folder is missing; publish it again"


def test_what_another_process_uses_stays_in_place(
    store: AdapterStore, root: Path, neighbour: Neighbour
) -> None:
    publish(store, "sql", "bad")
    neighbour.ask("hold", "sql")
    store.mark_failed(digest_of("bad"), "bit rot")
    for _ in range(2):
        assert not store.put_away(digest_of("bad"))
    AdapterStore(root).close()
    store.recover()
    assert (blob_of(root, "bad") / WEIGHTS_FILE).exists()
    assert neighbour.ask("verify", digest_of("bad")) is None
    assert (store.get("sql").error, store.quarantined()) == ("bit rot", [])
    neighbour.ask("release", "sql")
    assert store.put_away(digest_of("bad"))
    assert store.get("sql").error == f"bit rot; the damaged files were moved to {the_one(store).place}"
    assert not blob_of(root, "bad").exists()


@pytest.mark.parametrize("how", ["opening", "recover"])
def test_a_killed_user_holds_nothing_up(
    how: str, store: AdapterStore, root: Path, neighbour: Neighbour
) -> None:
    publish(store, "sql", "bad")
    neighbour.ask("hold", "sql")
    store.mark_failed(digest_of("bad"), "bit rot")
    neighbour.kill()
    if how == "opening":
        AdapterStore(root).close()
    else:
        store.recover()
    assert the_one(store).reason == "bit rot"
    assert not blob_of(root, "bad").exists()


def test_an_own_lease_and_an_export_keep_it_in_place_too(store: AdapterStore, root: Path) -> None:
    publish(store, "sql", "bad")
    _, lease = store.hold("sql")
    assert lease is not None
    with store.read_all():
        store.mark_failed(digest_of("bad"), "bit rot")
        lease.release()
        assert not store.put_away(digest_of("bad"))
    assert blob_of(root, "bad").exists()
    assert store.put_away(digest_of("bad"))
    assert not blob_of(root, "bad").exists()


def test_a_sound_content_is_not_put_away(store: AdapterStore, root: Path) -> None:
    publish(store, "sql", "fine")
    assert store.put_away(digest_of("fine"))
    assert store.put_away(digest_of("unknown"))
    store.verify(digest_of("fine"))
    assert store.quarantined() == []


def test_a_collection_takes_old_ones_and_says_so(store: AdapterStore, root: Path) -> None:
    entry = rotten(store, root)
    young = store.collect(RetentionPolicy(5, 3600), dry_run=False)
    assert (young.quarantined, young.freed_bytes) == ((), 0)
    dry = store.collect(RetentionPolicy(5, 0), dry_run=True)
    assert store.quarantined() == [entry]
    done = store.collect(RetentionPolicy(5, 0), dry_run=False)
    assert (done.quarantined, done.quarantined) == ((entry,), dry.quarantined)
    # The version goes too, being FAILED; its content has no files any more that would be freed with it.
    assert [(version.reference, version.freed_bytes) for version in done.versions] == [("sql@1", 0)]
    assert done.freed_bytes == 5
    assert store.quarantined() == []
    assert not (root / entry.place).exists()
    store.recover()
    assert store.collect(RetentionPolicy(5, 0), dry_run=True).freed_bytes == 0
    assert store.total_bytes() == 6
    assert len(list((root / "staging").iterdir())) == 2, "what was collected is still on disk"


def test_every_byte_counts_once(store: AdapterStore, root: Path) -> None:
    rot_free = 5 + 6
    for content in ("bad", "fine"):
        publish(store, "sql", content)
    assert store.total_bytes() == rot_free
    rot(root, "bad", "b")
    store.mark_failed(digest_of("bad"), "bit rot")
    assert store.total_bytes() == rot_free - 2  # as many as are really there
    publish(store, "sql", "bad")
    assert store.total_bytes() == rot_free + 3
    (root / the_one(store).place / "files" / WEIGHTS_FILE).unlink()
    assert store.total_bytes() == rot_free + 2


def test_a_quota_counts_what_is_in_quarantine(root: Path) -> None:
    with AdapterStore(root, StoreQuota(max_bytes=16, max_versions_per_name=2)) as store:
        rotten(store, root)  # 5 in quarantine, 6 in place
        files = (store.get("sql@1").files[0], store.get("sql@1").files[1])
        with pytest.raises(CapacityError) as refusal:
            store.publish("other", stage(store, "longer"), facts_of("longer"))
        assert refusal.value.reason == "STORE_QUOTA"
        assert "the store has 11 bytes, 8 more" in str(refusal.value)
        publish(store, "other", "bad")  # heals it under another name, and grows by what it is
        assert store.total_bytes() == 16
        store.check_quota("sql", files)  # the same content as a version that is there is never too much
        with pytest.raises(CapacityError):
            publish(store, "third", "x")
        store.collect(RetentionPolicy(5, 0), dry_run=False)
        publish(store, "third", "x")


@pytest.mark.parametrize("call", ["rename", "mkdir"])
def test_where_files_cannot_be_moved_the_damage_is_reported_all_the_same(
    call: str, store: AdapterStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, "sql", "bad")

    def broken(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, broken)
        for change in (
            lambda: store.mark_failed(digest_of("bad"), "bit rot"),
            lambda: store.put_away(digest_of("bad")),
        ):
            change()
            assert (store.get("sql").state, store.get("sql").error) == (AdapterState.FAILED, "bit rot")
    assert blob_of(root, "bad").exists()
    with AdapterStore(root) as again:
        assert the_one(again).reason == "bit rot"
        assert not blob_of(root, "bad").exists()
        assert len(os.listdir(root / "quarantine")) == 1


def test_the_command_shows_what_is_damaged(
    store: AdapterStore, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["store", "quarantine", "--store", str(root)]) == 0
    assert capsys.readouterr().out.startswith("0 damaged contents, 0 B;")
    entry = rotten(store, root)
    assert main(["store", "quarantine", "--store", str(root)]) == 0
    shown, total = capsys.readouterr().out.splitlines()
    assert shown.startswith(f"{entry.place} (5 B, since ")
    assert shown.endswith(f"): {entry.reason}")
    assert total.startswith("1 damaged content, 5 B;")
    assert main(["store", "quarantine", "--store", str(root), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [asdict(entry)]
    assert main(["store", "quarantine", "--store", str(root / "nothing")]) == 1
    assert "is no store of adapters" in capsys.readouterr().err


def test_a_publish_that_was_to_heal_and_ended_too_early_leaves_nothing(
    store: AdapterStore, root: Path
) -> None:
    entry = rotten(store, root)
    before = store.get("sql@1")
    blob_of(root, "bad").mkdir()  # as a killed process may leave it, between its files and the catalogue
    with AdapterStore(root) as again:
        assert again.get("sql@1") == before
        assert again.quarantined() == [entry]
    assert not blob_of(root, "bad").exists()


def test_a_damaged_reason_hides_nothing(store: AdapterStore, root: Path) -> None:
    entry = rotten(store, root)
    (root / entry.place / "reason.json").write_text("{")
    (root / "quarantine" / "lost+found").mkdir()
    seen = the_one(store)
    assert (seen.place, seen.reason, seen.size_bytes) == (entry.place, "not known any more", 5)
    assert seen.since_s == pytest.approx(entry.since_s, abs=60)
    store.collect(RetentionPolicy(5, 0), dry_run=False)
    assert os.listdir(root / "quarantine") == ["lost+found"]
