"""Owns folders that are made once and kept: locked against other processes, visible only when complete.

Knows no models.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def default_cache_dir() -> Path:
    """$QUICKCHANGE_CACHE, or ~/.cache/quickchange."""
    chosen = os.environ.get("QUICKCHANGE_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "quickchange"


def make_once(folder: Path, build: Callable[[Path], None]) -> bool:
    """Makes `folder` by `build(temporary folder)` unless it is there; True if this call built it.

    The folder appears by one rename after its files are on the disk, so a crash leaves no half of it; of two
    processes that ask at once one builds, the other waits and finds it.
    """
    if folder.is_dir():
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent / f"{folder.name}.lock"):
        if folder.is_dir():
            return False
        publish_folder(folder, build)
    return True


def publish_folder(folder: Path, build: Callable[[Path], None]) -> None:
    """Fills a temporary sibling of `folder`, flushes it and renames it; after a failure nothing stays.

    Raises:
        OSError: `folder` exists and is not empty, or the disk failed.
    """
    staged = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        build(staged)
        _make_readable(staged)
        flush_tree(staged)
        staged.rename(folder)
        _flush(folder.parent)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def publish_file(file: Path, build: Callable[[Path], None]) -> None:
    """As `publish_folder`, for one file; the folder it is to lie in is made.

    Raises:
        FileExistsError: `file` exists.
        OSError: the disk failed.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{file.name}.", dir=file.parent) as folder:
        staged = Path(folder) / file.name
        build(staged)
        staged.chmod(0o644)
        _flush(staged)
        if file.exists():  # a rename would replace it
            raise FileExistsError(f"{file} exists already; remove it or choose another --out")
        staged.rename(file)
    _flush(file.parent)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """An exclusive lock between processes, freed when this one dies."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def flush_tree(folder: Path) -> None:
    """Flushes everything in a folder, and the folder, to disk."""
    for path in [*folder.rglob("*"), folder]:
        _flush(path)


def _make_readable(folder: Path) -> None:
    """For others too: what was made so far may be private."""
    for path in [*folder.rglob("*"), folder]:
        path.chmod(0o755 if path.is_dir() else 0o644)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
