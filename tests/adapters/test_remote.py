"""A store at a URL: published and pulled; of two writers one is told, and nothing is half."""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from adapters.errors import (
    AdapterCorruptError,
    AdapterNotFoundError,
    InvalidAdapterError,
    ReadOnlyStoreError,
    StaleEtagError,
)
from adapters.facts import AdapterState
from adapters.files import WEIGHTS_FILE
from adapters.layout import BaseLayout
from adapters.remote import RemotePlace, snapshot_of
from adapters.remote_pull import pull_store
from adapters.remote_push import PushReport, push_store
from adapters.replica import ReplicaStore
from adapters.store import AdapterStore
from quickchange.cli import main
from tests.adapters.builders import put
from tests.adapters.published import blobs, listed, spoil, weights_of
from tests.adapters.staging import IN_MEMORY, references, staged_by_anyone

# Push


def test_a_second_push_moves_nothing(origin: AdapterStore, place: RemotePlace, remote: Path) -> None:
    steps: list[tuple[int, int]] = []
    first = push_store(origin, place, report=lambda *step: steps.append(step))
    assert (first.generation, first.created, first.versions, first.contents) == (1, True, 3, 2)
    assert steps[-1] == (first.uploaded_bytes, first.uploaded_bytes)
    times = {path: path.stat().st_mtime_ns for path in (remote / "blobs").rglob("*")}
    assert push_store(origin, place) == PushReport(1, False, 3, 2, 0, ())
    assert times == {path: path.stat().st_mtime_ns for path in (remote / "blobs").rglob("*")}
    assert list((remote / ".drafts").iterdir()) == []


def test_a_change_of_names_moves_no_file(origin: AdapterStore, place: RemotePlace) -> None:
    push_store(origin, place)
    origin.update("sql", 2, set_aliases=["prod"])
    done = push_store(origin, place)
    assert (done.generation, done.created, done.uploaded_bytes) == (2, True, 0)
    latest = place.latest()
    assert latest is not None
    assert {v.reference: v.aliases for v in latest.manifest.versions}["sql@2"] == ("prod",)


def test_what_a_cut_push_left_is_gone_on_with(origin: AdapterStore, place: RemotePlace, remote: Path) -> None:
    whole = push_store(origin, place).uploaded_bytes
    (remote / "catalogue/00000001.json").unlink()
    (remote / "catalogue/latest").unlink()
    cut = weights_of(origin, "sql@2", remote)
    size_bytes = cut.stat().st_size
    with cut.open("r+b") as file:
        file.truncate(size_bytes // 2)
    done = push_store(origin, place)
    assert 0 < done.uploaded_bytes == size_bytes < whole
    assert cut.stat().st_size == size_bytes


def test_of_two_writers_one_is_told(
    origin: AdapterStore, place: RemotePlace, tmp_path: Path, folders: Mapping[str, Path], layout: BaseLayout
) -> None:
    push_store(origin, place)
    with AdapterStore(tmp_path / "second") as second:
        put(second, "mine", folders["d"], layout)
        with pytest.raises(StaleEtagError, match="store pull") as refusal:
            push_store(second, place)
        assert refusal.value.reason == "PUSH_CONFLICT"
        assert place.highest() == 1
        pull_store(second, place)
        assert push_store(second, place).generation == 2
        origin.update("sql", 2, labels={"a": "b"})
        with pytest.raises(StaleEtagError, match="was not published from this store"):
            push_store(origin, place)
        assert push_store(origin, place, overwrite=True).generation == 3


def test_a_race_that_is_lost_at_the_last_moment_changes_nothing(
    origin: AdapterStore, place: RemotePlace, remote: Path
) -> None:
    push_store(origin, place)
    origin.update("sql", 2, labels={"a": "b"})
    first = place.latest()
    assert first is not None
    other = snapshot_of(2, first.manifest)  # another writer's, created while this one uploads

    def interfere(done_bytes: int, total_bytes: int) -> None:
        if place.highest() == 1:
            place.publish(other)

    weights_of(origin, "sql@2", remote).unlink()  # so that something is uploaded
    with pytest.raises(StaleEtagError, match="was faster") as refusal:
        push_store(origin, place, report=interfere)
    assert refusal.value.reason == "PUSH_LOST"
    assert place.latest() == other


def test_a_push_whose_end_was_not_noticed_is_known(origin: AdapterStore, place: RemotePlace) -> None:
    """The process ended between creating the snapshot and saying so."""
    push_store(origin, place)
    before = (origin.root / "published.json").read_text()
    origin.update("sql", 2, set_aliases=["next"])
    push_store(origin, place)
    known = json.loads(before)
    known[place.url].append(json.loads((origin.root / "published.json").read_text())[place.url][0])
    (origin.root / "published.json").write_text(json.dumps(known))
    origin.update("sql", 2, set_aliases=["later"])
    assert push_store(origin, place).generation == 3


def test_damage_here_stops_a_push_and_takes_nothing_from_readers(
    origin: AdapterStore, place: RemotePlace, remote: Path, tmp_path: Path
) -> None:
    push_store(origin, place)
    spoil(origin.path_of(origin.get("sql@2").facts.digest) / WEIGHTS_FILE)
    shutil.move(remote, tmp_path / "kept")
    with pytest.raises(AdapterCorruptError, match="SHA-256"):
        push_store(origin, place)
    assert origin.get("sql@2").state is AdapterState.FAILED
    assert place.highest() == 0
    assert push_store(origin, place).left_out == ("sql@2",)
    shutil.rmtree(remote)
    shutil.move(tmp_path / "kept", remote)
    assert push_store(origin, place, overwrite=True).left_out == ()  # what is sound there stays listed
    latest = place.latest()
    assert latest is not None
    assert [v.reference for v in latest.manifest.versions] == ["other@1", "sql@1", "sql@2"]


def test_old_snapshots_go(origin: AdapterStore, place: RemotePlace, remote: Path) -> None:
    for index in range(23):
        origin.update("sql", 1, labels={"n": str(index)})
        push_store(origin, place)
    names = sorted(path.name for path in (remote / "catalogue").iterdir())
    assert names == [f"{n:08}.json" for n in range(4, 24)] + ["latest"]


def test_a_store_in_memory(origin: AdapterStore, tmp_path: Path) -> None:
    place = RemotePlace("memory://shelf/of/adapters")
    push_store(origin, place)
    with pytest.raises(StaleEtagError):
        place.publish(snapshot_of(1, place.snapshot(1).manifest.__class__({}, (), {})))
    with AdapterStore(tmp_path / "new") as new:
        pull_store(new, place)
        assert listed(new) == listed(origin)
    assert not push_store(origin, place).created


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("s3://bucket/x", "needs the package s3fs, which is not installed: pip install s3fs"),
        ("nothing://x", "there is no driver for nothing://"),
        ("simplecache::file:///x", "is no URL"),
        ("s3:/bucket", "is no URL"),
        ("http://user:secret@host/x", "has a password in it"),
    ],
)
def test_urls_that_cannot_be(url: str, what: str) -> None:
    with pytest.raises(InvalidAdapterError, match=what) as refusal:
        RemotePlace(url)
    assert "secret" not in str(refusal.value)


