"""A run that is killed or stopped goes on as if nothing had happened; one that must not go on says why."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event

from adapters.base import Base
from quickchange.cli import main
from training.errors import CheckpointError, DataError, RecipeError
from training.outcome import artefacts_folder
from training.recipe import Recipe
from training.train import TrainingResult, train
from training.unfinished import Start, UnfinishedRun, newest_checkpoint, unfinished_folder

ROWS = [{"prompt": f"say {n}", "completion": f"{n * 7 % 10} ok"} for n in range(40)]
SETTINGS: dict[str, Any] = {
    "rank": 4, "epochs": 3.0, "learning_rate": 5e-3, "batch_size": 4, "gradient_accumulation": 2,
    "dropout": 0.2, "neftune_alpha": 5.0, "products": "float32", "eval_fraction": 0.1, "evals_per_epoch": 2,
    "checkpoint_every_s": 0.001, "canary_probes": 1,
}  # fmt: skip
"""Everything that draws random numbers in a step is on; a checkpoint after every step."""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return written(tmp_path)


@pytest.fixture(scope="module")
def whole(base: Base, tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    """The run that nobody disturbed."""
    return run(base, written(tmp_path_factory.mktemp("whole")), "whole")


def written(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def run(base: Base, data: Path, out: str, start: Start = "new", **changes: Any) -> TrainingResult:
    recipe = Recipe(data=data, out=data.with_name(out), **(SETTINGS | changes))
    return train(recipe, base, start=start, progress=False)


def started(arguments: list[str], directory: Path, base_cache: Path) -> subprocess.Popen[str]:
    """`quickchange train` with these arguments, as a process."""
    return subprocess.Popen(
        [sys.executable, "-m", "quickchange", "train", *arguments],
        cwd=directory,
        env=os.environ | {"QUICKCHANGE_CACHE": str(base_cache), "PYTHONPATH": os.getcwd()},
        stderr=subprocess.PIPE,
        text=True,
    )


class Killed(BaseException):
    """Ends a run as nothing that it could catch would."""


def cut(monkeypatch: pytest.MonkeyPatch, base: Base, data: Path, after: int, **changes: Any) -> Path:
    """Ends a run with its `after`th checkpoint; returns its unfinished folder."""
    real, left = UnfinishedRun.complete, [after]

    def complete(self: UnfinishedRun, step: int, seconds: float) -> None:
        real(self, step, seconds)
        left[0] -= 1
        if not left[0]:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(UnfinishedRun, "complete", complete)
        with pytest.raises(Killed):
            run(base, data, "cut", **changes)
    return unfinished_folder(data.with_name("cut"))


def test_a_process_killed_again_and_again_ends_with_the_same_losses_and_bytes(
    base: Base, folder: Path, data: Path, base_cache: Path, whole: TrainingResult
) -> None:
    recipe = {"base": str(folder), "data": str(data), "out": str(data.with_name("cut"))} | SETTINGS
    data.with_name("recipe.yaml").write_text(json.dumps(recipe))
    unfinished, kills = unfinished_folder(data.with_name("cut")), 0
    for step in (2, 6, 11):  # in the first, the second and the third epoch of five steps
        process = started(["--resume", "--config", "recipe.yaml"], data.parent, base_cache)
        while process.poll() is None:
            found = newest_checkpoint(unfinished)
            if found is not None and found.step >= step:
                process.kill()
                break
            time.sleep(0.005)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills == 3
    resumed = run(base, data, "cut", "resume")
    assert resumed.fit.resumed_at is not None
    assert resumed.fit.resumed_at >= 11
    assert resumed.fit.losses == whole.fit.losses
    assert resumed.fit.evals == whole.fit.evals
    assert resumed.fit.tokens == whole.fit.tokens
    assert resumed.facts.digest == whole.facts.digest
    assert not unfinished.exists()
    assert not unfinished_folder(whole.out).exists()


@pytest.mark.parametrize("after", [1, 5, 6])
def test_whatever_the_step_it_stopped_at(
    after: int, base: Base, data: Path, whole: TrainingResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(monkeypatch, base, data, after)
    resumed = run(base, data, "cut", "resume")
    assert resumed.fit.resumed_at == after
    assert resumed.facts.digest == whole.facts.digest


def test_a_half_written_checkpoint_does_not_count(
    base: Base, data: Path, whole: TrainingResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished = cut(monkeypatch, base, data, 4)
    half = unfinished / "checkpoint-5"
    half.mkdir()
    (half / "trainer_state.json").write_text("{")
    resumed = run(base, data, "cut", "resume")
    assert resumed.fit.resumed_at == 4
    assert resumed.facts.digest == whole.facts.digest


def test_an_unfinished_run_is_neither_lost_nor_taken_up_unasked(
    base: Base, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(monkeypatch, base, data, 4)
    with pytest.raises(CheckpointError, match=r"stopped after step 4; go on with --resume, or .* --restart"):
        run(base, data, "cut")
    assert run(base, data, "cut", "restart").fit.resumed_at is None


def test_another_run_does_not_go_on_from_it(base: Base, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unfinished = cut(monkeypatch, base, data, 4)
    with pytest.raises(CheckpointError, match=r"learning_rate 0\.005, this one has 0\.001; give the same"):
        run(base, data, "cut", "resume", learning_rate=1e-3)
    data.write_text(data.read_text() + json.dumps(ROWS[0] | {"prompt": "new"}) + "\n")
    with pytest.raises(CheckpointError, match="with data"):
        run(base, data, "cut", "resume")
    (unfinished / "run.json").unlink()
    with pytest.raises(CheckpointError, match=r"run\.json cannot be read; begin anew"):
        run(base, data, "cut", "resume")


def test_two_processes_do_not_work_on_one_run(base: Base, data: Path) -> None:
    with (
        UnfinishedRun(data.with_name("out")),
        pytest.raises(CheckpointError, match=r"another process works on .*out\.unfinished"),
    ):
        run(base, data, "out")
    assert not unfinished_folder(data.with_name("out")).exists()  # nothing to go on from
    assert run(base, data, "out", "resume", max_steps=1).fit.resumed_at is None


def test_a_run_that_fails_before_a_checkpoint_leaves_nothing(base: Base, data: Path) -> None:
    data.write_text(data.read_text() + "{\n")
    with pytest.raises(DataError, match="line 41 is not JSON"):
        run(base, data, "out")
    assert sorted(path.name for path in data.parent.iterdir()) == ["rows.jsonl"]


def test_ctrl_c_ends_with_a_checkpoint_and_says_how_to_go_on(
    folder: Path, base: Base, data: Path, base_cache: Path
) -> None:
    out = data.with_name("out")
    arguments = ["--base", str(folder), "--data", str(data), "--out", str(out), "--max-steps", "100000"]
    process = started(arguments, data.parent, base_cache)
    while not list(unfinished_folder(out).glob("tensorboard/*")):  # written once training begins
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "of 100000; --resume goes on from there" in errors
    assert newest_checkpoint(unfinished_folder(out)) is not None
    assert main(["train", *arguments]) == 1  # it is not taken up unasked


# Early stopping


def test_a_run_that_gets_no_better_ends_and_keeps_its_best_weights(base: Base, data: Path) -> None:
    """Answers to memorise by chance: the held-out loss rises as they are learned."""
    changes = {"epochs": 40.0, "learning_rate": 2e-2, "eval_fraction": 0.3, "early_stopping": 3}
    stopped = run(base, data, "stopped", neftune_alpha=0.0, dropout=0.0, **changes)
    losses = [point.loss for point in stopped.fit.evals]
    best = min(stopped.fit.evals, key=lambda point: point.loss)
    assert stopped.fit.steps < 40 * 4
    assert stopped.fit.best_step == best.step
    assert len(losses) - 1 - losses.index(best.loss) == 3
    assert (
        stopped.facts.delta_norm
        < run(
            base,
            data,
            "last",
            **(changes | {"early_stopping": None, "neftune_alpha": 0.0, "dropout": 0.0, "epochs": 20.0}),
        ).facts.delta_norm
    )


def test_the_best_weights_survive_a_kill(base: Base, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"epochs": 40.0, "learning_rate": 2e-2, "eval_fraction": 0.3, "early_stopping": 3}
    whole = run(base, data, "whole", **changes)
    cut(monkeypatch, base, data, whole.fit.steps - 1, **changes)  # between the best and the end
    resumed = run(base, data, "cut", "resume", **changes)
    assert resumed.fit.best_step == whole.fit.best_step
    assert resumed.facts.digest == whole.facts.digest


def test_early_stopping_needs_rows_to_judge_by(data: Path) -> None:
    with pytest.raises(RecipeError, match="early_stopping needs held-out rows; set eval_fraction"):
        Recipe(data=data, out=data.with_name("out"), early_stopping=2)


# Noise and trackers


def test_noise_on_embeddings_changes_the_run_and_leaves_the_base_alone(base: Base, data: Path) -> None:
    embedding = base.model.get_input_embeddings()
    quiet = run(base, data, "quiet", max_steps=3, neftune_alpha=0.0)
    noisy = run(base, data, "noisy", max_steps=3)
    assert noisy.facts.digest != quiet.facts.digest
    assert base.model.get_input_embeddings() is embedding
    assert not embedding._forward_hooks


def test_every_loss_is_an_event_of_tensorboard(base: Base, data: Path) -> None:
    result = run(base, data, "out", max_steps=4)
    files = list((artefacts_folder(result.out) / "tensorboard").iterdir())
    scalars = {
        (value.tag, event.step): value.simple_value
        for path in files
        for event in events(path)
        for value in event.summary.value
    }
    for point in result.fit.losses:
        assert scalars["train/loss", point.step] == pytest.approx(point.loss)
    for evaluated in result.fit.evals:
        assert scalars["eval/loss", evaluated.step] == pytest.approx(evaluated.loss)


def test_no_tracker_no_events(base: Base, data: Path) -> None:
    result = run(base, data, "out", max_steps=1, trackers=())
    assert {path.name for path in result.artefacts.iterdir()} == {"training.json", "loss.png"}


def test_a_tracker_that_is_not_there_is_named_before_anything_else(base: Base, data: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"trackers names 'wandbb', which is not installed .* choose of .*tensorboard"
    ):
        run(base, data, "out", trackers=("wandbb",))
    assert sorted(path.name for path in data.parent.iterdir()) == ["rows.jsonl"]


def events(path: Path) -> list[Event]:
    """The records of an event file: length, its checksum, bytes, their checksum."""
    raw, found = path.read_bytes(), []
    while raw:
        (length,) = struct.unpack("<Q", raw[:8])
        found.append(Event.FromString(raw[12 : 12 + length]))
        raw = raw[16 + length :]
    return found
