"""What a container may take, from the files in which Linux says so."""

from pathlib import Path

import psutil
import pytest

from adapters import host_memory
from adapters.host_memory import HostMemory

GIB = 2**30


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    there = type("Memory", (), {"available": 32 * GIB, "total": 64 * GIB})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: there)


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def group_v2(root: Path, path: str, limit: object, taken: int, inactive_file: int = 0) -> None:
    folder = root / "sys/fs/cgroup" / path
    write(folder / "memory.max", limit)
    write(folder / "memory.current", taken)
    write(folder / "memory.stat", f"anon 1\ninactive_file {inactive_file}")


def in_group(root: Path, *lines: str) -> None:
    write(root / "proc/self/cgroup", "\n".join(lines))


def test_without_a_limit_it_is_the_machine(tmp_path: Path) -> None:
    assert host_memory.now(tmp_path) == HostMemory(32 * GIB, 64 * GIB)  # no /proc at all
    in_group(tmp_path, "0::/user.slice/a.scope")
    group_v2(tmp_path, "user.slice/a.scope", "max", GIB)
    assert host_memory.now(tmp_path) == HostMemory(32 * GIB, 64 * GIB)


def test_a_container_has_its_limit_less_what_it_took(tmp_path: Path) -> None:
    """Its group is at the top of what it sees; what was read from files can be had back."""
    in_group(tmp_path, "0::/")
    group_v2(tmp_path, "", 8 * GIB, 5 * GIB, inactive_file=2 * GIB)
    assert host_memory.now(tmp_path) == HostMemory(5 * GIB, 8 * GIB)


def test_the_tightest_group_around_counts(tmp_path: Path) -> None:
    in_group(tmp_path, "0::/pod/container")
    group_v2(tmp_path, "pod/container", 16 * GIB, GIB)
    group_v2(tmp_path, "pod", 8 * GIB, 7 * GIB)
    assert host_memory.now(tmp_path) == HostMemory(GIB, 8 * GIB)


def test_more_than_the_limit_may_be_taken(tmp_path: Path) -> None:
    """A limit that was lowered: nothing is free, and not less than nothing."""
    in_group(tmp_path, "0::/")
    group_v2(tmp_path, "", 4 * GIB, 5 * GIB)
    assert host_memory.now(tmp_path) == HostMemory(0, 4 * GIB)


@pytest.mark.parametrize("path", ["/docker/0123", "/../../elsewhere", "/"])
def test_the_first_version_of_control_groups(tmp_path: Path, path: str) -> None:
    """A container of it reads a path that it cannot see."""
    in_group(tmp_path, "4:cpu,cpuacct:/x", f"3:memory:{path}", "0::/")
    folder = tmp_path / "sys/fs/cgroup/memory"
    write(folder / "memory.limit_in_bytes", 2 * GIB)
    write(folder / "memory.usage_in_bytes", GIB)
    write(folder / "memory.stat", f"inactive_file 0\ntotal_inactive_file {GIB // 2}")
    assert host_memory.now(tmp_path) == HostMemory(3 * GIB // 2, 2 * GIB)


def test_this_machine_can_be_read() -> None:
    there = host_memory.now()
    assert 0 < there.available_bytes <= there.total_bytes <= 64 * GIB
