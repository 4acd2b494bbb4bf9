"""Plain tar with regular files alone, written and read in order in constant memory. Knows no adapters.

What a reader does not expect it refuses: links, devices, folders, extensions of the format. A name is only
compared, and never becomes a path here.
"""

import hashlib
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple, NoReturn

from adapters.errors import AdapterCorruptError, InvalidAdapterError

_BLOCK_BYTES = tarfile.BLOCKSIZE
_CHUNK_BYTES = 1024 * 1024


class Member(NamedTuple):
    """The head of a member."""

    name: str
    size_bytes: int


class TarWriter:
    """Appends members to a file; `end` makes it whole."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def add(self, name: str, size_bytes: int, source: BinaryIO) -> str:
        """Copies a member.

        Returns:
            The SHA-256 of what was copied, in hexadecimal.

        Raises:
            AdapterCorruptError: the source does not have so many bytes.
        """
        head = tarfile.TarInfo(name)
        head.size, head.mode = size_bytes, 0o400
        self._file.write(head.tobuf(tarfile.USTAR_FORMAT))
        sha256, left = hashlib.sha256(), size_bytes
        while chunk := source.read(min(_CHUNK_BYTES, left)) if left else b"":
            sha256.update(chunk)
            self._file.write(chunk)
            left -= len(chunk)
        if left or source.read(1):
            raise AdapterCorruptError(f"{name} does not have the {size_bytes} bytes that it should have")
        self._file.write(bytes(-size_bytes % _BLOCK_BYTES))
        return sha256.hexdigest()

    def end(self) -> None:
        """Writes the mark of the end."""
        self._file.write(bytes(2 * _BLOCK_BYTES))


class TarReader:
    """Gives the members of an archive one after the other.

    Every method raises InvalidAdapterError, reason BAD_ARCHIVE, where the archive is not of this kind, and
    AdapterCorruptError where it ends too early.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def next(self) -> Member:
        """The next member, whose bytes have to be read, or skipped, before the one after it."""
        raw = self._exactly(_BLOCK_BYTES)
        try:
            head = tarfile.TarInfo.frombuf(raw, "ascii", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError):
            refuse("is damaged, or is no archive of a store")
        if head.type != tarfile.REGTYPE or head.size < 0:
            refuse(f"has the member {head.name[:100]!r}, which is no plain file")
        return Member(head.name, head.size)

    def chunks(self, size_bytes: int) -> Iterator[bytes]:
        """The bytes of the current member."""
        left = size_bytes
        while left:
            chunk = self._file.read(min(_CHUNK_BYTES, left))
            if not chunk:
                _ended()
            yield chunk
            left -= len(chunk)
        if any(self._exactly(-size_bytes % _BLOCK_BYTES)):
            refuse("has something between its members")

    def skip(self, size_bytes: int) -> None:
        """Passes the current member by."""
        for _ in self.chunks(size_bytes):
            pass

    def _exactly(self, count: int) -> bytes:
        raw = self._file.read(count)
        if len(raw) < count:
            _ended()
        return raw


def refuse(what: str) -> NoReturn:
    """Says what is wrong with an archive."""
    raise InvalidAdapterError(f"the archive {what}; export it again", reason="BAD_ARCHIVE")


def _ended() -> NoReturn:
    raise AdapterCorruptError("the archive ends too early; copy or export it again")
