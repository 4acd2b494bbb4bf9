"""Several processes learn what one does, and end as one: with one result, one error, one checkpoint."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from adapters.base import load_base
from quickchange.cli import main
from tests.e2e.process import ServerProcess, running
from tests.models import build_tiny_model
from training.recipe import Recipe
from training.train import train
from training.unfinished import newest_checkpoint, unfinished_folder

SHIPPED = Path("deploy/accelerate").resolve()
ROWS = [{"prompt": f"say {n}", "completion": f"{n * 7 % 10} ok"} for n in range(46)]
HELD_OUT = 5
"""41 rows learned and 5 held out: of the last batch of four each leaves one process without a row."""
SETTINGS: dict[str, Any] = {
    "rank": 4, "epochs": 2.0, "learning_rate": 5e-3, "gradient_accumulation": 2, "products": "float32",
    "evals_per_epoch": 2, "canary_probes": 1, "device": "cpu", "checkpoint_every_s": 0, "trackers": [],
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, rows in (("rows", ROWS[HELD_OUT:]), ("held_out", ROWS[:HELD_OUT])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def recipe(folder: Path, model: Path, out: str, **changes: Any) -> dict[str, Any]:
    files = {
        "base": str(model), "data": str(folder / "rows.jsonl"), "eval_data": str(folder / "held_out.jsonl"),
        "out": str(folder / out),
    }  # fmt: skip
    return SETTINGS | files | {"method": "lora"} | changes


def environment(base_cache: Path) -> dict[str, str]:
    return os.environ | {"QUICKCHANGE_CACHE": str(base_cache), "PYTHONPATH": os.getcwd()}


def launched(folder: Path, base_cache: Path, *arguments: str) -> subprocess.Popen[str]:
    """Two processes by `accelerate launch` with the shipped configuration; on CPUs, with gloo."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    return subprocess.Popen(
        [
            *(
                sys.executable,
                "-m",
                "accelerate.commands.launch",
                "--config_file",
                str(SHIPPED / "ddp-1x2.yaml"),
            ),
            *("--main_process_port", str(port), "-m", *arguments),
        ],
        cwd=folder,
        env=environment(base_cache),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def trained(folder: Path, base_cache: Path, settings: dict[str, Any], *flags: str) -> subprocess.Popen[str]:
    """`quickchange train` in two processes."""
    (folder / "recipe.yaml").write_text(json.dumps(settings))
    return launched(folder, base_cache, "quickchange", "train", "--config", "recipe.yaml", *flags)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    said, errors = process.communicate(timeout=300)
    return process.returncode, said, errors


