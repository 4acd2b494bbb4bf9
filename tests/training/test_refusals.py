"""What a run says, and what it refuses, before its first step or without harm."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from adapters.base import Base
from adapters.errors import InvalidAdapterError
from tests.training.runs import recipe_for, run
from training.data_report import DataReport
from training.errors import DataError, DivergedError, PublishError, RecipeError
from training.recorder import Recorder
from training.stopwatch import Stopwatch
from training.train import examine, train

# Before the first step


def test_the_data_is_told_of_before_the_first_step(base: Base, data: Path) -> None:
    told: list[DataReport] = []

    def stop(report: DataReport) -> None:
        told.append(report)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe_for(data, data.with_name("out")), base, progress=False, on_data=stop)
    assert not data.with_name("out").exists()
    assert told[0] == run(base, data, max_steps=1).data


def test_a_dry_run_reads_no_weights_and_says_the_same(base: Base, data: Path, tmp_path: Path) -> None:
    """The base's folder without a byte of its weights."""
    folder = tmp_path / "weightless"
    shutil.copytree(base.folder, folder)
    for path in folder.glob("*.safetensors"):
        path.write_bytes(b"")
    recipe = recipe_for(data, data.with_name("out"), base=str(folder), eval_fraction=0.2, max_length=20)
    assert (
        examine(recipe, progress=False) == run(base, data, eval_fraction=0.2, max_length=20, max_steps=1).data
    )
    with pytest.raises(FileExistsError, match="exists already"):
        examine(recipe, progress=False)


# What is refused


def test_an_existing_folder_is_left_alone(base: Base, data: Path) -> None:
    out = data.with_name("out")
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(FileExistsError, match="exists already; remove it"):
        run(base, data)
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_a_failed_run_leaves_nothing(base: Base, data: Path) -> None:
    with pytest.raises(RecipeError, match=r"target_modules names 'nothing', which is no linear module"):
        run(base, data, target_modules=("nothing",))
    data.write_text("{}\n")
    with pytest.raises(DataError, match="line 1"):
        run(base, data)
    assert [path.name for path in data.parent.iterdir()] == ["rows.jsonl"]
    assert not any("lora" in name for name, _ in base.model.named_modules())


def test_a_base_of_another_quantization(base: Base, data: Path) -> None:
    with pytest.raises(
        RecipeError, match="method lora trains on quantization none, the base given has nf4-64-double"
    ):
        run(base, data, method="lora")


def test_a_template_that_no_manifest_holds_is_noticed_before_training(base: Base, data: Path) -> None:
    endless = replace(base, chat_template=base.chat_template + "{# " + "x" * 65536 + " #}")
    told: list[DataReport] = []
    with pytest.raises(
        InvalidAdapterError, match=r"chat_template .* must be a string of 1 to 65536 characters"
    ):
        train(recipe_for(data, data.with_name("out")), endless, progress=False, on_data=told.append)
    assert told == []


def test_a_server_that_is_not_there_is_noticed_before_training(base: Base, data: Path) -> None:
    with pytest.raises(PublishError, match=r"--publish 127\.0\.0\.1:1: "):
        run(base, data, publish="127.0.0.1:1", name="x")
    assert not data.with_name("out").exists()


def test_a_diverging_run_ends() -> None:
    recorder = Recorder(progress=False, since_step=Stopwatch())
    state = type("State", (), {"global_step": 7})()
    recorder.on_log(None, state, None, {"loss": 1.0, "learning_rate": 1e-3})
    with pytest.raises(DivergedError, match="the loss is nan at step 7; lower learning_rate"):
        recorder.on_log(None, state, None, {"loss": float("nan"), "learning_rate": 1e-3})
