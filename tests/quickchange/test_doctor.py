"""`quickchange doctor`: what it says with the native kernels, without them, and where no server can run."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import kernels.library
import server.doctor
from kernels.precision import automatic_precision
from quickchange.cli import main
from server.doctor import BUILD_REMEDY, NATIVE_GAIN, examine, processor_of
from tests.quickchange.test_commands import WITHOUT_TORCH

X86 = "processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\nflags\t\t: fpu sse2 avx2 fma avx512f\n"
OLD_X86 = "processor\t: 0\nmodel name\t: Old CPU\nflags\t\t: fpu sse2 avx\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd i8mm bf16\nCPU implementer\t: 0x41\n"


@pytest.fixture
def fresh_library() -> Iterator[None]:
    """The library is looked for anew, within the test and after it."""
    loading = (kernels.library.native, kernels.library.status, kernels.library._load)
    for cached in loading:
        cached.cache_clear()
    yield
    for cached in loading:
        cached.cache_clear()


@pytest.fixture
def no_library(fresh_library: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it had not been built."""
    monkeypatch.setattr(kernels.library, "_built_library", lambda: None)


def test_it_prints_one_fact_to_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out, err = capsys.readouterr()
    facts = {line[:16].strip(): line[16:].strip() for line in out.splitlines()}
    assert err == ""
    assert facts["server"] == "can run here"
    assert facts["torch"] == torch.__version__
    assert facts["reason"] == kernels.library.status().reason
    assert facts["precision"] == ": ".join(automatic_precision())
    assert facts["threads"].startswith(f"{torch.get_num_threads()} (OMP_NUM_THREADS=")
    assert "free of" in facts["memory"]


def test_json_has_everything(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    status = kernels.library.status()
    assert found["problem"] is None
    assert found["versions"]["torch"] == torch.__version__
    assert (found["kernels"]["active"], found["kernels"]["isa"]) == (status.active, status.isa)
    assert found["kernels"]["available"] == list(status.available)
    assert found["kernels"]["matmul_precision"] == ": ".join(automatic_precision())
    assert found["threads"]["count"] == torch.get_num_threads()
    assert found["threads"]["variables"]["OMP_WAIT_POLICY"] == "passive"
    assert found["threads"]["variables"]["OMP_NUM_THREADS"] is None
    assert 0 < found["memory"]["free_bytes"] <= found["memory"]["total_bytes"]
    assert found["processor"]["count"] >= 1


@pytest.mark.usefixtures("no_library")
def test_without_the_library_it_says_why_what_to_do_and_what_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.doctor, "_read", lambda path: X86)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "native kernels  not active\n" in out
    assert f"  reason        {kernels.library.status().reason}\n" in out
    assert f"  remedy        {BUILD_REMEDY}\n" in out
    assert f"  gain          {NATIVE_GAIN}\n" in out
    assert "available" not in out
    assert "precision" not in out


@pytest.mark.usefixtures("no_library")
def test_where_no_kernels_exist_for_the_processor_there_is_no_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.doctor, "_read", lambda path: OLD_X86)
    found = examine({}).kernels
    assert found is not None
    assert (found.active, found.remedy, found.gain) == (False, None, None)


def test_a_library_that_cannot_be_loaded_is_built_again(
    fresh_library: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "_native.abi3.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(kernels.library, "_built_library", lambda: broken)
    monkeypatch.setattr(server.doctor, "_read", lambda path: ARM)
    found = examine({}).kernels
    assert found is not None
    assert (found.active, found.remedy) == (False, BUILD_REMEDY)
    assert "cannot be loaded" in found.reason


def test_a_cuda_device_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    assert main(["doctor"]) == 0
    assert "device          cuda (Some GPU)\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("cpuinfo", "name", "sets"),
    [
        (X86, "Some CPU @ 3 GHz", ("avx2", "fma", "avx512f")),
        (OLD_X86, "Old CPU", ()),
        (ARM, None, ("asimd", "bf16", "i8mm")),
        ("", None, None),
    ],
)
def test_the_processor_is_read_from_what_linux_says(
    cpuinfo: str, name: str | None, sets: tuple[str, ...] | None
) -> None:
    processor = processor_of(cpuinfo)
    assert processor.instruction_sets == sets
    assert processor.name
    assert name in (None, processor.name)


def test_without_torch_it_fails_in_one_line_and_says_the_rest() -> None:
    argv = [sys.executable, "-c", WITHOUT_TORCH, "doctor"]
    result = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == "error: a server needs the package torch: pip install 'quickchange[server]'\n"
    assert "server          cannot run here\n" in result.stdout
    assert "native kernels  unknown without torch\n" in result.stdout
    assert "processor  " in result.stdout


def test_a_server_that_cannot_be_imported_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "server.app", None)  # importing it fails, and its name is ours
    assert main(["doctor", "--json"]) == 1
    out, err = capsys.readouterr()
    assert err.startswith("error: server.app cannot be imported (")
    assert err.endswith("pip install --force-reinstall 'quickchange[server]'\n")
    assert err.count("\n") == 1
    assert json.loads(out)["problem"] == err.removeprefix("error: ").strip()
