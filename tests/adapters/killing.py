"""Kills a process inside the store, at every system call and SQL statement, and looks at what is left.

Run as a program, so that the processes it forks have neither torch nor threads:
`python -m tests.adapters.killing OPERATION FOLDER` prints one line of JSON.
"""

import json
import os
import shutil
import signal
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import FrameType
from typing import Any

from adapters.files import WEIGHTS_FILE
from adapters.manifest import ListedVersion
from adapters.retention import RetentionPolicy
from adapters.store import AdapterState, AdapterStore
from tests.adapters.staging import digest_of, facts_of, publish, stage

# What changes a disk, or says that it did. A process is killed before and after each of them.
EFFECTS = frozenset(
    {
        "execute",
        "fchmod",
        "flock",
        "fsync",
        "link",
        "mkdir",
        "open",
        "rename",
        "replace",
        "rmdir",
        "unlink",
        "write_text",
    }
)


def prepare(root: Path) -> None:
    """A store with something in it of every kind."""
    with AdapterStore(root) as store:
        publish(store, "sql", "one")
        publish(store, "sql", "two")
        publish(store, "sql", "broken")
        publish(store, "other", "one")
        publish(store, "other", "rotten")
        store.update("sql", 1, set_aliases=["prod"])
        store.mark_failed(digest_of("broken"), "bit rot")
        publish(store, "gone", "gone")
        store.delete("gone")
    damaged = root / "blobs/sha256" / digest_of("rotten").removeprefix("sha256:") / WEIGHTS_FILE
    damaged.chmod(0o600)
    damaged.write_text("rot")
    unfinished = root / "quarantine" / f"{'0' * 64}.1"
    unfinished.mkdir()
    (unfinished / "reason.json").write_text("{}")
    orphan = root / "blobs/sha256" / ("0" * 64)
    orphan.mkdir()
    (orphan / "adapter_config.json").write_text("{}")


def downgrade(root: Path) -> None:
    """Makes the catalogue one of the first version."""
    with closing(sqlite3.connect(root / "catalogue.sqlite3")) as connection:
        for kind, name in connection.execute(
            "SELECT type, name FROM sqlite_master WHERE type = 'trigger' OR name IN ("
            "'changes', 'contents_by_size', 'contents_by_state', 'versions_pinned')"
        ).fetchall():
            connection.execute(f"DROP {kind} IF EXISTS {name}")
        connection.execute("PRAGMA user_version = 1")
        connection.commit()


def delete_and_remove(store: AdapterStore) -> None:
    for digest in store.delete("sql@2"):
        store.remove_blob(digest)


def publish_and_point(store: AdapterStore) -> None:
    store.publish("new", stage(store, "new"), facts_of("new"), labels={"a": "b"})


def collect_and_remove(store: AdapterStore) -> None:
    store.collect(RetentionPolicy(keep_versions=1, min_age_s=0), dry_run=False)
    store.recover()


def adopt(store: AdapterStore) -> None:
    """The last step of an import: two contents, three versions, one of which is there already."""

    def listed(name: str, version: int, content: str) -> ListedVersion:
        return ListedVersion(name, version, digest_of(content), True, ("taken",), {"a": "b"}, "", 1.0)

    staged = {digest_of(content): (stage(store, content), facts_of(content)) for content in ("x", "y")}
    versions = [listed("new", 2, "x"), listed("sql", 1, "one"), listed("sql", 7, "y")]
    store.adopt(staged, versions, {"new": 5}, renumber=False)


OPERATIONS: dict[str, Callable[[AdapterStore], object]] = {
    "open": lambda store: None,
    "migrate": lambda store: None,
    "publish": publish_and_point,
    "publish next version": lambda store: publish(store, "sql", "three"),
    "publish known content": lambda store: publish(store, "third", "two"),
    "heal": lambda store: publish(store, "sql", "broken"),
    "update": lambda store: store.update(
        "sql", 2, set_aliases=["prod", "next"], pinned=True, labels={"x": "y"}
    ),
    "delete": delete_and_remove,
    "delete all": lambda store: store.delete("sql", all_versions=True),
    "collect": collect_and_remove,
    "import": adopt,
    "mark failed": lambda store: store.mark_failed(digest_of("two"), "bit rot"),
}


def main(operation: str, folder: Path) -> None:
    prepare(folder / "before")
    if operation == "migrate":
        downgrade(folder / "before")
    elif operation != "open":  # its left-overs are for that one only
        AdapterStore(folder / "before").close()
    old = state_after(folder, lambda store: None)
    new = state_after(folder, OPERATIONS[operation])
    outcomes = []
    for kill_at in range(10_000):
        root = copy(folder)
        killed = run_killed(root, operation, kill_at)
        left = inspect(root)
        outcomes.append("old" if left == old else "new" if left == new else f"neither: {left}")
        if not killed:
            break
    print(json.dumps({"same": old == new, "outcomes": outcomes}))


def state_after(folder: Path, operation: Callable[[AdapterStore], object]) -> Any:
    root = copy(folder)
    with AdapterStore(root) as store:
        operation(store)
    return inspect(root)


def copy(folder: Path) -> Path:
    shutil.rmtree(folder / "now", ignore_errors=True)
    shutil.copytree(folder / "before", folder / "now", symlinks=True)
    return folder / "now"


def run_killed(root: Path, operation: str, kill_at: int) -> bool:
    """Runs the operation in a process that dies at its kill_at-th effect; False if it came to its end."""
    child = os.fork()
    if child == 0:
        if operation in ("open", "migrate"):
            die_at(kill_at)
        store = AdapterStore(root)
        die_at(kill_at)
        OPERATIONS[operation](store)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0, "the operation failed by itself"
    return False


def die_at(kill_at: int) -> None:
    if sys.getprofile() is not None:
        return  # it counts already
    seen = 0

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal seen
        if event in ("c_call", "c_return") and argument.__name__ in EFFECTS:
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.setprofile(watch)


def inspect(root: Path) -> Any:
    """All that a store opened now has to say, after checking that it holds together."""
    with AdapterStore(root) as store:
        records = store.list(page_size=1000)[0]
        for record in records:
            if record.state is AdapterState.READY:
                store.verify(record.facts.digest)
        listed = {record.facts.digest.removeprefix("sha256:") for record in records}
        left_over = set(os.listdir(root / "blobs/sha256")) - listed
        assert not left_over, f"blobs {left_over} are in nobody's list"
        assert len(os.listdir(root / "staging")) == 2, "a dead process left staging behind"
        quarantined = [entry.place for entry in store.quarantined()]
        assert len(quarantined) == len(os.listdir(root / "quarantine")), "quarantine has a half entry"
        for place in quarantined:
            assert len(os.listdir(root / place / "files")) == 2, "damaged files were lost"
        for record in records:
            if record.state is AdapterState.FAILED:
                assert record.facts.digest.removeprefix("sha256:") not in os.listdir(root / "blobs/sha256")
                assert "were moved to quarantine/" in record.error
        return [
            [r.reference, r.facts.digest, r.state, r.aliases, r.pinned, r.labels, r.error, r.description]
            for r in records
        ]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
