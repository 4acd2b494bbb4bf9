"""Unfinished uploads on disk, so that they go on after a cut or a restart. Knows no wire and no format.

root/uploads/<64 hex>/plan.json   what the uploader announced, as the shelf's user wrote it
root/uploads/<64 hex>/state.json  how many bytes of each file are certainly on disk
root/uploads/<64 hex>/files/…     the bytes
root/uploads/<64 hex>/done.json   what became of it, once the files are published
root/uploads/<64 hex>.lock        held by the process that receives it
"""

import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from adapters.blobs import disk_errors
from adapters.durable import make_folder, remove_tree, replace_text, sync_folder, try_lock

_KEY = re.compile(r"[0-9a-f]{64}")
_LOCK_SUFFIX = ".lock"
_PLAN, _STATE, _DONE, _FILES = "plan.json", "state.json", "done.json", "files"


def shelf_key(upload_id: str, owner: str) -> str:
    """Where an upload lies: no uploader can name another's, nor a path."""
    return hashlib.sha256(json.dumps([owner, upload_id]).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Shelved:
    """What is on the shelf of one upload.

    Attributes:
        plan: as it was begun with.
        offsets: durable bytes of each file, in the plan's order.
        mark: changes whenever the offsets are saved, by whichever process.
        outcome: as `finish` got it; None while the upload is not over.
    """

    plan: str
    offsets: tuple[int, ...]
    mark: str
    outcome: str | None


class UploadShelf:
    """The unfinished uploads of a store. Thread-safe; several processes may use one folder."""

    def __init__(self, root: Path) -> None:
        self._folder = root / "uploads"
        with disk_errors():
            make_folder(self._folder)

    def take(self, key: str) -> "ShelfPlace | None":
        """The place of an upload, there or not yet; None while another stream or process has it."""
        folder = self._folder / key
        with disk_errors():
            lock = try_lock(_lock_of(folder))
        return None if lock is None else ShelfPlace(folder, lock)

    def find(self, key: str) -> Shelved | None:
        """What is there of an upload, perhaps while it is being received; None if nothing is."""
        return _read(self._folder / key)

    def sweep(self, ttl_s: float, keep: int) -> int:
        """Removes uploads that nobody touched for ttl_s, then the oldest beyond `keep`; how many went.

        Those that are being received stay, whatever their age.
        """
        by_age = sorted(self._ages())
        surplus = len(by_age) - keep
        expired = [key for index, (touched_s, key) in enumerate(by_age)
                   if index < surplus or time.time() - touched_s > ttl_s]  # fmt: skip
        return sum(self._remove(key) for key in expired)

    def total_bytes(self) -> int:
        """Bytes of all files on the shelf."""
        return sum(size for key in self._keys() for size in _sizes(self._folder / key / _FILES))

    def _remove(self, key: str) -> bool:
        place = self.take(key)
        if place is not None:
            place.remove()
        return place is not None

    def _keys(self) -> set[str]:
        names = {name.removesuffix(_LOCK_SUFFIX) for name in os.listdir(self._folder)}
        return {name for name in names if _KEY.fullmatch(name)}

    def _ages(self) -> Iterator[tuple[float, str]]:
        for key in self._keys():
            folder = self._folder / key
            with suppress(FileNotFoundError):  # removed meanwhile
                yield (folder if folder.is_dir() else _lock_of(folder)).lstat().st_mtime, key


class ShelfPlace:
    """One upload's place, held by whoever took it until `release` or `remove`. One thread at a time."""

    def __init__(self, folder: Path, lock: int) -> None:
        self._folder = folder
        self._lock: int | None = lock

    @property
    def files(self) -> Path:
        """The folder for the bytes."""
        return self._folder / _FILES

    def read(self) -> Shelved | None:
        """What is there; None if nothing is, or nothing that can go on."""
        return _read(self._folder)

    def begin(self, plan: str, file_count: int) -> None:
        """Makes room for a new upload; what was there before is gone.

        Raises:
            CapacityError: the disk does not take it.
        """
        with disk_errors():
            _remove_entry(self._folder)
            self.files.mkdir(mode=0o700, parents=True)
            self._write_state((0,) * file_count)
            replace_text(self._folder / _PLAN, plan)  # last: without it, nothing is there
            sync_folder(self._folder.parent)

    def save(self, offsets: tuple[int, ...]) -> str:
        """Notes how far the files are on disk, for good; their bytes must be durable already.

        Returns:
            The new mark.

        Raises:
            CapacityError: the disk does not take it.
        """
        with disk_errors():
            return self._write_state(offsets)

    def finish(self, offsets: tuple[int, ...], outcome: str) -> None:
        """Notes what became of the upload; its files are not needed any more. CapacityError as `save`."""
        with disk_errors():
            self._write_state(offsets)
            replace_text(self._folder / _DONE, outcome)
        remove_tree(self.files)

    def remove(self) -> None:
        """Removes the upload with all it has, and gives its place back."""
        _remove_entry(self._folder)
        _lock_of(self._folder).unlink(missing_ok=True)
        self.release()

    def release(self) -> None:
        """Gives the place back and leaves what is there; harmless to repeat."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _write_state(self, offsets: tuple[int, ...]) -> str:
        mark = secrets.token_hex(8)
        replace_text(self._folder / _STATE, json.dumps({"offsets": offsets, "mark": mark}))
        return mark


def _read(folder: Path) -> Shelved | None:
    try:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        plan = (folder / _PLAN).read_text(encoding="utf-8")
        done = folder / _DONE
        outcome = done.read_text(encoding="utf-8") if done.exists() else None
        if outcome is None and not (folder / _FILES).is_dir():
            return None  # the process ended between publishing the files and noting it
        return Shelved(plan, tuple(state["offsets"]), state["mark"], outcome)
    except (OSError, ValueError, KeyError):  # not there, or damaged: it begins again
        return None


def _remove_entry(folder: Path) -> None:
    """Its plan first: without one nothing is there, so nothing is told of files that are half removed."""
    with suppress(OSError):
        (folder / _PLAN).unlink()
    remove_tree(folder)


def _lock_of(folder: Path) -> Path:
    return folder.with_name(folder.name + _LOCK_SUFFIX)


def _sizes(folder: Path) -> Iterator[int]:
    with suppress(FileNotFoundError):
        for entry in os.scandir(folder):
            yield entry.stat(follow_symlinks=False).st_size
