"""`adapters check` and `push` on a terminal: what passed, what did not, and one line at the end."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from quickchange.cli import main
from tests.e2e.process import ServerProcess
from tests.e2e.spoiling import with_config, with_tensors


@pytest.fixture
def bad(adapters: Mapping[str, Path], tmp_path: Path) -> Path:
    """Adapter a with two tensors too many."""
    folder = Path(shutil.copytree(adapters["a"], tmp_path / "bad"))
    with_tensors(folder, lambda tensors: tensors.update({f"stray.{x}": torch.ones(1) for x in "pq"}))
    return folder


def test_a_good_adapter_is_shown_check_by_check(
    server: ServerProcess, adapters: Mapping[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapters", "check", str(adapters["c"]), "--server", server.grpc]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == ""
    assert lines[0].split() == ["ok", "files", "adapter_config.json,", "adapter_model.safetensors"]
    assert lines[2].split(maxsplit=2) == ["-", "manifest", "there is none"]
    assert lines[9].split(maxsplit=2) == ["-", "text", "the adapter says nothing of it"]
    assert lines[10].split(maxsplit=2) == ["-", "canary", "the adapter has none"]
    assert lines[11].split() == ["module", "rank", "scaling", "|ΔW|"]
    assert len(lines) == 11 + 1 + 14 + 1  # every linear module but the head
    assert lines[12].split()[:2] == ["model.layers.0.self_attn.q_proj", "2"]
    assert lines[-1].startswith("valid: rank 2, 14 modules, |ΔW| ")
    assert lines[-1].endswith(", canary skipped: the adapter has none")


def test_a_bad_one_shows_all_that_is_wrong_and_ends_in_one_line(
    server: ServerProcess, bad: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["check", str(bad)], ["push", str(bad), "--name", "bad"]):
        assert main(["adapters", *command, "--server", server.grpc]) == 1
        out, err = capsys.readouterr()
        lines = err.splitlines()
        assert out == ""
        assert [line.split()[0] for line in lines[:7]] == ["ok", "ok", "-", "-", "ok", "ok", "ok"]
        assert lines[7].startswith("FAILED  tensors")
        assert "UNKNOWN_TENSOR: unknown tensor 'stray.p'" in lines[7]
        assert lines[8].strip().startswith("unknown tensor 'stray.q'")
        assert lines[9].startswith("-       values")
        assert lines[10:13] == ["tensors that no targeted module has: 2", "  stray.p", "  stray.q"]
        assert lines[13].startswith("error: unknown tensor 'stray.p'")
        assert len(lines) == 14


def test_programs_get_the_report_as_json(
    server: ServerProcess,
    bad: Path,
    adapters: Mapping[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["adapters", "check", str(adapters["a"]), "--json", "--server", server.grpc]) == 0
    report = json.loads(capsys.readouterr().out)["report"]
    assert (report["matched_module_count"], report["checks"][8]["name"]) == (6, "values")
    with_config(bad, use_dora=True)
    assert main(["adapters", "check", str(bad), "--json", "--server", server.grpc]) == 1
    out, err = capsys.readouterr()
    checks = {check["name"]: check for check in json.loads(out)["checks"]}
    assert checks["configuration"]["outcome"] == "failed"
    assert err.startswith("error: use_dora = True: DoRA is not applied here; retrain without it")
    assert err.count("\n") == 1


def test_push_says_what_it_pushed(
    server: ServerProcess, adapters: Mapping[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["adapters", "push", str(adapters["b"]), "--name", "shown", "--server", server.grpc]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert out.startswith("shown@1 sha256:")
    assert err.startswith("rank 8, 8 modules, |ΔW| ")
    with server.client() as client:
        client.adapters.delete("shown", all_versions=True)
