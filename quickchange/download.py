"""Puts a downloaded adapter on disk, whole and checked, or not at all, over as many calls as it takes.

Knows nothing of channels.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import google_crc32c

from quickchange import answers
from quickchange.connection import Attempts
from quickchange.errors import AdapterDirectoryError, DataLossError, QuickchangeError, UnavailableError
from quickchange.types import Adapter, PullResult
from quickchange.upload import ALLOWED_FILES
from quickchange.v1 import adapters_pb2


class Download:
    """Collects a download in a temporary folder beside its destination; `commit` moves it there in one step.

    Use as a context manager: leaving it without `commit` removes everything.

    Raises:
        AdapterDirectoryError: the destination is there already and is not an empty folder.
    """

    def __init__(self, directory: Path) -> None:
        if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
            raise AdapterDirectoryError(
                f"{directory} is there already and not an empty folder; choose another one, or remove it",
                reason="FOLDER_EXISTS",
            )
        self._directory = directory
        self._staging: Path | None = None
        self._adapter: Adapter | None = None
        self._files: list[_IncomingFile] = []
        self._expects_header = False
        self._had_bytes = 0

    def __enter__(self) -> "Download":
        self._directory.parent.mkdir(parents=True, exist_ok=True)
        self._staging = Path(tempfile.mkdtemp(prefix=f".{self._directory.name}.", dir=self._directory.parent))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            file.close()
        if self._staging is not None:
            shutil.rmtree(self._staging, ignore_errors=True)

    @property
    def size_bytes(self) -> int:
        """Of all files together; 0 before the header."""
        return sum(file.size_bytes for file in self._files)

    @property
    def received_bytes(self) -> int:
        return sum(file.received_bytes for file in self._files)

    def request(self, reference: str) -> adapters_pb2.DownloadAdapterRequest:
        """What to ask for: all of `reference`, or once its header was there, what is missing of it."""
        self._expects_header = True
        self._had_bytes = self.received_bytes
        if self._adapter is None:
            return adapters_pb2.DownloadAdapterRequest(adapter=reference)
        return adapters_pb2.DownloadAdapterRequest(
            adapter=self._adapter.reference, committed_offsets=[file.received_bytes for file in self._files]
        )

    def after(self, error: QuickchangeError, attempts: Attempts) -> Attempts:
        """What is left to go on with after a call ended with an error; the time counts anew after progress.

        Raises:
            QuickchangeError: the given one, if it did not break in the middle.
        """
        if self._adapter is None or not isinstance(error, UnavailableError):
            raise error
        return attempts.renewed() if self.received_bytes > self._had_bytes else attempts

    def receive(self, response: adapters_pb2.DownloadAdapterResponse) -> None:
        """Takes the next message.

        Raises:
            DataLossError: it does not continue what came before, or its checksum is wrong.
        """
        match response.WhichOneof("message"):
            case "header":
                self._open(response.header)
            case "chunk":
                self._write(response.chunk)

    def commit(self) -> PullResult:
        """Checks everything, and lets the folder appear.

        Raises:
            DataLossError: a file is incomplete or is not what the header promised.
        """
        if self._adapter is None or self._staging is None:
            raise _broken("ended before its header")
        for file in self._files:
            file.finish()
        self._staging.chmod(0o755)  # mkdtemp's 0o700 is for the time in between
        os.replace(self._staging, self._directory)
        _sync(self._directory.parent)
        return PullResult(self._adapter, self._directory, self.size_bytes)

    def _open(self, header: adapters_pb2.DownloadHeader) -> None:
        if not self._expects_header or self._staging is None:
            raise _broken("has a second header")
        self._expects_header = False
        if self._adapter is not None:
            self._check_same(header)
            return
        _require_allowed([file.name for file in header.files])
        self._adapter = answers.adapter(header.adapter)
        self._files = [_IncomingFile(self._staging / file.name, file) for file in header.files]

    def _check_same(self, header: adapters_pb2.DownloadHeader) -> None:
        promised = [(file.name, file.size_bytes, file.sha256) for file in header.files]
        if promised != [file.promised for file in self._files]:
            raise _broken("went on with another adapter")

    def _write(self, chunk: adapters_pb2.UploadChunk) -> None:
        if chunk.file_index >= len(self._files):
            raise _broken(f"has a chunk of file {chunk.file_index}, which its header does not list")
        self._files[chunk.file_index].write(chunk)


class _IncomingFile:
    """One file while it arrives."""

    def __init__(self, path: Path, promised: adapters_pb2.UploadFile) -> None:
        self._name = promised.name
        self._sha256 = hashlib.sha256()
        self._promised_sha256 = promised.sha256
        self.promised = (promised.name, promised.size_bytes, promised.sha256)
        self.size_bytes = promised.size_bytes
        self.received_bytes = 0
        self._file: BinaryIO = path.open("xb")

    def write(self, chunk: adapters_pb2.UploadChunk) -> None:
        if chunk.write_offset != self.received_bytes:
            raise _broken(
                f"goes on at byte {chunk.write_offset} of {self._name}, {self.received_bytes} was expected"
            )
        if google_crc32c.value(chunk.data) != chunk.crc32c:
            raise _broken(f"has a wrong checksum in the chunk at byte {chunk.write_offset} of {self._name}")
        if self.received_bytes + len(chunk.data) > self.size_bytes:
            raise _broken(f"has more than the promised {self.size_bytes} bytes of {self._name}")
        self._file.write(chunk.data)
        self._sha256.update(chunk.data)
        self.received_bytes += len(chunk.data)

    def finish(self) -> None:
        """Makes the file durable, if it is the promised one."""
        if self.received_bytes != self.size_bytes:
            raise _broken(f"has {self.received_bytes} of {self.size_bytes} bytes of {self._name}")
        if self._sha256.hexdigest() != self._promised_sha256:
            raise _broken(f"has a {self._name} whose SHA-256 is not the promised one")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.close()

    def close(self) -> None:
        self._file.close()


def _require_allowed(names: Sequence[str]) -> None:
    """A name from the wire becomes a path, so only the known ones may pass."""
    for name in names:
        if name not in ALLOWED_FILES:
            raise _broken(f"has a file named {name!r}; an adapter has {', '.join(ALLOWED_FILES)}")
    if len(set(names)) != len(names):
        raise _broken("lists a file twice")


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _broken(what: str) -> DataLossError:
    return DataLossError(f"the download {what}; nothing was kept, pull it again", reason="CHECKSUM_MISMATCH")
