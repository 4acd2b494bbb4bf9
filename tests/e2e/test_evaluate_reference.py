"""`quickchange evaluate --engine reference`: what no server applies is measured, and what one does alike."""

import json
from pathlib import Path
from typing import Any

import pytest

from quickchange import Client
from quickchange.cli import main
from tests.e2e.process import ServerProcess
from tests.e2e.test_evaluate import write_rows
from tests.models import build_tiny_model
from training.live import LiveModel
from training.methods import METHODS
from training.recipe import Recipe
from training.train import train

QUESTIONS = {"What is it?": "a cat", "Who?": "me", "Why do they always ask so many questions?": "so"}
UNSERVED = ("dora", "ia3", "prefix", "prompt", "bitfit")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", QUESTIONS, 8)


def trained(base: Path, data: Path, out: Path, method: str, **changes: Any) -> Path:
    """What two steps leave."""
    values: dict[str, Any] = {"max_steps": 2, "batch_size": 4, "products": "float32", "learning_rate": 0.05}
    values |= {"quantization": "none", "device": "cpu", "method": method, "base": str(base)}
    if "rank" in METHODS[method].settings:
        values["rank"] = 4
    return train(
        Recipe.from_mapping(values | {"data": data, "out": out} | changes, source="test"), progress=False
    ).out


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    code = main(["evaluate", "--max-new-tokens", "12", "--json", *map(str, arguments)])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    found: dict[str, Any] = json.loads(captured.out)
    return found


def rows_of(found: dict[str, Any]) -> list[tuple[str, str]]:
    return [(row["answer"], row["answer_against"]) for row in found["rows"]]


