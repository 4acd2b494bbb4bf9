"""Building the native kernels: with a C++ compiler, without one, and again when a header changes."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
WHAT_IS_BUILT = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
PACKAGES = ("quickchange", "server", "adapters", "training", "kernels")

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")

WRITES_ITS_TARGET = 'while [ "$1" != -o ]; do shift; done\necho compiled > "$2"'
"""Shell commands that stand in for a compiler: they write the file after -o."""

SHOW_STATUS = """
import kernels.library
status = kernels.library.status()
print(kernels.library.__file__)
print(status.active)
print(status.reason)
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what is built, without anything that was built before."""
    copy = tmp_path / "tree"
    copy.mkdir()
    for name in WHAT_IS_BUILT:
        shutil.copy2(ROOT / name, copy)
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__", "_native*.so")
        shutil.copytree(ROOT / package, copy / package, ignore=ignored)
    return copy


@pytest.fixture
def failing_compiler(tmp_path: Path) -> Mapping[str, str]:
    """An environment in which every compiler is one that fails."""
    return _compilers(tmp_path / "fails", "exit 1")


def _compilers(path: Path, commands: str) -> dict[str, str]:
    path.write_text(f"#!/bin/sh\n{commands}\n")
    path.chmod(0o755)
    return {"CC": str(path), "CXX": str(path)}


def run(argv: list[str], folder: Path, environment: Mapping[str, str] | None = None) -> str:
    """Standard output and standard error of a Python command, which must succeed."""
    given = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")}
    result = subprocess.run(
        [sys.executable, *argv],
        cwd=folder,
        env=given | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def pip_install(tree: Path, target: Path, environment: Mapping[str, str] | None = None) -> str:
    """Installs without the network; -v shows what the build says."""
    options = ["--no-build-isolation", "--no-deps", "--target", str(target)]
    return run(["-m", "pip", "-v", "install", *options, "."], tree, environment)


def status_of(target: Path, elsewhere: Path) -> list[str]:
    """Where the installed package lies, whether its kernels are active, and why."""
    return run(["-c", SHOW_STATUS], elsewhere, {"PYTHONPATH": str(target)}).splitlines()[-3:]


def test_without_a_compiler_the_installation_succeeds_and_says_so(
    tree: Path, tmp_path: Path, failing_compiler: Mapping[str, str]
) -> None:
    target = tmp_path / "installed"
    output = pip_install(tree, target, failing_compiler)
    said = [line for line in output.splitlines() if "native kernels were NOT built" in line]
    assert len(said) == 1
    assert "much slower" in said[0]
    assert "g++" in said[0]
    assert (target / "kernels/library.py").is_file()
    assert list(target.rglob("_native*")) == []
    file, active, reason = status_of(target, tmp_path)
    assert file == str(target / "kernels/library.py")
    assert active == "False"
    assert "not built" in reason


def test_a_library_of_other_sources_does_not_outlive_a_failed_build(
    tree: Path, failing_compiler: Mapping[str, str]
) -> None:
    stale = tree / "kernels/_native.abi3.so"
    stale.write_bytes(b"of other sources")
    run(["setup.py", "build_ext", "--inplace"], tree, failing_compiler)
    assert not stale.exists()


@needs_compiler
def test_with_a_compiler_the_installed_kernels_are_active(tree: Path, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    output = pip_install(tree, target)
    assert "NOT built" not in output
    assert "-cp311-abi3-" in output
    assert (target / "kernels/_native.abi3.so").is_file()
    assert not (target / "kernels/native").exists()
    file, active, reason = status_of(target, tmp_path)
    assert file == str(target / "kernels/library.py")
    if active == "False":
        assert reason.startswith("this processor has neither")
    else:
        assert reason.startswith("_native.abi3.so")


def test_a_source_distribution_has_every_native_source(tree: Path, tmp_path: Path) -> None:
    build = "from setuptools.build_meta import build_sdist; build_sdist('..')"
    run(["-c", build], tree)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    wanted = {f"kernels/native/{path.name}" for path in (tree / "kernels/native").iterdir()}
    assert len(wanted) > 10
    assert wanted | {"setup.py"} <= names


def test_a_wheel_has_the_library_and_not_what_lies_beside_the_sources(tree: Path, tmp_path: Path) -> None:
    (tree / "kernels/_native.abi3.so").write_bytes(b"built in place, of other sources")
    run(
        ["-c", "from setuptools.build_meta import build_wheel; build_wheel('..')"],
        tree,
        _compilers(tmp_path / "compiler", WRITES_ITS_TARGET),
    )
    (archive,) = tmp_path.glob("*-cp311-abi3-*.whl")
    with zipfile.ZipFile(archive) as opened:
        assert opened.read("kernels/_native.abi3.so") == b"compiled\n"
        assert "quickchange/py.typed" in opened.namelist()
        assert [name for name in opened.namelist() if name.startswith("kernels/native/")] == []


def test_it_is_built_again_when_a_header_changes(tree: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    compiler = _compilers(tmp_path / "compiler", f'echo "$@" >> {log}\n{WRITES_ITS_TARGET}')

    def runs_of_the_compiler() -> int:
        log.write_text("")
        run(["setup.py", "build_ext", "--inplace"], tree, compiler)
        return len(log.read_text().splitlines())

    sources = len(list((tree / "kernels/native").glob("*.cpp")))
    assert runs_of_the_compiler() == sources + 1
    assert (tree / "kernels/_native.abi3.so").read_text() == "compiled\n"
    assert runs_of_the_compiler() == 0
    header = tree / "kernels/native/simd.h"
    later = (tree / "kernels/_native.abi3.so").stat().st_mtime + 5
    os.utime(header, (later, later))
    assert runs_of_the_compiler() == sources + 1
