"""One store, several processes: nothing is mixed up, nothing in use is taken away, nothing stays for ever."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from adapters.errors import AdapterNotFoundError
from adapters.store import AdapterStore
from tests.adapters.neighbour import Neighbour
from tests.adapters.staging import digest_of, publish, references, stage


@pytest.fixture
def neighbour(root: Path) -> Iterator[Neighbour]:
    with Neighbour(root) as process:
        yield process


def blobs(root: Path) -> set[str]:
    return {f"sha256:{path.name}" for path in (root / "blobs/sha256").iterdir()}


def test_versions_of_one_name_are_numbered_in_one_row(root: Path, store: AdapterStore) -> None:
    with ExitStack() as stack:
        processes = [stack.enter_context(Neighbour(root)) for _ in range(3)]
        for index, process in enumerate(processes):
            process.tell("publish many", "sql", [f"{index} {round_}" for round_ in range(10)])
        numbers = [process.hear() for process in processes]
    assert all(row == sorted(row) for row in numbers)
    assert sorted(version for row in numbers for version in row) == list(range(1, 31))
    for record in store.list(page_size=1000)[0]:
        store.verify(record.facts.digest)


def test_what_one_process_does_the_other_sees(store: AdapterStore, neighbour: Neighbour) -> None:
    publish(store, "sql", "one")
    assert neighbour.ask("list") == ["sql@1"]
    before = store.changes.last()
    neighbour.ask("publish", "sql", "two")
    neighbour.ask("alias", "sql", "prod", 2)
    neighbour.ask("delete", "sql@1")
    assert store.resolve("sql:prod").version == 2
    changes = {change.version: change for change in store.changes.after(before)}
    assert [(v, c.record is None, c.is_orphan) for v, c in sorted(changes.items())] == [
        (1, True, True),
        (2, False, False),
    ]
    assert changes[2].record is not None
    assert changes[2].record.aliases == ("prod",)


def test_what_another_process_uses_stays_until_it_is_done(
    root: Path, store: AdapterStore, neighbour: Neighbour
) -> None:
    publish(store, "sql", "used")
    digest = neighbour.ask("hold", "sql")
    assert store.delete("sql") == [digest]
    with pytest.raises(AdapterNotFoundError):
        store.resolve("sql")
    assert not store.remove_blob(digest)
    assert neighbour.ask("verify", digest) is None
    assert neighbour.ask("hold", "sql") == {"error": "ADAPTER_NOT_FOUND"}
    neighbour.ask("release", "sql")
    assert store.remove_blob(digest)
    assert blobs(root) == set()


@pytest.mark.parametrize("how", ["opening", "recover", "remove"])
def test_what_a_living_process_uses_outlasts_every_clean_up(
    how: str, root: Path, store: AdapterStore, neighbour: Neighbour
) -> None:
    publish(store, "sql", "used")
    digest = neighbour.ask("hold", "sql")
    staged = Path(neighbour.ask("stage", "being uploaded"))
    store.delete("sql")

    def clean_up() -> None:
        if how == "opening":
            AdapterStore(root).close()
        elif how == "recover":
            store.recover()
        else:
            store.remove_blob(digest)

    clean_up()
    assert blobs(root) == {digest}
    assert staged.is_dir()
    neighbour.kill()  # its locks go with it
    clean_up()
    assert blobs(root) == set()
    if how != "remove":
        assert not staged.exists()


def test_a_content_that_is_published_again_is_not_removed_late(
    root: Path, store: AdapterStore, neighbour: Neighbour
) -> None:
    publish(store, "sql", "a")
    (digest,) = store.delete("sql")
    neighbour.ask("publish", "other", "a")
    assert store.remove_blob(digest)
    assert blobs(root) == {digest}
    store.verify(digest)


def test_an_own_lease_keeps_a_content_too(root: Path, store: AdapterStore) -> None:
    publish(store, "sql", "a")
    record, lease = store.hold("sql")
    more = store.keep(record.facts.digest)
    assert lease is not None
    assert more is not None
    (digest,) = store.delete("sql")
    lease.release()
    lease.release()
    assert not store.remove_blob(digest)
    more.release()
    assert store.remove_blob(digest)
    assert store.keep(digest) is None


def test_processes_that_come_and_go_take_nothing_from_those_that_publish(
    root: Path, store: AdapterStore
) -> None:
    kept = publish(store, "kept", "kept").facts.digest
    with ExitStack() as stack:
        processes = [stack.enter_context(Neighbour(root)) for _ in range(3)]
        for name, process in zip(("x", "y"), processes[:2], strict=True):
            process.tell("churn", name, 25)
        processes[2].tell("reopen", 25)
        assert processes[0].hear() == list(range(1, 26))
        assert processes[1].hear() == list(range(1, 26))
        assert processes[2].hear() is None
    store.verify(kept)
    assert references(store) == ["kept@1"]
    store.recover()
    assert blobs(root) == {kept}


def test_collecting_waits_for_what_another_process_uses(
    root: Path, store: AdapterStore, neighbour: Neighbour
) -> None:
    for content in ("old", "new"):
        publish(store, "sql", content)
    neighbour.ask("hold", "sql@1")
    with Neighbour(root) as collector:
        assert collector.ask("collect") == 1
        collector.ask("recover")
    assert blobs(root) == {digest_of("old"), digest_of("new")}
    neighbour.ask("release", "sql@1")
    store.recover()
    assert blobs(root) == {digest_of("new")}


def test_staging_of_another_process_is_not_ours_to_publish(store: AdapterStore, neighbour: Neighbour) -> None:
    staged = Path(neighbour.ask("stage", "theirs"))
    with pytest.raises(ValueError, match="not from new_staging"):
        store.discard(staged)
    store.discard(stage(store, "ours"))
