"""Kills a process inside the store, at every system call and SQL statement, and looks at what is left.

Run as a program, so that the processes it forks have no threads:
`python -m tests.adapters.killing OPERATION FOLDER` prints one line of JSON.
"""

import json
import os
import sqlite3
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapters.export_archive import export_store
from adapters.files import CONFIG_FILE, WEIGHTS_FILE
from adapters.retention import RetentionPolicy
from adapters.store import AdapterState, AdapterStore
from tests.adapters.dying import Work, copy, deaths
from tests.adapters.staging import digest_of, facts_of, publish, stage

ARCHIVE = "archive.tar"


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


def collect_and_remove(store: AdapterStore) -> None:
    store.collect(RetentionPolicy(keep_versions=1, min_age_s=0), dry_run=False)
    store.recover()


def write_archive(root: Path) -> None:
    """Beside the store, an archive of three contents; one of them is in the store already."""
    with AdapterStore(root) as store:
        publish_real(store, "known", 1, content=1)
    with tempfile.TemporaryDirectory() as other, AdapterStore(Path(other)) as source:
        publish_real(source, "known", 1, content=1)
        publish_real(source, "new", 2, content=2)
        publish_real(source, "sql", 7, content=3)
        source.update("new", 2, set_aliases=["prod"], pinned=True, labels={"a": "b"})
        export_store(source, root / ARCHIVE)


def publish_real(store: AdapterStore, name: str, version: int, content: int) -> None:
    """Files whose digest is that of what they hold, as an import insists."""
    import torch  # as an import does; the other operations do without
    from safetensors.torch import save_file

    from adapters.measures import stored_digest

    staged = store.new_staging()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (staged / CONFIG_FILE).write_text(json.dumps(config))
    save_file({"lora_A": torch.full((2, 4), float(content))}, staged / WEIGHTS_FILE)
    size_bytes = sum(path.stat().st_size for path in staged.iterdir())
    facts = replace(facts_of(name), digest=stored_digest(staged), size_bytes=size_bytes)
    store.publish(name, staged, facts, version=version)


def take_archive(store: AdapterStore, root: Path) -> None:
    from adapters.import_archive import import_store  # with torch

    import_store(store, root / ARCHIVE)


OPERATIONS: dict[str, Callable[[AdapterStore, Path], object]] = {
    "open": lambda store, root: None,
    "migrate": lambda store, root: None,
    "publish": lambda store, root: store.publish(
        "new", stage(store, "new"), facts_of("new"), labels={"a": "b"}
    ),
    "publish next version": lambda store, root: publish(store, "sql", "three"),
    "publish known content": lambda store, root: publish(store, "third", "two"),
    "heal": lambda store, root: publish(store, "sql", "broken"),
    "update": lambda store, root: store.update(
        "sql", 2, set_aliases=["prod", "next"], pinned=True, labels={"x": "y"}
    ),
    "delete": lambda store, root: delete_and_remove(store),
    "delete all": lambda store, root: store.delete("sql", all_versions=True),
    "collect": lambda store, root: collect_and_remove(store),
    "import": take_archive,
    "mark failed": lambda store, root: store.mark_failed(digest_of("two"), "bit rot"),
}


def main(operation: str, folder: Path) -> None:
    prepare(folder / "before")
    if operation == "migrate":
        downgrade(folder / "before")
    elif operation != "open":  # its left-overs are for that one only
        AdapterStore(folder / "before").close()
    if operation == "import":
        write_archive(folder / "before")
    old = inspect(copy(folder))
    root = copy(folder)
    with AdapterStore(root) as store:
        OPERATIONS[operation](store, root)
    new = inspect(root)
    outcomes = []
    for root in deaths(folder, working(operation)):
        left = inspect(root)
        outcomes.append("old" if left == old else "new" if left == new else f"neither: {left}")
    print(json.dumps({"same": old == new, "outcomes": outcomes}))


def working(operation: str) -> Work:
    def work(root: Path, be_mortal: Callable[[], None]) -> None:
        if operation in ("open", "migrate"):
            be_mortal()
        store = AdapterStore(root)
        be_mortal()
        OPERATIONS[operation](store, root)

    return work


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
