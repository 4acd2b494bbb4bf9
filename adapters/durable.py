"""Folders, small files and locks that hold through a crash. Knows nothing of what they are for."""

import contextlib
import fcntl
import os
import shutil
from pathlib import Path

from adapters.errors import AdapterCorruptError


def make_folder(folder: Path) -> None:
    """Makes a folder where it is missing, durably; AdapterCorruptError if a link stands in its place."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.is_symlink():
        raise AdapterCorruptError(f"{folder.name} in the adapter store is a link; make it a folder")
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str, *, private: bool = False) -> None:
    """Writes a small file: afterwards it has the old text or the new one, whatever happens.

    Args:
        private: nobody but this user may read it.
    """
    draft = path.with_name(f".{path.name}")
    with draft.open("w", encoding="utf-8") as file:
        if private:
            os.fchmod(file.fileno(), 0o600)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    sync_folder(path.parent)


def remove_tree(path: Path) -> None:
    """Removes a folder and what is in it, or a link to one but never what it points at."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def try_lock(path: Path) -> int | None:
    """A lock that ends with its process, as a descriptor to close.

    None if somebody living has it or just removed it.
    """
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_ino == path.lstat().st_ino:  # else whoever had it removed it in between
            return lock
    os.close(lock)
    return None
