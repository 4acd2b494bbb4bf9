"""Owns folders that are made once and kept: locked against other processes, visible only when complete. Knows no models."""

import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)


def default_cache_dir() -> Path:
    """$QUICKCHANGE_CACHE, or ~/.cache/quickchange."""
    chosen = os.environ.get("QUICKCHANGE_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "quickchange"


def make_once(folder: Path, build: Callable[[Path], None]) -> bool:
    """Make `folder` by `build(temporary folder)` unless it is there already; True if this call built it.

    The folder appears by one rename after its files are on the disk, so a crash leaves no half of it; two
    processes asking at once build it once, the second waits.
    """
    if folder.is_dir():
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(folder.name + ".lock")):
        if folder.is_dir():
            return False
        publish_folder(folder, build)
    return True


def publish_folder(folder: Path, build: Callable[[Path], None]) -> None:
    """Fill a temporary sibling of `folder` by `build`, flush it, rename it into place; on failure nothing stays."""
    staged = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        build(staged)
        flush_folder(staged)
        staged.chmod(0o755)  # mkdtemp makes it 0700
        staged.rename(folder)
        flush_file(folder.parent)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file `path` between processes; it is freed when this process dies."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def flush_folder(folder: Path) -> None:
    """fsync every file and folder below `folder`."""
    for path in sorted(folder.rglob("*")):
        flush_file(path)
    flush_file(folder)


def flush_file(path: Path) -> None:
    """fsync one file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
