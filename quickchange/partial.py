"""Where a download lies until it is whole: a folder beside its destination that outlives its process.

Knows nothing of channels.
"""

import hashlib
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import google_crc32c
from google.protobuf import json_format

from quickchange.errors import AdapterDirectoryError, DataLossError
from quickchange.upload import ALLOWED_FILES
from quickchange.v1 import adapters_pb2

if sys.platform != "win32":
    import fcntl

HEADER_FILE = "download.json"

_BLOCK_BYTES = 1 << 20


def partial_of(destination: Path) -> Path:
    """The folder that holds what has arrived of a download into `destination`."""
    return destination.parent / f".{destination.name}.partial"


class PartialFolder:
    """The folder of one download: its header and its files as far as they have arrived. One process has it.

    Raises:
        AdapterDirectoryError: another process downloads into the same destination, or what has the folder's
            name is not one of ours.
    """

    def __init__(self, destination: Path) -> None:
        self._destination = destination
        self.path = partial_of(destination)
        self._is_ours = False
        self._lock: int | None = None
        if self.path.is_symlink() or self.path.exists():
            self._take()

    def header(self) -> adapters_pb2.DownloadHeader | None:
        """What an earlier process was promised; None if there is nothing to go on with."""
        try:
            text = (self.path / HEADER_FILE).read_text(encoding="utf-8")
            header = json_format.Parse(text, adapters_pb2.DownloadHeader())
            require_allowed(header)
        except (OSError, ValueError, json_format.ParseError, DataLossError):
            return None
        return header

    def begin(self, header: adapters_pb2.DownloadHeader) -> Iterator["IncomingFile"]:
        """Forgets whatever there was; the files that will be, all empty."""
        self.discard()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.path.mkdir(mode=0o700)
        except FileExistsError as error:
            raise self._busy() from error
        self._take()
        (self.path / HEADER_FILE).write_text(json_format.MessageToJson(header), encoding="utf-8")
        return self.files(header)

    def files(self, header: adapters_pb2.DownloadHeader) -> Iterator["IncomingFile"]:
        """The promised files, each with what there is of it."""
        return (IncomingFile(self.path / file.name, file) for file in header.files)

    def become(self) -> None:
        """Lets the destination appear, durably; its files must be durable by then."""
        (self.path / HEADER_FILE).unlink()
        self.path.chmod(0o755)  # 0o700 is for the time in between
        _sync(self.path)
        os.replace(self.path, self._destination)
        _sync(self._destination.parent)

    def discard(self) -> None:
        """Removes it, if it is there."""
        if self._is_ours:
            shutil.rmtree(self.path, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Lets other processes have it; what is in it stays."""
        self._is_ours = False
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take(self) -> None:
        """It must be a folder of ours: who could put links there could have our bytes written elsewhere."""
        if sys.platform != "win32":
            self._lock = self._locked()
        self._is_ours = True

    def _locked(self) -> int:
        """A descriptor that no other process has at the same time."""
        try:
            lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError as error:
            raise self._in_the_way("is not a folder") from error
        if os.fstat(lock).st_uid != os.geteuid():
            os.close(lock)
            raise self._in_the_way("belongs to another user")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_there = os.path.samestat(os.fstat(lock), self.path.lstat())
        except OSError as error:
            os.close(lock)
            raise self._busy() from error
        if not is_there:  # whoever had it became the destination meanwhile
            os.close(lock)
            raise self._busy()
        return lock

    def _busy(self) -> AdapterDirectoryError:
        return AdapterDirectoryError(
            f"another process downloads into {self._destination}; wait for it, or choose another folder",
            reason="FOLDER_BUSY",
        )

    def _in_the_way(self, what: str) -> AdapterDirectoryError:
        return AdapterDirectoryError(
            f"{self.path}, where the download is to be collected, {what}; remove it, or choose another "
            "destination",
            reason="FOLDER_EXISTS",
        )


class IncomingFile:
    """One file while it arrives, from the bytes on that are there already.

    Raises:
        DataLossError: more is there than the file is promised to have.
    """

    def __init__(self, path: Path, promised: adapters_pb2.UploadFile) -> None:
        self._name = promised.name
        self._promised_sha256 = promised.sha256
        self.promised = (promised.name, promised.size_bytes, promised.sha256)
        self.size_bytes = promised.size_bytes
        self._file: BinaryIO = _opened(path)
        self._sha256 = hashlib.sha256()
        while block := self._file.read(_BLOCK_BYTES):
            self._sha256.update(block)
        self.received_bytes = self._file.tell()
        if self.received_bytes > self.size_bytes:
            self.close()
            raise self._too_long()

    def write(self, chunk: adapters_pb2.UploadChunk) -> None:
        """Appends the next bytes.

        Raises:
            DataLossError: they are not the next ones, their checksum is wrong, or they are too many.
        """
        if chunk.write_offset != self.received_bytes:
            raise broken(
                f"goes on at byte {chunk.write_offset} of {self._name}, {self.received_bytes} was expected"
            )
        if google_crc32c.value(chunk.data) != chunk.crc32c:
            raise broken(f"has a wrong checksum in the chunk at byte {chunk.write_offset} of {self._name}")
        if self.received_bytes + len(chunk.data) > self.size_bytes:
            raise self._too_long()
        self._file.write(chunk.data)
        self._sha256.update(chunk.data)
        self.received_bytes += len(chunk.data)

    def finish(self) -> None:
        """Makes the file durable.

        Raises:
            DataLossError: it is not the promised one.
        """
        if self.received_bytes != self.size_bytes:
            raise broken(f"has {self.received_bytes} of {self.size_bytes} bytes of {self._name}")
        if self._sha256.hexdigest() != self._promised_sha256:
            raise broken(f"has a {self._name} whose SHA-256 is not the promised one")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.close()

    def close(self) -> None:
        self._file.close()

    def _too_long(self) -> DataLossError:
        return broken(f"has more than the promised {self.size_bytes} bytes of {self._name}")


def require_allowed(header: adapters_pb2.DownloadHeader) -> None:
    """A name from the wire becomes a path, so only the known ones may pass.

    Raises:
        DataLossError: a name is none of an adapter's, or comes twice.
    """
    names: Sequence[str] = [file.name for file in header.files]
    for name in names:
        if name not in ALLOWED_FILES:
            raise broken(f"has a file named {name!r}; an adapter has {', '.join(ALLOWED_FILES)}")
    if len(set(names)) != len(names):
        raise broken("lists a file twice")


def broken(what: str) -> DataLossError:
    """The error of a download that cannot be gone on with."""
    return DataLossError(f"the download {what}; nothing was kept, pull it again", reason="CHECKSUM_MISMATCH")


def _opened(path: Path) -> BinaryIO:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    return os.fdopen(descriptor, "r+b")


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
