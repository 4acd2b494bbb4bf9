"""What a policy lets go, and what it must not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.errors import InvalidAdapterError
from adapters.facts import AdapterState
from adapters.retention import RetentionPolicy, doomed
from adapters.rows import Entry
from adapters.store import AdapterStore
from tests.adapters.staging import digest_of, publish, references

NOW_S = 1000.0


def entry(version: int, **fields: object) -> Entry:
    plain = {
        "name": "sql",
        "version": version,
        "digest": f"d{version}",
        "state": AdapterState.READY,
        "size_bytes": 10,
        "pinned": False,
        "aliases": (),
        "labels": {},
        "description": "",
        "created_s": 0.0,
    }
    return Entry(**(plain | fields))  # type: ignore[arg-type]  # the fields of an Entry


def versions(entries: list[Entry], keep: int = 1, min_age_s: float = 0.0) -> list[int]:
    return [gone.version for gone in doomed(entries, RetentionPolicy(keep, min_age_s), NOW_S)]


def test_the_newest_stay() -> None:
    entries = [entry(version) for version in range(1, 6)]
    assert versions(entries) == [1, 2, 3, 4]
    assert versions(entries, keep=3) == [1, 2]
    assert versions(entries, keep=5) == []


def test_what_is_wanted_stays() -> None:
    wanted = [
        entry(1, aliases=("prod",)),
        entry(2, pinned=True),
        entry(3, labels={"keep": ""}),
        entry(4, created_s=NOW_S - 5),
    ]
    assert versions([*wanted, entry(5, created_s=0), entry(6, created_s=0)], min_age_s=10) == [5]


def test_a_failed_version_takes_no_place_of_the_newest() -> None:
    failed = entry(3, state=AdapterState.FAILED)
    gone = doomed([entry(1), entry(2), failed], RetentionPolicy(1, 0), NOW_S)
    assert [version.version for version in gone] == [1, 3]
    assert "FAILED" in gone[1].reason
    assert versions([entry(1), entry(2, state=AdapterState.FAILED, aliases=("prod",))]) == []


def test_bytes_are_counted_where_they_become_free() -> None:
    shared = [entry(1, digest="x"), entry(2, digest="x"), entry(3)]
    assert sum(gone.freed_bytes for gone in doomed(shared, RetentionPolicy(1, 0), NOW_S)) == 10
    kept = [entry(1, digest="x"), entry(2, digest="x")]
    assert [gone.freed_bytes for gone in doomed(kept, RetentionPolicy(1, 0), NOW_S)] == [0]


@pytest.mark.parametrize(("keep", "age"), [(0, 0.0), (-1, 0.0), (1, -1.0), (1, float("nan"))])
def test_a_policy_that_makes_no_sense(keep: int, age: float) -> None:
    with pytest.raises(InvalidAdapterError) as refusal:
        RetentionPolicy(keep, age)
    assert refusal.value.reason == "BAD_POLICY"


@given(
    st.lists(
        st.builds(
            entry,
            version=st.integers(1, 50),
            name=st.sampled_from("ab"),
            state=st.sampled_from(AdapterState),
            pinned=st.booleans(),
            aliases=st.sampled_from([(), ("prod",)]),
            labels=st.sampled_from([{}, {"keep": "1"}, {"team": "x"}]),
            created_s=st.floats(0, NOW_S),
        ),
        unique_by=lambda each: (each.name, each.version),
    ),
    st.integers(1, 4),
    st.floats(0, NOW_S),
)
def test_no_policy_takes_what_it_must_keep(entries: list[Entry], keep: int, min_age_s: float) -> None:
    gone = {(each.name, each.version) for each in doomed(entries, RetentionPolicy(keep, min_age_s), NOW_S)}
    for name in "ab":
        mine = [each for each in entries if each.name == name]
        ready = sorted(each.version for each in mine if each.state is AdapterState.READY)
        assert not {(name, version) for version in ready[-keep:]} & gone
        for each in mine:
            kept = each.aliases or each.pinned or "keep" in each.labels or NOW_S - each.created_s < min_age_s
            if kept:
                assert (name, each.version) not in gone
            elif each.state is AdapterState.FAILED or each.version not in ready[-keep:]:
                assert (name, each.version) in gone


def test_a_collection_of_a_store(store: AdapterStore) -> None:
    for content in ("a", "b", "c"):
        publish(store, "sql", content)
    publish(store, "gone", "left over")
    store.delete("gone")
    policy = RetentionPolicy(1, 0)
    would = store.collect(policy, dry_run=True)
    assert references(store) == ["sql@1", "sql@2", "sql@3"]
    assert [version.reference for version in would.versions] == ["sql@1", "sql@2"]
    assert (would.left_over_bytes, would.freed_bytes) == (11, 17)
    assert store.collect(policy, dry_run=False) == would
    assert references(store) == ["sql@3"]
    store.verify(digest_of("a"))  # until its bytes are removed, which waits for whoever uses them
    store.recover()
    assert store.total_bytes() == 3
    assert store.collect(policy, dry_run=False).versions == ()
    assert publish(store, "sql", "a").version == 4
