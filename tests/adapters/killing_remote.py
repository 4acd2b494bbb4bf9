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
from tests.adapters.dying import die_at


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
    old = inspect(_copy(folder))
    OPERATIONS[operation](_copy(folder))
    new = inspect(folder / "now")
    outcomes = []
    for kill_at in range(10_000):
        root = _copy(folder)
        killed = _run_killed(root, operation, kill_at)
        left = inspect(root)
        outcomes.append("old" if left == old else "new" if left == new else f"neither: {left}")
        OPERATIONS[operation](root)  # goes on with whatever was left
        assert inspect(root) == new, f"killed at {kill_at}, it cannot go on"
        if not killed:
            break
    print(json.dumps({"same": old == new, "outcomes": outcomes}))


def _url(root: Path) -> str:
    return (root / "remote").as_uri()


def _copy(folder: Path) -> Path:
    shutil.rmtree(folder / "now", ignore_errors=True)
    shutil.copytree(folder / "before", folder / "now", symlinks=True)
    return folder / "now"


def _run_killed(root: Path, operation: str, kill_at: int) -> bool:
    """Runs the operation in a process that dies at its kill_at-th effect; False if it came to its end."""
    child = os.fork()
    if child == 0:
        die_at(kill_at)
        threading.setprofile(sys.getprofile())
        OPERATIONS[operation](root)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0, "the operation failed by itself"
    return False


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
