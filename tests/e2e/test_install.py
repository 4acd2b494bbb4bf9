"""What the Dockerfile does, without Docker: an empty prefix, a read-only tree, a user without rights."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from quickchange import Client
from tests.e2e.process import READY

ROOT = Path(__file__).parents[2]
NOBODY = 65534
SOURCES = (
    *("constraints.txt", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"),
    *("deploy/install.sh", "quickchange", "server", "adapters", "training", "kernels"),
)
"""What the Dockerfile copies; the test that it is all of it is that nothing else is there."""


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """One that other users may enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="quickchange-image.") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="module")
def interpreter(folder: Path) -> str:
    """A Python that other users may run; one under somebody's home is none."""
    check = "import ensurepip, sys; assert sys.version_info >= (3, 11)"
    for candidate in (str(Path(sys.executable).resolve()), "/usr/local/bin/python3", "/usr/bin/python3"):
        command = as_nobody([candidate, "-c", check], folder)
        if subprocess.run(command, check=False, capture_output=True).returncode == 0:
            return candidate
    pytest.skip("needs a Python 3.11 or newer, with ensurepip, that other users may run")


@pytest.fixture(scope="module")
def prefix(folder: Path, interpreter: str) -> Iterator[Path]:
    """The server, installed as the image is, for CPUs; afterwards nobody can write to it."""
    source, prefix = folder / "src", folder / "prefix"
    for name in SOURCES:
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "_native*")
            shutil.copytree(ROOT / name, target, ignore=ignored)
        else:
            shutil.copy(ROOT / name, target)
    # Without an index of its own torch comes from where pip finds everything else.
    given = {"PYTHON": interpreter, "VARIANT": "cpu", "TORCH_INDEX": os.environ.get("TORCH_INDEX", "")}
    subprocess.run([source / "deploy/install.sh", prefix], env=os.environ | given, check=True, timeout=1500)
    shutil.rmtree(source)  # nothing may be needed of it any more
    with ExitStack() as stack:
        if (
            subprocess.run(["mount", "--bind", prefix, prefix], check=False, capture_output=True).returncode
            == 0
        ):
            stack.callback(subprocess.run, ["umount", prefix], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", prefix], check=True)
        else:
            subprocess.run(["chmod", "-R", "a-w", prefix], check=True)
        yield prefix


def as_nobody(command: list[str], home: Path) -> list[str]:
    """With no rights, no groups, and no environment but what the image has."""
    who = [
        "--reuid",
        str(NOBODY),
        "--regid",
        str(NOBODY),
        "--clear-groups",
        "--no-new-privs",
        "--bounding-set",
        "-all",
    ]
    variables = [
        *(f"HOME={home}", f"QUICKCHANGE_CACHE={home}/cache", f"HF_HOME={home}/huggingface"),
        *("PATH=/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE=1", "OMP_NUM_THREADS=1"),
    ]
    return ["setpriv", *who, "--inh-caps", "-all", "env", "-i", *variables, *command]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root and setpriv")
def test_the_installed_server_answers_as_nobody_on_a_read_only_tree(
    folder: Path, prefix: Path, base: Path
) -> None:
    data = folder / "data"
    data.mkdir()
    model = data / "model"
    shutil.copytree(base, model)
    subprocess.run(["chown", "-R", f"{NOBODY}:{NOBODY}", data], check=True)
    program = str(prefix / "bin/quickchange")
    refused = subprocess.run(
        as_nobody(["touch", str(prefix / "lib/x")], data), check=False, capture_output=True
    )
    assert refused.returncode != 0, "the tree can be written"
    serve = [
        program,
        "serve",
        "--base",
        str(model),
        "--store",
        str(data / "store"),
        "--port",
        "0",
        "--metrics-port",
        "0",
    ]
    log = (data / "log").open("w+")
    with (
        log,
        subprocess.Popen(
            as_nobody(serve, data), stdout=subprocess.PIPE, stderr=log, text=True, cwd=data
        ) as process,
    ):
        try:
            assert process.stdout is not None
            match = READY.fullmatch(process.stdout.readline())
            assert match is not None, (data / "log").read_text()
            status = Path(f"/proc/{process.pid}/status").read_text()
            assert f"Uid:\t{NOBODY}\t{NOBODY}" in status
            health = [program, "health", "--server", match[1]]
            assert subprocess.run(as_nobody(health, data), check=False).returncode == 0
            with Client(match[1], timeout_s=60) as client:
                assert len(client.generate("hello", max_new_tokens=4, ignore_eos=True).token_ids) == 4
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
    doctor = subprocess.run(as_nobody([program, "doctor"], data), capture_output=True, text=True, check=True)
    if shutil.which("g++"):
        assert "native kernels  active" in doctor.stdout, doctor.stdout


def test_the_dockerfile_copies_what_the_test_copies() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copied = [
        word
        for line in lines
        if line.startswith("COPY ") and "--from" not in line
        for word in line.split()[1:-1]
    ]
    assert sorted(copied) == sorted(SOURCES)