def test_server_and_reference_agree(
    base: Path,
    data: Path,
    server: ServerProcess,
    client: Client,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The server's arithmetic is exact, its base float32."""
    folder = trained(base, data, tmp_path / "lora", "lora")
    client.adapters.push(folder, "alike")
    on_base = ("--data", data, "--base", base, "--quantization", "none")
    served = evaluated(capsys, *on_base, "--server", server.grpc, "--adapter", "alike")
    ours = evaluated(capsys, *on_base, "--adapter", folder, "--engine", "reference")
    assert rows_of(ours) == rows_of(served)
    assert any(answer != bare for answer, bare in rows_of(ours))
    assert ours["model"]["metrics"] == served["model"]["metrics"]
    assert ours["differences"] == served["differences"]
    assert (ours["answers"]["engine"], served["answers"]["engine"]) == ("reference", "server")
    assert ours["answers"]["fingerprint"] == served["answers"]["fingerprint"]
    assert ours["loss"] == served["loss"]


@pytest.mark.parametrize("method", UNSERVED)
def test_what_no_server_applies_is_measured(
    method: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = build_tiny_model(tmp_path / "base", "qwen2" if method == "bitfit" else "llama")
    folder = trained(base, data, tmp_path / "out", method)
    asked = ("--data", data, "--rows", 6, "--base", base, "--quantization", "none", "--adapter", folder)
    found = evaluated(capsys, *asked, "--engine", "reference")
    assert (found["model"]["name"], found["against"]["name"]) == (str(folder), "base")
    assert any(answer != bare for answer, bare in rows_of(found))
    assert found["differences"]["loss"]["value"] != 0
    assert found["answers"] == {
        "engine": "reference", "base": "base", "fingerprint": found["answers"]["fingerprint"],
        "quantization": "none", "dtype": "float32", "decoding": "greedy", "max_new_tokens": 12,
    }  # fmt: skip
    # A server is not even started for it.
    assert main(["evaluate", *map(str, asked)]) == 1
    error = capsys.readouterr().err
    assert "which no server applies; measure it with --engine reference" in error


def test_a_whole_model_is_measured_by_itself(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trained(base, data, tmp_path / "full", "full")
    alone = ("--data", data, "--quantization", "none", "--engine", "reference", "--base")
    found = evaluated(capsys, *alone, folder)
    assert found["model"]["name"] == "base"
    assert found["answers"]["base"] == "full"
    assert "against" not in found
    assert [row["answer"] for row in found["rows"]] != [
        row["answer"] for row in evaluated(capsys, *alone, base)["rows"]
    ]
    assert main(["evaluate", *map(str, (*alone, base, "--adapter", folder))]) == 1
    assert f"whole model and no adapter; measure it by itself: --base {folder}" in capsys.readouterr().err


def test_two_kinds_and_the_base_side_by_side(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora, ia3 = (trained(base, data, tmp_path / method, method) for method in ("lora", "ia3"))
    on_base = ("--data", data, "--base", base, "--quantization", "none", "--engine", "reference")
    out = tmp_path / "report"
    both = evaluated(capsys, *on_base, "--adapter", lora, "--against", ia3, "--out", out)
    one, other = (evaluated(capsys, *on_base, "--adapter", folder) for folder in (lora, ia3))
    assert rows_of(both) == [
        (ours, theirs) for (ours, _), (theirs, _) in zip(rows_of(one), rows_of(other), strict=True)
    ]
    alone = evaluated(capsys, *on_base, "--adapter", lora, "--against", "none")
    assert [row["answer"] for row in alone["rows"]] == [ours for ours, _ in rows_of(one)]
    assert "against" not in alone
    bare = [answer for _, answer in rows_of(one)]
    assert [row["answer_base"] for row in both["rows"][:20]] == bare[:20]
    assert "- answers: engine reference, base " in (out / "evaluation.md").read_text()


def test_the_table_says_who_answered(base: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "evaluate",
        "--data",
        str(data),
        "--rows",
        "3",
        "--max-new-tokens",
        "3",
        "--engine",
        "reference",
    ]
    assert main([*command, "--base", str(base), "--quantization", "int8"]) == 0
    assert "answers: engine reference, base " in capsys.readouterr().out


def test_a_base_is_quantised_as_the_adapter_s_was(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scheme: dict[str, Any] = {"quantization": "nf4", "double_quantization": False}
    folder = trained(base, data, tmp_path / "single", "qlora", **scheme)
    command = ("--data", data, "--base", base, "--adapter", folder, "--engine", "reference", "--rows", 2)
    evaluated(capsys, *command, "--no-double-quantization")
    assert main(["evaluate", *map(str, command)]) == 1
    assert "give the base and quantisation it was trained on" in capsys.readouterr().err


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "reference"], "--engine reference needs the base to answer with; give --base SOURCE"),
        (["--engine", "reference", "--base", "x", "--server", "127.0.0.1:1"], "leave --server out"),
        (
            ["--base", "x", "--quantization", "int8"],
            "no server keeps a base in int8; give nf4 or none, or add",
        ),
        (["--base", "x", "--no-double-quantization"], "add --engine reference"),
    ],
)
def test_what_does_not_go_together(
    arguments: list[str], message: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "--data", str(data), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_both_folders_are_looked_at_before_anybody_is_asked(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trained(base, data, tmp_path / "ia3", "ia3")
    command = ["evaluate", "--data", str(data), "--base", str(base), "--quantization", "none"]
    command += ["--adapter", str(folder), "--against", str(tmp_path / "no-such"), "--engine", "reference"]
    assert main(command) == 1
    assert f"{tmp_path / 'no-such'} is not a folder" in capsys.readouterr().err


def test_another_base_is_noticed_before_anybody_is_asked(
    base: Path,
    data: Path,
    server: ServerProcess,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def asked(*_: object, **__: object) -> None:
        raise AssertionError("somebody was asked")

    monkeypatch.setattr(LiveModel, "answers", asked)
    command = ["evaluate", "--data", str(data), "--server", server.grpc, "--base", str(base)]
    assert main(command) == 1
    assert "as nf4, the server has sha256:" in capsys.readouterr().err
