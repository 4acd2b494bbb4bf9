"""Kills a push and a fetch at every system call, and looks at what is left. See dying.py.

`python -m tests.adapters.killing_remote OPERATION FOLDER` prints one line of JSON. FOLDER/before holds the
store `origin`, what was published of it once in `remote`, and `copies` of that without files; all of it was
made in FOLDER/now.
"""

import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adapters.errors import AdapterError
from adapters.mirror import files_of
from adapters.remote import RemotePlace
from adapters.remote_push import push_store
from adapters.replica import ReplicaStore
from adapters.store import AdapterStore
from tests.adapters.dying import Work, copy, deaths


def push(root: Path) -> None:
    with AdapterStore(root / "origin") as store:
        push_store(store, RemotePlace(_url(root)))


def fetch(root: Path) -> None:
    with ReplicaStore(root / "copies", RemotePlace(_url(root))) as replica:
        replica.fetch(replica.get("sql@1").facts.digest)


OPERATIONS: dict[str, Callable[[Path], None]] = {"push": push, "fetch": fetch}


def inspect(root: Path) -> Any:
    """What readers of the place see, each byte of it, and what the copies have, each byte of it."""
    place = RemotePlace(_url(root))
    latest = place.latest()
    assert latest is not None
    for digest, members in latest.manifest.contents.items():
        scratch = root / "scratch"
        scratch.mkdir()
        place.fetch(digest, files_of(members), scratch, lambda: True)
        assert not isinstance(place.facts({digest: members[0]})[digest], AdapterError)
        shutil.rmtree(scratch)
    with ReplicaStore(root / "copies", place) as replica:
        copies = os.listdir(root / "copies/blobs/sha256")
        for name in copies:
            replica.verify(f"sha256:{name}")
        assert len(os.listdir(root / "copies/staging")) == 2, "a dead process left staging behind"
    return [[(v.reference, v.digest, v.aliases) for v in latest.manifest.versions], copies]


def main(operation: str, folder: Path) -> None:
    old = inspect(copy(folder))
    OPERATIONS[operation](copy(folder))
    new = inspect(folder / "now")
    outcomes = []
    for number, root in enumerate(deaths(folder, _working(operation))):
        left = inspect(root)
        outcomes.append("old" if left == old else "new" if left == new else f"neither: {left}")
        OPERATIONS[operation](root)  # goes on with whatever was left
        assert inspect(root) == new, f"killed at {number}, it cannot go on"
    print(json.dumps({"same": old == new, "outcomes": outcomes}))


def _url(root: Path) -> str:
    return (root / "remote").as_uri()


def _working(operation: str) -> Work:
    def work(root: Path, mortal: Callable[[], None]) -> None:
        mortal()
        threading.setprofile(sys.getprofile())  # of threads that begin now
        OPERATIONS[operation](root)

    return work


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