def test_a_web_server_is_read_not_written(origin: AdapterStore, web: str) -> None:
    with pytest.raises(ReadOnlyStoreError, match="over http://, not published"):
        push_store(origin, RemotePlace(web))


# Pull


def test_there_and_back(
    origin: AdapterStore, place: RemotePlace, tmp_path: Path, folders: Mapping[str, Path], layout: BaseLayout
) -> None:
    push_store(origin, place)
    steps: list[tuple[int, int]] = []
    with AdapterStore(tmp_path / "new") as new:
        adopted = pull_store(new, place, report=lambda *step: steps.append(step))
        assert [each.created for each in adopted] == [True] * 3
        assert listed(new) == listed(origin)
        for record in new.list()[0]:
            new.verify(record.facts.digest)
        assert not any(each.created for each in pull_store(new, place))
        put(new, "sql", folders["c"], layout)
        assert references(new, name="sql")[-1] == "sql@4"  # 3 was used where it came from
        assert staged_by_anyone(new.root) == []
    assert steps[-1][0] == steps[-1][1] > 0


def test_a_pull_takes_all_that_is_wanted_or_nothing(
    origin: AdapterStore, place: RemotePlace, remote: Path, tmp_path: Path
) -> None:
    with AdapterStore(tmp_path / "new") as new:
        with pytest.raises(AdapterNotFoundError, match="there is no store"):
            pull_store(new, place)
        push_store(origin, place)
        spoil(weights_of(origin, "sql@2", remote))
        with pytest.raises(AdapterCorruptError, match="SHA-256"):
            pull_store(new, place)
        assert (references(new), blobs(new.root), staged_by_anyone(new.root)) == ([], set(), [])
        pull_store(new, place, names=["other"])
        assert references(new) == ["other@1"]


def test_the_commands(
    origin: AdapterStore, remote: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, url, new = str(origin.root), remote.as_uri(), str(tmp_path / "new")
    assert main(["store", "push", "--store", root, url]) == 0
    assert capsys.readouterr().out.startswith(f"{url}: snapshot 1 published: 3 versions, 2 contents, ")
    assert main(["store", "push", "--store", root, url, "--verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["uploaded_bytes"] == 0
    assert main(["store", "pull", "--store", new, url, "--name", "sql"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 versions pulled, 0 were there already"
    assert main(["store", "push", "--store", new, url]) == 1
    assert "error: snapshot 1 at file://" in capsys.readouterr().err
    assert main(["store", "push", "--store", str(tmp_path / "none"), url]) == 1
    assert "is no store of adapters" in capsys.readouterr().err
    assert main(["store", "push", "--store", root, "s3://bucket/x"]) == 1
    assert "pip install s3fs" in capsys.readouterr().err


@pytest.mark.parametrize("operation", ["push", "fetch"])
def test_a_killed_process_leaves_the_old_state_or_the_new(
    operation: str, folders: Mapping[str, Path], layout: BaseLayout
) -> None:
    """At every effect of a push and of a fetch; and whatever is left, the next one goes on with it."""
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
        now, place = Path(folder, "now"), RemotePlace(Path(folder, "now/remote").as_uri())
        with AdapterStore(now / "origin") as store:
            put(store, "sql", folders["a"], layout)
            push_store(store, place)
            with ReplicaStore(now / "copies", place) as replica:
                replica.refresh()
            put(store, "sql", folders["b"], layout)
            store.update("sql", 2, set_aliases=["prod"])
        now.rename(Path(folder, "before"))
        command = [sys.executable, "-m", "tests.adapters.killing_remote", operation, folder]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    outcomes = json.loads(result.stdout)["outcomes"]
    committed = outcomes.index("new")
    assert outcomes == ["old"] * committed + ["new"] * (len(outcomes) - committed)
    assert committed > 20, "the process was hardly ever killed before"
    assert committed < len(outcomes) - 1, "it was never killed after the commit"
