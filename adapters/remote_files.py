"""Files at a URL, through fsspec: read, listed, and written whole or not at all. Knows nothing of stores.

A driver raises whatever its libraries do; here all of it becomes one error, except that a file is not there.
"""

import os
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations

from adapters.durable import sync_folder
from adapters.errors import AdapterError, InvalidAdapterError, ReadOnlyStoreError, StoreUnreachableError

_URL = re.compile(r"[a-z][a-z0-9+.-]*://.+", re.DOTALL)
_WRITTEN = frozenset({"file", "local", "memory", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"})
"""Protocols whose drivers write a file whole or not at all, and create one only where there is none."""

_CHUNK_BYTES = 1024 * 1024
_DRAFTS = ".drafts"  # only where the place is a folder
_DRAFT_LIFE_S = 86400.0
_WHY_CHARACTERS = 300


class RemoteFiles:
    """Thread-safe, as drivers are. Every method may take as long as the network does.

    All raise StoreUnreachableError when the place does not answer as it should.
    """

    def __init__(self, url: str) -> None:
        """
        Raises:
            InvalidAdapterError: this is no URL, or one that nothing here can read.
        """
        self.url = url.rstrip("/")
        self._fs, self._root = _opened(self.url)
        self._is_folder = isinstance(self._fs, LocalFileSystem)

    # Reading

    def read(self, name: str) -> bytes | None:
        """A small file; None if it is not there."""
        with self._reaching():
            try:
                return bytes(self._fs.cat_file(self._path(name)))
            except FileNotFoundError:
                return None

    def read_all(self, names: Sequence[str]) -> dict[str, bytes | None]:
        """Small files, many at once where the driver can; None for those that are not there."""
        with self._reaching():
            found = self._fs.cat([self._path(name) for name in names], on_error="return")
            by_name = {name: found[self._path(name)] for name in names}
            for raw in by_name.values():
                if isinstance(raw, Exception) and not isinstance(raw, FileNotFoundError):
                    raise raw
        return {name: None if isinstance(raw, Exception) else raw for name, raw in by_name.items()}

    def chunks(self, name: str) -> Iterator[bytes]:
        """A file's bytes, a piece at a time; FileNotFoundError if it is not there."""
        with self._reaching():
            source = self._fs.open(self._path(name), "rb")
        with source:
            while True:
                with self._reaching():
                    chunk = source.read(_CHUNK_BYTES)
                if not chunk:
                    return
                yield chunk

    def hash_of(self, name: str) -> str:
        """SHA-256 of a file, read for it; FileNotFoundError if it is not there."""
        hashed = sha256()
        for chunk in self.chunks(name):
            hashed.update(chunk)
        return hashed.hexdigest()

    def names_in(self, folder: str) -> list[str]:
        """Names in a folder; none if it is not there."""
        with self._reaching():
            self._fs.invalidate_cache()
            try:
                paths = self._fs.ls(self._path(folder), detail=False)
            except FileNotFoundError:
                return []
        return [str(path).rpartition("/")[2] for path in paths]

    def sizes_below(self, folder: str) -> dict[str, int]:
        """Bytes of every file in a folder and its folders, by its name from the URL on; none without it."""
        with self._reaching():
            self._fs.invalidate_cache()
            try:
                found = self._fs.find(self._path(folder), detail=True)
            except FileNotFoundError:
                return {}
        return {str(path)[len(self._root) + 1 :]: entry["size"] for path, entry in found.items()}

    # Writing

    def check_writable(self) -> None:
        """
        Raises:
            ReadOnlyStoreError: nothing is written over this protocol.
        """
        protocol = self.url.partition("://")[0]
        if protocol not in _WRITTEN:
            raise ReadOnlyStoreError(
                f"{self.url}: a store can be read over {protocol}://, not published; publish to one of "
                f"{', '.join(sorted(_WRITTEN))}"
            )

    def put(self, name: str, source: Path | bytes) -> None:
        """Writes a file over whatever is there; afterwards it is the old one or the new one."""
        try:
            with self._reaching():
                self._put(self._path(name), source)
        except FileNotFoundError as error:  # of what it is to lie in: a bucket, say
            raise self._unreachable(error) from error

    def create(self, name: str, data: bytes) -> bool:
        """Writes a file where there is none; False if there is another one, and it stays."""
        try:
            with self._reaching():
                self._create(self._path(name), data)
        except (StoreUnreachableError, FileExistsError, FileNotFoundError) as error:
            # Drivers say in their own ways that one is there; and an answer may be lost after the write.
            found = self.read(name)
            if found is None:
                raise self._unreachable(error) from error
            return found == data
        return True

    def remove(self, name: str) -> None:
        """Nothing happens if it is not there."""
        with self._reaching(), suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    def sweep(self) -> None:
        """Removes what killed processes left half written in a folder, once nobody can be at it any more."""
        drafts = Path(self._root) / _DRAFTS
        if self._is_folder and drafts.is_dir():
            for draft in drafts.iterdir():
                with self._reaching(), suppress(FileNotFoundError):
                    if draft.stat().st_mtime < time.time() - _DRAFT_LIFE_S:
                        draft.unlink()

    def _put(self, path: str, source: Path | bytes) -> None:
        if self._is_folder:
            with self._draft(source) as draft:
                draft.replace(_made_way(path))
                sync_folder(Path(path).parent)
        elif isinstance(source, bytes):
            self._fs.pipe_file(path, source)
        else:
            self._fs.put_file(str(source), path)

    def _create(self, path: str, data: bytes) -> None:
        if self._is_folder:
            with self._draft(data) as draft:
                os.link(draft, _made_way(path))  # unlike a rename it never replaces what is there
                sync_folder(Path(path).parent)
        else:
            self._fs.pipe_file(path, data, mode="create")

    @contextmanager
    def _draft(self, source: Path | bytes) -> Iterator[Path]:
        """A durable file beside the others, which is gone after the block unless it was moved."""
        draft = Path(_made_way(self._path(f"{_DRAFTS}/{secrets.token_hex(16)}")))
        try:
            with draft.open("xb") as sink:
                if isinstance(source, bytes):
                    sink.write(source)
                else:
                    with source.open("rb") as file:
                        while chunk := file.read(_CHUNK_BYTES):
                            sink.write(chunk)
                sink.flush()
                os.fsync(sink.fileno())
            yield draft
        finally:
            draft.unlink(missing_ok=True)

    # Both

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except (AdapterError, FileNotFoundError, FileExistsError):
            raise
        except Exception as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> StoreUnreachableError:
        if isinstance(error, StoreUnreachableError):
            return error
        why = " ".join(str(error).split())[:_WHY_CHARACTERS] or type(error).__name__
        return StoreUnreachableError(f"the store at {self.url} cannot be reached: {why}")


def _made_way(path: str) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return path


def _opened(url: str) -> tuple[Any, str]:
    """The driver, and what the URL is for it."""
    if not _URL.fullmatch(url) or "::" in url:
        raise InvalidAdapterError(f"{url!r} is no URL such as s3://bucket/folder", reason="BAD_URL")
    if urlsplit(url).password is not None:
        raise InvalidAdapterError(
            "the URL has a password in it, which logs would show; leave it to the driver's environment",
            reason="BAD_URL",
        )
    protocol = url.partition("://")[0]
    if protocol not in known_implementations:
        raise InvalidAdapterError(f"{url}: there is no driver for {protocol}://", reason="NO_DRIVER")
    try:
        fs, root = url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        raise _no_driver(url, protocol, error) from error
    except Exception as error:  # whatever the driver's libraries raise
        raise InvalidAdapterError(f"{url}: its driver refuses it: {error}", reason="BAD_URL") from error
    return fs, str(root).rstrip("/")


def _no_driver(url: str, protocol: str, error: ImportError) -> InvalidAdapterError:
    missing = getattr(error.__cause__, "name", None) or known_implementations[protocol]["class"]
    package = str(missing).partition(".")[0]
    return InvalidAdapterError(
        f"{url} needs the package {package}, which is not installed: pip install {package}",
        reason="NO_DRIVER",
    )
