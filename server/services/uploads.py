"""The bytes of one upload on their way to disk: checked, hashed and written. Knows neither calls nor names.

Memory does not grow with the upload: each chunk is checked, hashed and written before the next one is read.
"""

import hashlib
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Final

import google_crc32c

from adapters.blobs import disk_errors
from adapters.errors import AdapterCorruptError, UploadOffsetError
from adapters.facts import StoredFile
from quickchange.v1 import adapters_pb2
from server.config import MIB
from server.errors import InvalidRequestError

MAX_CHUNK_BYTES: Final = MIB


class ChunkCorruptError(AdapterCorruptError):
    """A chunk is not what its checksum says; what came before it is sound."""


class UploadIncompleteError(InvalidRequestError):
    """The stream ended before the files were whole."""


@dataclass(frozen=True, slots=True)
class Received:
    """Where an upload stands: what it needs to go on.

    Attributes:
        offsets: bytes of each file, in the plan's order.
        digests: over exactly these bytes; None if they have to be read again.
    """

    offsets: tuple[int, ...]
    digests: "tuple[hashlib._Hash, ...] | None" = None


@dataclass(slots=True)
class _OpenFile:
    declared: StoredFile
    sink: FileIO
    written: int
    digest: "hashlib._Hash"
    begun: bool = False
    """A chunk of this stream was written."""
    unsynced: bool = False


class StagedUpload:
    """The files of one upload on their way to disk. Every method blocks; one thread at a time."""

    def __init__(self, folder: Path, files: Sequence[StoredFile], received: Received | None = None) -> None:
        """
        Args:
            folder: an empty one, or what an earlier stream left there; its removal is the caller's.
            received: how much of it counts; anything after that is written over. None: nothing yet.

        Raises:
            CapacityError: the disk is full.
        """
        self._files: list[_OpenFile] = []
        self.unsynced_bytes = 0
        try:
            with disk_errors():
                for index, file in enumerate(files):
                    self._files.append(_opened(folder / file.name, file, received, index))
        except BaseException:
            self.close()
            raise

    @property
    def remaining_bytes(self) -> int:
        """What is still to come."""
        return sum(file.declared.size_bytes - file.written for file in self._files)

    def received(self) -> Received:
        """Where the upload stands."""
        return Received(
            tuple(file.written for file in self._files), tuple(file.digest for file in self._files)
        )

    def write(self, chunk: adapters_pb2.UploadChunk) -> None:
        """Checks a chunk and puts it where its file stands; the first one of a stream may start it again.

        Raises:
            InvalidRequestError, UploadOffsetError, AdapterCorruptError, CapacityError
        """
        file = self._file_of(chunk)
        if google_crc32c.value(chunk.data) != chunk.crc32c:
            raise ChunkCorruptError(
                f"chunk of {file.declared.name} at {chunk.write_offset}: crc32c does not match; send it again"
            )
        if chunk.write_offset != file.written:
            file.written, file.digest = 0, hashlib.sha256()
        with disk_errors():
            _write_all(file.sink, chunk.data, file.written)
        file.digest.update(chunk.data)
        file.written += len(chunk.data)
        file.begun = file.unsynced = True
        self.unsynced_bytes += len(chunk.data)

    def sync(self) -> None:
        """Makes what was written durable.

        Raises:
            CapacityError: the disk did not take it; nothing of the upload can be trusted any more.
        """
        for file in self._files:
            if file.unsynced:
                with disk_errors():
                    os.fdatasync(file.sink.fileno())
                file.unsynced = False
        self.unsynced_bytes = 0

    def finish(self) -> None:
        """Checks that each file is whole.

        Raises:
            InvalidRequestError, AdapterCorruptError
        """
        for file in self._files:
            declared = file.declared
            if file.written != declared.size_bytes:
                raise UploadIncompleteError(
                    "chunk", f"{declared.name} ended after {file.written} of {declared.size_bytes} bytes"
                )
            if file.digest.hexdigest() != declared.sha256:
                raise AdapterCorruptError(f"{declared.name}: sha256 does not match; send it again")

    def close(self) -> None:
        """Closes the files as they are; harmless to repeat."""
        for file in self._files:
            with suppress(OSError):
                file.sink.close()

    def _file_of(self, chunk: adapters_pb2.UploadChunk) -> _OpenFile:
        if chunk.file_index >= len(self._files):
            raise InvalidRequestError(
                "chunk.file_index", f"is {chunk.file_index}, the header names {len(self._files)} files"
            )
        if not 0 < len(chunk.data) <= MAX_CHUNK_BYTES:
            raise InvalidRequestError(
                "chunk.data", f"has {len(chunk.data)} bytes, must have 1 to {MAX_CHUNK_BYTES}"
            )
        file = self._files[chunk.file_index]
        name, size_bytes = file.declared.name, file.declared.size_bytes
        starts_again = chunk.write_offset == 0 and not file.begun
        if chunk.write_offset != file.written and not starts_again:
            raise UploadOffsetError(
                f"chunk of {name} is for offset {chunk.write_offset}, the file stands at {file.written}"
            )
        if chunk.write_offset + len(chunk.data) > size_bytes:
            raise InvalidRequestError("chunk.data", f"goes past the {size_bytes} bytes declared for {name}")
        return file


def _opened(path: Path, declared: StoredFile, received: Received | None, index: int) -> _OpenFile:
    if received is None:
        return _OpenFile(declared, path.open("xb", buffering=0), 0, hashlib.sha256())
    if path.is_file() and not path.is_symlink():
        _make_ours(path)
    sink = FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "r+b")
    try:
        written = min(received.offsets[index], sink.seek(0, os.SEEK_END))
        sink.truncate(written)
        known = received.digests is not None and written == received.offsets[index]
        digest = received.digests[index] if received.digests and known else _digest_of(sink)
    except BaseException:
        sink.close()
        raise
    return _OpenFile(declared, sink, written, digest)


def _make_ours(path: Path) -> None:
    """Writable, if it was sealed already; and a file of its own, if its canary's blob still shares it."""
    copy = path.parent.with_name(f"copy-{path.name}")  # not among the adapter's files
    with disk_errors():
        copy.unlink(missing_ok=True)  # of a process that was killed here
        if path.stat().st_nlink > 1:
            with path.open("rb") as source, copy.open("xb") as sink:
                shutil.copyfileobj(source, sink, MAX_CHUNK_BYTES)
                sink.flush()
                os.fsync(sink.fileno())  # or the bytes that were durable would not be any more
            copy.replace(path)
        path.chmod(0o600)


def _digest_of(sink: FileIO) -> "hashlib._Hash":
    sink.seek(0)
    digest = hashlib.sha256()
    while data := sink.read(MAX_CHUNK_BYTES):
        digest.update(data)
    return digest


def _write_all(sink: FileIO, data: bytes, offset: int) -> None:
    rest = memoryview(data)
    while rest:
        count = os.pwrite(sink.fileno(), rest, offset)
        rest, offset = rest[count:], offset + count
