"""How much of the host's memory there is for this process: what the machine has, within what its control
groups allow, as containers and systemd set it. Knows no device but the host, and no model.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple

import psutil


class _Files(NamedTuple):
    """Where a version of control groups keeps its figures (Linux: admin-guide/cgroup-v2, cgroup-v1/memory).

    Attributes:
        reclaimable: line of memory.stat with the bytes of files that were read and are not in use: they count
            as taken, and are given back as soon as something else needs them.
    """

    place: str
    limit: str
    taken: str
    reclaimable: str


_V1: Final = _Files(
    "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
)
_V2: Final = _Files("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")


@dataclass(frozen=True, slots=True)
class HostMemory:
    """
    Attributes:
        available_bytes: what can be had now without swapping.
        total_bytes: what could be had if nothing else were there.
    """

    available_bytes: int
    total_bytes: int


def now(root: Path = Path("/")) -> HostMemory:
    """The memory of the machine, or of the tightest control group around this process.

    Args:
        root: of the file system that has /proc and /sys.
    """
    machine = psutil.virtual_memory()
    available, total = int(machine.available), int(machine.total)
    for group in _groups(root):
        available, total = min(available, group.available_bytes), min(total, group.total_bytes)
    return HostMemory(available, total)


def _groups(root: Path) -> Iterator[HostMemory]:
    """Every control group around this process that limits its memory."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return  # no Linux
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            yield from _limited(root, _V2, path)
        elif "memory" in controllers.split(","):
            yield from _limited(root, _V1, path)


def _limited(root: Path, files: _Files, path: str) -> Iterator[HostMemory]:
    """A group and those around it; a container sees its own at the top, whatever the path says."""
    inner = PurePosixPath(path).relative_to("/")
    if ".." in inner.parts:
        inner = PurePosixPath()
    for each in (inner, *inner.parents):
        if (group := _group(root / files.place / each, files)) is not None:
            yield group


def _group(folder: Path, files: _Files) -> HostMemory | None:
    """None if the group has no limit, or is not to be seen from here."""
    try:
        limit = int((folder / files.limit).read_text())
        taken = int((folder / files.taken).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # "max" is no number
        return None
    return HostMemory(max(0, limit - taken + int(statistics.get(files.reclaimable, 0))), limit)
