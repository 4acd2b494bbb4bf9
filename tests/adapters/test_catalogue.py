"""The catalogue by itself: stores of earlier versions, and the log of what changed."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

import adapters.schema
from adapters.catalogue import Catalogue
from adapters.changes import ChangeLog
from adapters.errors import ChangesLostError
from adapters.facts import AdapterState
from adapters.files import CONFIG_FILE, WEIGHTS_FILE
from adapters.rows import Content
from adapters.store import AdapterStore
from tests.adapters.neighbour import Neighbour
from tests.adapters.staging import digest_of, facts_of, publish

FIRST_VERSION = Path(__file__).with_name("catalogue-1.sql")
"""As it was written then: sql@1 with an alias, a pin and a label, sql@2 FAILED, sql@3 deleted, other@1."""


@pytest.fixture
def old_store(root: Path) -> Path:
    for content in ("one", "two", "three"):
        folder = root / "blobs/sha256" / digest_of(content).removeprefix("sha256:")
        folder.mkdir(parents=True)
        (folder / CONFIG_FILE).write_text("{}")
        (folder / WEIGHTS_FILE).write_text(content)
    with closing(sqlite3.connect(root / "catalogue.sqlite3")) as connection:
        connection.executescript(FIRST_VERSION.read_text())
    return root


def version_of(root: Path) -> int:
    with closing(sqlite3.connect(root / "catalogue.sqlite3")) as connection:
        return int(connection.execute("PRAGMA user_version").fetchone()[0])


def test_a_store_of_the_first_version_is_taken_over(old_store: Path) -> None:
    assert version_of(old_store) == 1
    with AdapterStore(old_store) as store:
        first, second = store.get("sql@1"), store.get("sql@2")
        assert (first.aliases, first.pinned, first.labels) == (("prod",), True, {"team": "x"})
        assert first.facts == facts_of("one")
        assert second.state is AdapterState.FAILED
        assert second.error == f"bit rot; the damaged files were moved to {store.quarantined()[0].place}"
        assert store.resolve("sql:prod") == first
        store.verify(digest_of("one"))
        assert store.changes.pinned() == {digest_of("one"): "sql"}
        before = store.changes.last()
        assert publish(store, "sql", "four").version == 4  # 3 was used and deleted
        assert [change.version for change in store.changes.after(before)] == [4]
        assert not (old_store / "blobs/sha256" / digest_of("three").removeprefix("sha256:")).exists()
    assert version_of(old_store) == adapters.schema.VERSION
    with AdapterStore(old_store) as store:
        assert store.resolve("sql").version == 4


def test_two_processes_take_an_old_store_over_at_once(old_store: Path) -> None:
    with Neighbour(old_store) as one, Neighbour(old_store) as two, AdapterStore(old_store):
        assert one.ask("list") == two.ask("list") == ["other@1", "sql@1", "sql@2"]


def test_every_kind_of_change_is_logged_once_with_the_version_as_it_is(store: AdapterStore) -> None:
    def news(since: int) -> list[tuple[int, bool]]:
        return [(change.version, change.record is None) for change in store.changes.after(since)]

    before = store.changes.last()
    publish(store, "sql", "one")
    publish(store, "sql", "two")
    assert news(before) == [(1, False), (2, False)]
    for action in (
        lambda: store.update("sql", 1, set_aliases=["prod"]),
        lambda: store.update("sql", 1, pinned=True),
        lambda: store.update("sql", 1, labels={"a": "b"}),
        lambda: store.update("sql", 1, remove_aliases=["prod"]),
        lambda: store.mark_failed(digest_of("one"), "bit rot"),
        lambda: publish(store, "sql", "one"),  # which heals it
    ):
        before = store.changes.last()
        action()
        assert news(before) == [(1, False)]
    before = store.changes.last()
    store.update("sql", 1, set_aliases=["prod"])
    store.update("sql", 2, set_aliases=["prod"])  # taken from the other
    assert news(before) == [(1, False), (2, False)]
    before = store.changes.last()
    store.delete("sql@1")
    (change,) = store.changes.after(before)
    assert (change.version, change.record, change.digest, change.is_orphan) == (
        1,
        None,
        digest_of("one"),
        True,
    )


def test_the_log_is_bounded_and_says_so_when_it_forgot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue = Catalogue(tmp_path / "catalogue.sqlite3")
    log = ChangeLog(catalogue)
    kept = adapters.schema.KEPT_CHANGES
    with catalogue.writing() as rows:
        rows.put_content(Content(facts_of("a"), (), AdapterState.READY, ""))
        rows.add_version("a", 1, digest_of("a"), {}, "")
        rows.add_version("b", 1, digest_of("a"), {}, "")
    assert [change.name for change in log.after(0)] == ["a", "b"]
    with closing(sqlite3.connect(tmp_path / "catalogue.sqlite3")) as connection:  # as if so much had happened
        connection.execute("UPDATE sqlite_sequence SET seq = ?", (kept,))
        connection.commit()
    with catalogue.writing() as rows:
        rows.set_pinned("b", 1, True)
    assert [change.name for change in log.after(log.last() - 1)] == ["b"]
    with pytest.raises(ChangesLostError):
        log.after(1)
    with catalogue.reading() as rows:
        assert len(rows.changes(0, 10)) == 1  # that of "a" is forgotten
    catalogue.close()


def test_a_page_of_changes_is_followed_by_the_next(store: AdapterStore) -> None:
    for index in range(130):
        publish(store, "sql", str(index))
    seen: list[int] = []
    last = 0
    while page := store.changes.after(last):
        assert len(page) <= 100
        seen += [change.version for change in page]
        last = page[-1].sequence
    assert seen == list(range(1, 131))
    for name in "ab":
        publish(store, name, "0")
    owners = store.changes.versions_with(digest_of("0"), None)
    assert [record.reference for record in owners] == ["a@1", "b@1", "sql@1"]
    assert [r.name for r in store.changes.versions_with(digest_of("0"), owners[0])] == ["b", "sql"]
