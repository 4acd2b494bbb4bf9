"""Folders made once: by one of many, complete or not at all."""

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from adapters.cache import default_cache_dir, make_once, publish_folder


def fill(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "weights").write_text("whole")


def test_built_once_and_found_afterwards(tmp_path: Path) -> None:
    assert make_once(tmp_path / "deep" / "made", fill) is True
    assert make_once(tmp_path / "deep" / "made", lambda _: pytest.fail("built twice")) is False
    assert (tmp_path / "deep" / "made" / "sub" / "weights").read_text() == "whole"


def test_of_many_at_once_one_builds_and_all_see_it_complete(tmp_path: Path) -> None:
    target, gate, built = tmp_path / "made", threading.Barrier(6), []

    def ask() -> None:
        gate.wait()
        built.append(make_once(target, fill))
        assert (target / "sub" / "weights").read_text() == "whole"

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(built) == [False] * 5 + [True]


def test_two_processes_build_once(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from adapters.cache import make_once\n"
        "def build(folder):\n"
        "    time.sleep(0.5); (folder / 'weights').write_text('whole')\n"
        "print(make_once(Path(sys.argv[1]), build))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "made")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert sorted(process.communicate()[0].strip() for process in both) == ["False", "True"]


def test_a_failed_build_leaves_nothing_and_can_be_repeated(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        fill(folder)
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        make_once(tmp_path / "made", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["made.lock"]
    assert make_once(tmp_path / "made", fill) is True


def test_a_killed_build_leaves_no_folder_and_no_lock(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from adapters.cache import make_once\n"
        "make_once(Path(sys.argv[1]), lambda folder: os.kill(os.getpid(), 9))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "made")], check=False)
    assert not (tmp_path / "made").exists()
    assert make_once(tmp_path / "made", fill) is True


def test_others_may_read_what_is_made(tmp_path: Path) -> None:
    def private(folder: Path) -> None:
        fill(folder)
        (folder / "sub" / "weights").chmod(0o600)

    publish_folder(tmp_path / "made", private)
    for path in [tmp_path / "made", *(tmp_path / "made").rglob("*")]:
        assert os.stat(path).st_mode & stat.S_IROTH


def test_an_existing_folder_is_not_replaced(tmp_path: Path) -> None:
    publish_folder(tmp_path / "made", fill)
    with pytest.raises(OSError, match="not empty"):
        publish_folder(tmp_path / "made", fill)


def test_the_environment_chooses_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUICKCHANGE_CACHE", "/big/disk")
    assert default_cache_dir() == Path("/big/disk")
    monkeypatch.delenv("QUICKCHANGE_CACHE")
    assert default_cache_dir() == Path.home() / ".cache" / "quickchange"
