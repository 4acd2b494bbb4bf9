"""Damaged files of a store, out of everybody's way and not thrown away. Knows no catalogue and no locks.

root/quarantine/<64 hex>.<number>/reason.json   what is wrong with them, and since when they are here
root/quarantine/<64 hex>.<number>/files/        as they were found

The files come last and whole, by one rename: a folder without them is of a process that ended before that.
"""

import json
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from adapters.blobs import disk_errors
from adapters.durable import make_folder, replace_text, sync_folder
from adapters.names import check_digest

_ENTRY = re.compile(r"([0-9a-f]{64})\.[1-9][0-9]{0,9}")
_REASON, _FILES = "reason.json", "files"


@dataclass(frozen=True, slots=True)
class Quarantined:
    """The damaged files of a content.

    Attributes:
        place: their folder, from the store's on: "quarantine/…".
        since_s: when they came, in seconds since the epoch.
        size_bytes: as they are, which may be less than they should have.
    """

    place: str
    digest: str
    reason: str
    since_s: float
    size_bytes: int


class QuarantineFolder:
    """The quarantine of a store. Whoever adds or removes is alone among all processes; reading is safe."""

    def __init__(self, root: Path) -> None:
        self._folder = root / "quarantine"
        with disk_errors():
            make_folder(self._folder)

    def next_place(self, digest: str) -> str:
        """Where the next damaged files of a content will lie."""
        name = check_digest(digest).removeprefix("sha256:")
        number = next(n for n in count(1) if not (self._folder / f"{name}.{n}").exists())
        return f"{self._folder.name}/{name}.{number}"

    def take(self, files: Path, place: str, reason: str) -> None:
        """Moves a folder with damaged files to a place, durably, and whole or not at all."""
        entry = self.path_of(place)
        entry.mkdir(mode=0o700)
        replace_text(entry / _REASON, json.dumps({"reason": reason, "since_s": time.time()}))
        sync_folder(self._folder)
        files.rename(entry / _FILES)
        sync_folder(entry)
        sync_folder(files.parent)

    def path_of(self, place: str) -> Path:
        """The folder of an entry."""
        return self._folder / Path(place).name

    def all(self) -> list[Quarantined]:
        """Everything that is here, the oldest first."""
        found = []
        for entry in filter(_has_files, self._entries()):
            with suppress(FileNotFoundError):  # another process collected it meanwhile
                found.append(_read(entry))
        return sorted(found, key=lambda entry: (entry.since_s, entry.place))

    def newest(self, digest: str) -> Quarantined | None:
        """What came last of a content; None if nothing did."""
        return next((entry for entry in reversed(self.all()) if entry.digest == digest), None)

    def total_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.all())

    def unfinished(self) -> list[Path]:
        """Folders that files were to come to, when whoever was to move them ended."""
        return [entry for entry in self._entries() if not _has_files(entry)]

    def _entries(self) -> Iterator[Path]:
        for entry in self._folder.iterdir():
            if _ENTRY.fullmatch(entry.name) and entry.is_dir() and not entry.is_symlink():
                yield entry


def _has_files(entry: Path) -> bool:
    return (entry / _FILES).is_dir()


def _read(entry: Path) -> Quarantined:
    reason, since_s = _reason_of(entry)
    sizes = [path.lstat().st_size for path in (entry / _FILES).iterdir()]
    digest = f"sha256:{entry.name.partition('.')[0]}"
    return Quarantined(f"{entry.parent.name}/{entry.name}", digest, reason, since_s, sum(sizes))


def _reason_of(entry: Path) -> tuple[str, float]:
    """Of a reason that is damaged itself, its age is known all the same."""
    try:
        members = json.loads((entry / _REASON).read_text(encoding="utf-8"))
        return str(members["reason"]), float(members["since_s"])
    except (OSError, ValueError, KeyError, TypeError):
        return "not known any more", entry.lstat().st_mtime
