"""What of a folder is uploaded, its checksums and its chunks. Knows nothing of channels."""

import hashlib
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import google_crc32c

from quickchange.errors import AdapterDirectoryError, DataLossError
from quickchange.v1 import adapters_pb2

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MANIFEST_FILE = "quickchange.json"
REQUIRED_FILES = (CONFIG_FILE, WEIGHTS_FILE)
ALLOWED_FILES = (*REQUIRED_FILES, MANIFEST_FILE)
PICKLE_FILE = "adapter_model.bin"

CHUNK_BYTES = 1024 * 1024  # the most that a server takes


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """One file as it was when it was hashed."""

    path: Path
    size_bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "PlannedFile":
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            return cls(path, file.tell(), sha256)


@dataclass(frozen=True, slots=True)
class UploadPlan:
    """The files that go, in order."""

    files: tuple[PlannedFile, ...]

    @classmethod
    def of(cls, directory: Path) -> "UploadPlan":
        """Hashes what is to be sent; other files of the folder stay where they are.

        Raises:
            AdapterDirectoryError: the folder, or a file that an adapter must have, is not there.
        """
        require_adapter(directory)
        chosen = (directory / name for name in ALLOWED_FILES)
        return cls(tuple(PlannedFile.of(path) for path in chosen if path.is_file()))

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    def header(
        self,
        name: str,
        *,
        upload_id: str,
        labels: Mapping[str, str] | None = None,
        description: str = "",
        version: int | None = None,
        validate_only: bool = False,
    ) -> adapters_pb2.UploadHeader:
        return adapters_pb2.UploadHeader(
            name=name,
            upload_id=upload_id,
            files=[
                adapters_pb2.UploadFile(name=file.path.name, size_bytes=file.size_bytes, sha256=file.sha256)
                for file in self.files
            ],
            validate_only=validate_only,
            labels=labels,
            description=description,
            version=version,
        )

    def messages(
        self, header: adapters_pb2.UploadHeader, offsets: Sequence[int]
    ) -> Iterator[adapters_pb2.UploadAdapterRequest]:
        """The header, then every chunk; holds one chunk in memory.

        Args:
            offsets: bytes of each file that the server has already.

        Raises:
            DataLossError: a file became shorter or longer since it was hashed.
        """
        yield adapters_pb2.UploadAdapterRequest(header=header)
        for index, (file, offset) in enumerate(zip(self.files, offsets, strict=True)):
            for chunk in _chunks(index, file, offset):
                yield adapters_pb2.UploadAdapterRequest(chunk=chunk)


def new_upload_id() -> str:
    """For one upload and its continuations; nobody else can guess it."""
    return secrets.token_hex(16)


def _chunks(index: int, planned: PlannedFile, offset: int) -> Iterator[adapters_pb2.UploadChunk]:
    with planned.path.open("rb") as file:
        file.seek(offset)
        while data := file.read(CHUNK_BYTES):
            yield adapters_pb2.UploadChunk(
                file_index=index, write_offset=offset, data=data, crc32c=google_crc32c.value(data)
            )
            offset += len(data)
            if offset > planned.size_bytes:
                break
    if offset != planned.size_bytes:
        raise DataLossError(
            f"{planned.path} changed while it was uploaded; upload it again when nothing writes to it",
            reason="FILE_CHANGED",
        )


def require_adapter(directory: Path) -> None:
    """
    Raises:
        AdapterDirectoryError: the folder, or a file that an adapter must have, is not there.
    """
    if not directory.is_dir():
        raise AdapterDirectoryError(
            f"{directory} is not a folder; give the one that holds {' and '.join(REQUIRED_FILES)}",
            reason="NO_SUCH_FOLDER",
        )
    missing = [name for name in REQUIRED_FILES if not (directory / name).is_file()]
    if not missing:
        return
    if missing == [WEIGHTS_FILE] and (directory / PICKLE_FILE).is_file():
        raise AdapterDirectoryError(
            f"{directory} has no {WEIGHTS_FILE} but {PICKLE_FILE}, a pickle that can run code; "
            "if you trust it: PeftModel.from_pretrained(base, folder).save_pretrained(new_folder)",
            reason="PICKLE_WEIGHTS",
        )
    raise AdapterDirectoryError(
        f"{directory} has no {' and no '.join(missing)}; an adapter's folder, as PEFT saves it, has both",
        reason="MISSING_FILE",
    )
