"""Processes that die at every system call and SQL statement of what they do to a folder. No test lives here.

For programs without threads: each death is a fork.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

# What changes a disk, or says that it did. A process is killed before and after each of them.
EFFECTS = frozenset(
    {
        "chmod",
        "execute",
        "fchmod",
        "fdatasync",
        "flock",
        "fsync",
        "link",
        "mkdir",
        "open",
        "pwrite",
        "rename",
        "replace",
        "rmdir",
        "sendfile",
        "truncate",
        "unlink",
        "write",
    }
)

Work = Callable[[Path, Callable[[], None]], object]
"""What a process does in a folder; from its call of the function on it is mortal."""


def deaths(folder: Path, work: Work) -> Iterator[Path]:
    """What is left of folder/before after each death, and last of all after none."""
    for kill_at in range(10_000):
        root = copy(folder)
        killed = run_killed(root, work, kill_at)
        yield root
        if not killed:
            return


def copy(folder: Path) -> Path:
    shutil.rmtree(folder / "now", ignore_errors=True)
    shutil.copytree(folder / "before", folder / "now", symlinks=True)
    return folder / "now"


def run_killed(root: Path, work: Work, kill_at: int) -> bool:
    """Has a process do it that dies at its kill_at-th effect; False if it came to its end."""
    child = os.fork()
    if child == 0:
        work(root, lambda: die_at(kill_at))
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
