"""Adapter files on disk, by content: staged, sealed, moved into place whole, checked. Knows no names.

root/blobs/sha256/<64 hex>/   published files, never changed
root/staging/<session>/…      what a living process is receiving or throwing away
root/staging/<session>.lock   held while that process lives; staging of the dead is swept at the next start
root/uploads/…                uploads that may go on after a cut: see uploads.py
root/quarantine/…             damaged files: see quarantine.py
root/reading.lock             held while somebody reads the whole store; nothing is removed meanwhile
"""

import contextlib
import errno
import hashlib
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from adapters.durable import make_folder, remove_tree, sync_folder, try_lock
from adapters.errors import (
    AdapterCorruptError,
    AdapterNotFoundError,
    CapacityError,
    InvalidAdapterError,
)
from adapters.facts import StoredFile
from adapters.files import ADAPTER_FILES, open_regular
from adapters.leases import Lease, Leases, alone_with, sharing
from adapters.names import check_digest
from adapters.strict_json import brief

_HEX_DIGEST = re.compile(r"[0-9a-f]{64}")
_SESSION = re.compile(r"[0-9a-f]{32}")
_LOCK_SUFFIX = ".lock"
_CHUNK_BYTES = 1024 * 1024
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class BlobFolder:
    """The files of a store. One thread at a time may install and take out; all else is thread-safe."""

    def __init__(self, root: Path) -> None:
        """Makes the folders where they are missing and removes what dead processes left in staging."""
        self._blobs = root / "blobs" / "sha256"
        self._staging = root / "staging"
        self._uploads = root / "uploads"
        for folder in (root / "blobs", self._blobs, self._staging):
            make_folder(folder)
        self._reading_lock = root / "reading.lock"
        self._leases = Leases()
        self._session, self._lock = self._begin_session()
        self.sweep()

    def close(self) -> None:
        """Ends the session; everything this process staged is removed, and its leases end."""
        self._leases.close()
        remove_tree(self._session)
        self._lock_path(self._session.name).unlink(missing_ok=True)
        os.close(self._lock)

    def new_staging(self) -> Path:
        """An empty folder of this process, for files that are not published yet."""
        with disk_errors():
            return Path(tempfile.mkdtemp(dir=self._session))

    def discard(self, staged: Path) -> None:
        """Removes a staging folder; nothing happens if it is gone already."""
        self._check_staged(staged)
        if staged.parent != self._session:  # of an upload, which must not be found with half of its files
            with contextlib.suppress(OSError):
                self.throw_away(staged)
            self.empty_trash()
        remove_tree(staged)

    def seal(self, staged: Path) -> tuple[StoredFile, ...]:
        """Makes the files read-only and durable, and answers what they are."""
        self._check_staged(staged)
        with disk_errors():
            files = tuple(_seal_file(staged / name) for name in sorted(os.listdir(staged)))
            sync_folder(staged)
        return files

    def describe(self, staged: Path) -> tuple[StoredFile, ...]:
        """What the files are, without sealing them."""
        self._check_staged(staged)
        with disk_errors():
            return tuple(_describe(staged / name) for name in sorted(os.listdir(staged)))

    def linked(self, staged: Path) -> Path:
        """Another staging folder with the same files: links, which take no room."""
        self._check_staged(staged)
        with disk_errors():
            folder = self.new_staging()
            for name in os.listdir(staged):
                os.link(staged / name, folder / name, follow_symlinks=False)
        return folder

    def install(self, staged: Path, digest: str) -> None:
        """Moves a sealed folder into place, whole or not at all; what was there before is taken out."""
        self.install_all({digest: staged})

    def install_all(self, staged: Mapping[str, Path]) -> None:
        """The same for many folders, by digest."""
        with disk_errors():
            for digest, folder in staged.items():
                self._check_staged(folder)
                self.take_out(digest)
                folder.rename(self._place(digest))
            sync_folder(self._blobs)

    def take_out(self, digest: str) -> None:
        """Moves a blob out of sight, whole or not at all; `empty_trash` removes it."""
        place = self._place(digest)
        if place.is_symlink():
            place.unlink()
        elif place.exists():
            self.throw_away(place)

    def take_out_unused(self, digest: str) -> bool:
        """Moves a blob out of sight unless somebody has a lease on it; whether it is out of sight."""
        with self.alone_with(digest) as unused:
            if unused:
                self.take_out(digest)
            return unused

    @contextlib.contextmanager
    def alone_with(self, digest: str) -> Iterator[bool]:
        """Whether nobody has a lease on a blob; nobody can get one while the block runs."""
        with alone_with(self._reading_lock) as nobody_reads, alone_with(self._place(digest)) as unused:
            yield nobody_reads and unused

    def throw_away(self, folder: Path) -> None:
        """Moves a folder of the store out of sight, whole or not at all; `empty_trash` removes it."""
        folder.rename(self._session / f"trash-{secrets.token_hex(8)}")
        sync_folder(folder.parent)

    def hold(self, digest: str) -> Lease | None:
        """Keeps a blob in place until the lease is released; None if it is not there."""
        return self._leases.take(digest, self._place(digest))

    def holding_all(self) -> contextlib.AbstractContextManager[None]:
        """Keeps every blob in place while the block runs."""
        return sharing(self._reading_lock)

    def empty_trash(self) -> None:
        """Removes what was taken out by this process."""
        for trash in self._session.glob("trash-*"):
            remove_tree(trash)

    def has(self, digest: str) -> bool:
        """Whether there is a blob, sound or not."""
        place = self._place(digest)
        return place.is_dir() and not place.is_symlink()

    def path_of(self, digest: str) -> Path:
        """The folder of a published blob; AdapterNotFoundError if there is none."""
        if not self.has(digest):
            raise AdapterNotFoundError(f"the files of {digest} are not in the store")
        return self._place(digest)

    def digests(self) -> list[str]:
        """Every blob there is, published or left over; other things in the folder are left alone."""
        return [f"sha256:{name}" for name in os.listdir(self._blobs) if _HEX_DIGEST.fullmatch(name)]

    def fault_of(self, digest: str, files: Sequence[StoredFile]) -> str:
        """What is wrong with a blob, judged by names and sizes only; empty if nothing is."""
        if not self.has(digest):
            return "its folder is missing"
        found = {entry.name: entry.stat(follow_symlinks=False) for entry in os.scandir(self._place(digest))}
        for file in files:
            status = found.get(file.name)
            if status is None or not stat.S_ISREG(status.st_mode):
                return f"{file.name} is missing"
            if status.st_size != file.size_bytes:
                return f"{file.name} has {status.st_size} bytes instead of {file.size_bytes}"
        return ""

    def verify(self, digest: str, files: Sequence[StoredFile]) -> None:
        """Reads every file again; AdapterCorruptError unless each is what it was when it was published."""
        fault = self.fault_of(digest, files)
        if fault:
            raise _corrupt(digest, fault)
        for file in files:
            try:
                now = _describe(self.path_of(digest) / file.name)
            except OSError as error:
                raise _corrupt(
                    digest, f"{file.name} cannot be read: {os.strerror(error.errno or 0)}"
                ) from error
            if now != file:
                raise _corrupt(digest, f"{file.name} has SHA-256 {now.sha256} instead of {file.sha256}")

    def sweep(self) -> None:
        """Removes every session whose lock can be had: its process is dead."""
        names = {name.removesuffix(_LOCK_SUFFIX) for name in os.listdir(self._staging)}
        for session in sorted(names - {self._session.name}):
            if not _SESSION.fullmatch(session):
                continue
            lock = self._try_lock(session)
            if lock is not None:
                remove_tree(self._staging / session)
                self._lock_path(session).unlink(missing_ok=True)
                os.close(lock)

    def _place(self, digest: str) -> Path:
        return self._blobs / check_digest(digest).removeprefix("sha256:")

    def _lock_path(self, session: str) -> Path:
        return self._staging / f"{session}{_LOCK_SUFFIX}"

    def _check_staged(self, staged: Path) -> None:
        if staged.parent != self._session and staged.parent.parent != self._uploads:
            raise ValueError(f"{staged} is not from new_staging() or `uploads` of this store")

    def _begin_session(self) -> tuple[Path, int]:
        while True:
            session = secrets.token_hex(16)
            lock = self._try_lock(session)
            if lock is not None:
                (self._staging / session).mkdir(mode=0o700)
                return self._staging / session, lock

    def _try_lock(self, session: str) -> int | None:
        """The lock of a session, as a descriptor; None if a living process has it or just removed it."""
        return try_lock(self._lock_path(session))


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Turns what a disk can do to us into a CapacityError; serving goes on without the write."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise CapacityError(
                "the disk of the adapter store is full; make room and publish again"
            ) from error
        raise CapacityError(
            f"the adapter store cannot be written ({os.strerror(error.errno or 0)}); see the server's disk",
            reason="STORAGE_FAILED",
        ) from error


def _seal_file(path: Path) -> StoredFile:
    if path.name not in ADAPTER_FILES:
        raise InvalidAdapterError(f"{brief(path.name)} is not a file of an adapter", reason="UNEXPECTED_FILE")
    with open_regular(path) as file:
        os.fchmod(file.fileno(), 0o400)
        os.fsync(file.fileno())
    return _describe(path)


def _describe(path: Path) -> StoredFile:
    sha256 = hashlib.sha256()
    size_bytes = 0
    with open_regular(path) as file:
        while chunk := file.read(_CHUNK_BYTES):
            sha256.update(chunk)
            size_bytes += len(chunk)
    return StoredFile(path.name, size_bytes, sha256.hexdigest())


def _corrupt(digest: str, why: str) -> AdapterCorruptError:
    return AdapterCorruptError(f"{digest} is damaged in the store: {why}; publish it again")
