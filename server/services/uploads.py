"""One upload: the header's checks, then chunks to a staging folder. Knows neither calls nor adapters.

Memory does not grow with the upload: each chunk is checked, hashed and written before the next one is read.
"""

import hashlib
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Final

import google_crc32c

from adapters.blobs import disk_errors
from adapters.bundle import MAX_BUNDLE_BYTES
from adapters.errors import AdapterCorruptError, CapacityError, UploadOffsetError
from adapters.files import BUNDLE_FILE, CONFIG_FILE, WEIGHTS_FILE
from adapters.names import check_description, check_labels, check_name, check_version
from adapters.spec import MAX_CONFIG_BYTES
from quickchange.v1 import adapters_pb2
from server.config import MIB
from server.errors import DeadlineError, InvalidRequestError, QueueFullError

MAX_CHUNK_BYTES: Final = MIB

_REQUIRED_FILES: Final = (CONFIG_FILE, WEIGHTS_FILE)
_ALLOWED_FILES: Final = (*_REQUIRED_FILES, BUNDLE_FILE)
_JSON_LIMITS: Final = {CONFIG_FILE: MAX_CONFIG_BYTES, BUNDLE_FILE: MAX_BUNDLE_BYTES}
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


class TooManyUploadsError(QueueFullError):
    """Every place for an upload is taken."""

    reason = "TOO_MANY_UPLOADS"


class UploadStalledError(DeadlineError):
    """The next chunk did not come in time."""

    reason = "UPLOAD_STALLED"


@dataclass(frozen=True, slots=True)
class DeclaredFile:
    """What the header says of a file, before a byte of it has come."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class UploadPlan:
    """A header that passed its checks."""

    name: str
    version: int | None
    files: tuple[DeclaredFile, ...]
    validate_only: bool
    labels: Mapping[str, str]
    description: str

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


def plan_of(header: adapters_pb2.UploadHeader, max_upload_bytes: int) -> UploadPlan:
    """
    Raises:
        InvalidRequestError, InvalidAdapterError: naming what is wrong.
        CapacityError: the upload is larger than this server takes.
    """
    plan = UploadPlan(
        name=check_name(header.name),
        version=check_version(header.version) if header.HasField("version") else None,
        files=tuple(_declared(file, index) for index, file in enumerate(header.files)),
        validate_only=header.validate_only,
        labels=check_labels(header.labels),
        description=check_description(header.description),
    )
    names = [file.name for file in plan.files]
    if len(set(names)) != len(names) or not set(_REQUIRED_FILES) <= set(names):
        raise InvalidRequestError(
            "header.files",
            f"are {', '.join(names) or 'none'}; send {' and '.join(_REQUIRED_FILES)} once each, "
            f"and {BUNDLE_FILE} if there is one",
        )
    if plan.size_bytes > max_upload_bytes:
        raise CapacityError(
            f"the upload has {plan.size_bytes} bytes, at most {max_upload_bytes} are taken",
            reason="UPLOAD_TOO_LARGE",
        )
    return plan


def _declared(file: adapters_pb2.UploadFile, index: int) -> DeclaredFile:
    where = f"header.files[{index}]"
    if file.name not in _ALLOWED_FILES:
        raise InvalidRequestError(
            f"{where}.name", f"is {file.name[:128]!r}, must be one of {', '.join(_ALLOWED_FILES)}"
        )
    if file.size_bytes == 0:
        raise InvalidRequestError(f"{where}.size_bytes", "is 0, must be the size of the file")
    limit = _JSON_LIMITS.get(file.name)
    if limit is not None and file.size_bytes > limit:
        raise InvalidRequestError(
            f"{where}.size_bytes", f"is {file.size_bytes}, {file.name} may have at most {limit}"
        )
    if not _SHA256.fullmatch(file.sha256):
        raise InvalidRequestError(f"{where}.sha256", "must be 64 lower-case hexadecimal digits")
    return DeclaredFile(file.name, file.size_bytes, file.sha256)


@dataclass(slots=True)
class _OpenFile:
    declared: DeclaredFile
    sink: FileIO
    written: int = 0
    digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)


class StagedUpload:
    """The files of one upload on their way to disk. Every method blocks; one thread at a time."""

    def __init__(self, folder: Path, plan: UploadPlan) -> None:
        """
        Args:
            folder: an empty one; its removal is the caller's.

        Raises:
            CapacityError: the disk is full.
        """
        with disk_errors():
            self._files = [
                _OpenFile(item, (folder / item.name).open("xb", buffering=0)) for item in plan.files
            ]

    def write(self, chunk: adapters_pb2.UploadChunk) -> None:
        """Checks a chunk and appends it to its file.

        Raises:
            InvalidRequestError, UploadOffsetError, AdapterCorruptError, CapacityError
        """
        file = self._file_of(chunk)
        if google_crc32c.value(chunk.data) != chunk.crc32c:
            raise AdapterCorruptError(
                f"chunk of {file.declared.name} at {chunk.write_offset}: crc32c does not match; send it again"
            )
        with disk_errors():
            _write_all(file.sink, chunk.data)
        file.digest.update(chunk.data)
        file.written += len(chunk.data)

    def finish(self) -> None:
        """Closes the files and checks that each is whole.

        Raises:
            InvalidRequestError, AdapterCorruptError, CapacityError
        """
        for file in self._files:
            with disk_errors():
                file.sink.close()
            declared = file.declared
            if file.written != declared.size_bytes:
                raise InvalidRequestError(
                    "chunk", f"{declared.name} ended after {file.written} of {declared.size_bytes} bytes"
                )
            if file.digest.hexdigest() != declared.sha256:
                raise AdapterCorruptError(f"{declared.name}: sha256 does not match; send it again")

    def abandon(self) -> None:
        """Closes the files, whose bytes nobody wants any more; harmless to repeat, or after `finish`."""
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
        if chunk.write_offset != file.written:
            raise UploadOffsetError(
                f"chunk of {name} is for offset {chunk.write_offset}, the file stands at {file.written}"
            )
        if file.written + len(chunk.data) > size_bytes:
            raise InvalidRequestError("chunk.data", f"goes past the {size_bytes} bytes declared for {name}")
        return file


def _write_all(sink: FileIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[sink.write(rest) :]
