"""Tells whether a file is another one than before, without reading it. Knows nothing of what is in it."""

from pathlib import Path
from typing import NamedTuple


class Mark(NamedTuple):
    """What differs between two states of a file: links are followed, so a new target is a new state."""

    device: int
    inode: int
    size_bytes: int
    changed_ns: int


def mark_of(path: Path) -> Mark | None:
    """As the file is now; None if it is not there or cannot be looked at."""
    try:
        status = path.stat()
    except OSError:
        return None
    # The time of the last change of status, not of the contents: nobody can set it back.
    return Mark(status.st_dev, status.st_ino, status.st_size, status.st_ctime_ns)