def alone(folder: Path, base_cache: Path, *recipes: dict[str, Any]) -> None:
    """The same in one process."""
    (folder / "alone.json").write_text(json.dumps(recipes))
    run = subprocess.run(
        [sys.executable, "-m", "tests.training.several", "alone.json"],
        cwd=folder, env=environment(base_cache), check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


def report(folder: Path, out: str) -> Any:
    return json.loads((folder / f"{out}.training/training.json").read_text())


def check_same(folder: Path, one: str, two: str, held_out: float = 1e-4) -> None:
    """Losses, held-out losses and weights equal but for rounding; the steps and the tokens exactly.

    Args:
        held_out: by how much the held-out losses may differ, in nats.
    """
    first, second = report(folder, one), report(folder, two)
    for name in ("steps", "tokens", "best_step"):
        assert first["fit"][name] == second["fit"][name]
    for curve, tolerance in (("losses", 1e-4), ("evals", held_out)):
        expected = [point["loss"] for point in first["fit"][curve]]
        assert [point["loss"] for point in second["fit"][curve]] == pytest.approx(expected, abs=tolerance)
    weights = [next((folder / out).glob("*model.safetensors")) for out in (one, two)]
    expected_tensors, tensors = map(load_file, weights)
    assert tensors.keys() == expected_tensors.keys()
    for name, expected_tensor in expected_tensors.items():
        torch.testing.assert_close(tensors[name], expected_tensor, atol=1e-4, rtol=1e-3)


# One run, several processes


def test_two_processes_learn_what_one_does_with_twice_the_batch(
    folder: Path, model: Path, base_cache: Path
) -> None:
    base = load_base(
        str(model), purpose="train", quantization="none", device="cpu", cache_dir=base_cache, progress=False
    )
    one = Recipe.from_mapping(recipe(folder, model, "one", batch_size=4), source="the test")
    train(one, base, progress=False)
    code, said, errors = ended(trained(folder, base_cache, recipe(folder, model, "two", batch_size=2)))
    assert code == 0, errors
    check_same(folder, "one", "two")
    assert said.count("after 12 steps") == 1  # of two processes one speaks
    assert {path.name for path in folder.glob("two*")} == {"two", "two.training"}
    written = report(folder, "two")
    assert written["processes"] == 2
    assert written["data"]["sequences_per_step"] == 2 * 2 * 2
    assert len(written["fit"]["peak_memory_bytes_by_process"]) == 2
    assert written["checks"]["validation"] == "passed"
    manifest = json.loads((folder / "two" / "quickchange.json").read_text())
    assert manifest["training"]["metrics"]["processes"] == 2


@pytest.mark.slow
def test_whatever_the_method(folder: Path, model: Path, base_cache: Path) -> None:
    changes: dict[str, dict[str, Any]] = {
        "qlora": {"method": "qlora"},
        "int8": {"method": "lora_8bit"},
        "dora": {"method": "dora"},
        "pissa": {"method": "pissa"},
        "loraplus": {"method": "lora_plus"},
        "ia3": {"method": "ia3"},
        "prefix": {"method": "prefix"},
        "prompt": {"method": "prompt"},
        "full": {"method": "full", "learning_rate": 1e-4},
        "packed": {"packing": True, "max_length": 48},
        "apart": {"share_prefixes": False},
        "checkpointed": {"gradient_checkpointing": True},
        "stopped": {"early_stopping": 1, "epochs": 30.0, "learning_rate": 2e-2},
    }
    for change in changes.values():
        if change.get("method") in ("ia3", "prefix", "prompt", "full"):
            change["rank"] = None
    ones = [recipe(folder, model, f"{n}-one", batch_size=4, **c) for n, c in changes.items()]
    twos = [recipe(folder, model, f"{n}-two", batch_size=2, **c) for n, c in changes.items()]
    without = [{k: v for k, v in each.items() if v is not None} for each in (*ones, *twos)]
    alone(folder, base_cache, *without[: len(ones)])
    (folder / "twos.json").write_text(json.dumps(without[len(ones) :]))
    code, _, errors = ended(launched(folder, base_cache, "tests.training.several", "twos.json"))
    assert code == 0, errors
    for name in changes:
        # int8 products without gradients depend on the rows of a pass: so they do in one process.
        check_same(folder, f"{name}-one", f"{name}-two", held_out=0.02 if name == "int8" else 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["0", "1"])
def test_a_run_of_which_one_process_is_killed_goes_on_to_the_same_bytes(
    victim: str, folder: Path, model: Path, base_cache: Path
) -> None:
    noisy = {
        "batch_size": 2,
        "epochs": 6.0,
        "dropout": 0.2,
        "neftune_alpha": 5.0,
        "checkpoint_every_s": 0.001,
    }
    code, _, errors = ended(trained(folder, base_cache, recipe(folder, model, "whole", **noisy)))
    assert code == 0, errors
    settings = recipe(folder, model, "cut", **noisy)
    process, unfinished = trained(folder, base_cache, settings), unfinished_folder(folder / "cut")
    while (found := newest_checkpoint(unfinished)) is None or found.step < 7:  # in the second epoch
        assert process.poll() is None
        time.sleep(0.005)
    (chosen,) = (c for c in psutil.Process(process.pid).children() if c.environ().get("RANK") == victim)
    chosen.kill()
    code, _, errors = ended(process)
    assert code != 0
    assert not (folder / "cut").exists()
    assert "SIGKILL" in errors  # the launcher's word
    if victim == "1":
        assert "another process of this run ended in the middle of it; --resume goes on" in errors
    code, _, errors = ended(trained(folder, base_cache, settings, "--resume"))
    assert code == 0, errors
    before, after = report(folder, "whole"), report(folder, "cut")
    assert after["fit"]["resumed_at"] >= 7
    assert after["fit"]["losses"] == before["fit"]["losses"]
    assert after["fit"]["evals"] == before["fit"]["evals"]
    weights = [(folder / out / "adapter_model.safetensors").read_bytes() for out in ("whole", "cut")]
    assert weights[0] == weights[1]
    assert not unfinished.exists()


@pytest.mark.slow
def test_ctrl_c_ends_both_after_the_same_step_with_a_checkpoint(
    folder: Path, model: Path, base_cache: Path
) -> None:
    settings = recipe(folder, model, "out", batch_size=2, epochs=10000.0, trackers=["tensorboard"])
    process, unfinished = trained(folder, base_cache, settings), unfinished_folder(folder / "out")
    while not list(unfinished.glob("tensorboard/*")):  # written once training begins
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    code, _, errors = ended(process)
    assert code != 0
    assert errors.count("--resume goes on from there") == 1
    checkpoint = newest_checkpoint(unfinished)
    assert checkpoint is not None
    assert {path.name for path in checkpoint.folder.glob("rng_state*")} == {
        "rng_state_0.pth",
        "rng_state_1.pth",
    }
    code, _, errors = ended(trained(folder, base_cache, settings | {"epochs": 9999.0}, "--resume"))
    assert code != 0
    assert errors.count("holds a run with epochs 10000.0, this one has 9999.0") == 1
    alone_again = subprocess.run(
        [
            *(sys.executable, "-m", "quickchange", "train", "--config", "recipe.yaml"),
            *("--epochs", "10000", "--resume"),
        ],
        cwd=folder, env=environment(base_cache), check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert "holds a run with processes 2, this one has 1" in alone_again.stderr


@pytest.mark.slow
def test_what_fails_in_one_process_ends_all_with_its_message(
    folder: Path, model: Path, base_cache: Path
) -> None:
    settings = recipe(folder, model, "out", batch_size=2, data="rows-$RANK.jsonl")
    (folder / "rows-0.jsonl").write_text((folder / "rows.jsonl").read_text())
    (folder / "rows-1.jsonl").write_text("{\n")
    (folder / "recipes.json").write_text(json.dumps([settings]))
    code, _, errors = ended(launched(folder, base_cache, "tests.training.several", "recipes.json"))
    assert code != 0
    assert "ElsewhereError: process 1:" in errors
    assert "rows-1.jsonl line 1 is not JSON" in errors
    (folder / "rows-1.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    code, _, errors = ended(launched(folder, base_cache, "tests.training.several", "recipes.json"))
    assert code != 0
    assert "process 1 has data" in errors
    assert {path.name for path in folder.glob("out*")} == set()


@pytest.mark.slow
def test_two_processes_publish_and_promote_one_version(folder: Path, model: Path, base_cache: Path) -> None:
    asked = {"batch_size": 2, "quantization": "none", "name": "sql", "promote_if": "always"}
    with running(ServerProcess(model, folder / "store")) as server:
        settings = recipe(folder, model, "out", publish=server.grpc, **asked)
        code, said, errors = ended(trained(folder, base_cache, settings))
        assert code == 0, errors
        assert said.count("published as sql@1") == said.count("sql:prod is sql@1 now") == 1
        with server.client() as client:
            assert [found.version for found in client.adapters.list()] == [1]
            assert client.adapters.get("sql:prod").version == 1
    settings = recipe(folder, model, "again", publish=server.grpc, **asked)
    code, _, errors = ended(trained(folder, base_cache, settings))  # nobody answers any more
    assert code != 0
    assert errors.count(f"--publish {server.grpc}") == 1
    assert not list(folder.glob("again*"))


def test_a_launch_that_shards_the_base_is_refused_by_its_name(
    folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "recipe.yaml").write_text(json.dumps(recipe(folder, model, "out")))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as `accelerate launch` says it
    assert main(["train", "--config", str(folder / "recipe.yaml")]) == 1
    said = capsys.readouterr().err
    assert "accelerate launches with FSDP" in said
    assert "ddp-1x2.yaml" in said
    assert not list(folder.glob("out*"))
