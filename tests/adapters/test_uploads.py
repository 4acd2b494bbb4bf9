"""The shelf of unfinished uploads: exclusive, durable, swept; and what a store's quotas hold it to."""

import os
import time
from pathlib import Path

import pytest

from adapters.errors import CapacityError
from adapters.quota import StoreQuota
from adapters.store import AdapterStore
from adapters.uploads import ShelfPlace, UploadShelf, shelf_key
from tests.adapters.staging import facts_of, publish, stage

KEY = shelf_key("an upload", "")


def taken(shelf: UploadShelf, key: str = KEY) -> ShelfPlace:
    place = shelf.take(key)
    assert place is not None
    return place


def test_what_was_saved_is_found_by_another_process(tmp_path: Path) -> None:
    place = taken(UploadShelf(tmp_path))
    place.begin("the plan", 2)
    (place.files / "a").write_bytes(b"12345")
    first = place.save((5, 0))
    assert place.save((5, 0)) != first
    place.release()
    found = UploadShelf(tmp_path).find(KEY)
    assert found is not None
    assert (found.plan, found.offsets, found.outcome) == ("the plan", (5, 0), None)
    assert UploadShelf(tmp_path).total_bytes() == 5
    taken(UploadShelf(tmp_path)).finish((5, 7), "published")
    found = UploadShelf(tmp_path).find(KEY)
    assert found is not None
    assert (found.offsets, found.outcome) == ((5, 7), "published")
    assert UploadShelf(tmp_path).total_bytes() == 0


def test_one_at_a_time_has_a_place(tmp_path: Path) -> None:
    one, other = UploadShelf(tmp_path), UploadShelf(tmp_path)
    place = taken(one)
    assert other.take(KEY) is None
    place.release()
    place.release()
    taken(other).remove()
    assert os.listdir(tmp_path / "uploads") == []


@pytest.mark.parametrize("damage", ["state.json", "plan.json", "files"])
def test_what_is_damaged_begins_again(tmp_path: Path, damage: str) -> None:
    place = taken(UploadShelf(tmp_path))
    place.begin("the plan", 1)
    broken = tmp_path / "uploads" / KEY / damage
    if broken.is_dir():
        broken.rmdir()  # as after publishing, if the process ended before noting it
    else:
        broken.unlink()
    assert place.read() is None
    place.begin("the plan", 1)
    assert place.read() is not None


def test_what_is_old_or_too_much_is_swept_and_what_is_held_is_not(tmp_path: Path) -> None:
    shelf = UploadShelf(tmp_path)
    keys = [shelf_key(str(number), "") for number in range(5)]
    held = taken(shelf, keys[0])
    held.begin("plan", 1)
    for age_s, key in zip((500, 400, 300, 0), keys[1:], strict=True):
        place = taken(shelf, key)
        place.begin("plan", 1)
        place.release()
        os.utime(tmp_path / "uploads" / key, (time.time() - age_s,) * 2)
    os.utime(tmp_path / "uploads" / keys[0], (0, 0))
    assert shelf.sweep(ttl_s=450, keep=100) == 1
    assert shelf.sweep(ttl_s=10_000, keep=3) == 0  # the oldest of four is held
    assert shelf.sweep(ttl_s=10_000, keep=2) == 1
    assert [shelf.find(key) is not None for key in keys] == [True, False, False, True, True]


def test_no_owner_reaches_anothers_upload() -> None:
    keys = {shelf_key("b", "a"), shelf_key("a", "b"), shelf_key("", "ab"), shelf_key("../x", "")}
    assert len(keys) == 4
    assert all(len(key) == 64 and key.isalnum() for key in keys)


def test_publishing_is_held_to_the_quota_whoever_comes_first(tmp_path: Path) -> None:
    with AdapterStore(tmp_path, StoreQuota(max_bytes=8, max_versions_per_name=2)) as store:
        publish(store, "sql", "aa")
        publish(store, "sql", "bb")
        for name, content, reason in (("sql", "cc", "VERSIONS_QUOTA"), ("other", "cc", "STORE_QUOTA")):
            staged = stage(store, content)
            with pytest.raises(CapacityError) as caught:
                store.publish(name, staged, facts_of(content))
            assert caught.value.reason == reason
        assert publish(store, "sql", "bb").version == 2
        assert publish(store, "other", "bb").version == 1
        assert store.total_bytes() == 8
