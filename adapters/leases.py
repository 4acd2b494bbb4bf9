"""Published files that this process uses, made known to other processes by locks. Knows no names.

Whoever uses a blob shares the lock of its folder; whoever removes it has that lock alone. The kernel takes
locks back when a process ends, however it ends, so nothing is left to clean up. Locks of this kind hold
between the processes of one machine, as the catalogue does.
"""

import contextlib
import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


class Lease:
    """Keeps a blob's files in place until it is released."""

    def __init__(self, release: Callable[[], None]) -> None:
        self._release = release
        self._released = False

    def release(self) -> None:
        """Gives it back; harmless to repeat."""
        if not self._released:
            self._released = True
            self._release()


@dataclass(slots=True)
class _Held:
    descriptor: int
    count: int


class Leases:
    """The leases of one process: one open folder for each blob in use, however often it is. Thread-safe."""

    def __init__(self) -> None:
        self._held: dict[str, _Held] = {}
        self._lock = threading.Lock()

    def take(self, digest: str, folder: Path) -> Lease | None:
        """A lease on a blob; None if its folder is not there. Touches no file while another one lasts."""
        with self._lock:
            held = self._held.get(digest)
            if held is None:
                descriptor = _lock_shared(folder)
                if descriptor is None:
                    return None
                held = self._held[digest] = _Held(descriptor, 0)
            held.count += 1
        return Lease(lambda: self._give_back(digest))

    def close(self) -> None:
        """Gives every lease back."""
        with self._lock:
            for held in self._held.values():
                os.close(held.descriptor)
            self._held.clear()

    def _give_back(self, digest: str) -> None:
        with self._lock:
            held = self._held.get(digest)
            if held is None:
                return  # after `close`
            held.count -= 1
            if not held.count:
                del self._held[digest]
                os.close(held.descriptor)


@contextlib.contextmanager
def sharing(path: Path) -> Iterator[None]:
    """The lock of a file, made if need be, shared with others while the block runs."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def alone_with(path: Path) -> Iterator[bool]:
    """Whether nobody else has the lock of a file or folder; nobody can get it while the block runs."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:  # not there, or a link that nobody can have locked
        yield True
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
    else:
        yield True
    finally:
        os.close(descriptor)


def _lock_shared(folder: Path) -> int | None:
    """The folder's lock, as a descriptor; None if it is not there, or not any more."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if os.fstat(descriptor).st_ino == folder.lstat().st_ino:  # else it was removed while this waited
            return descriptor
    except OSError:
        os.close(descriptor)
        return None
    os.close(descriptor)
    return None
