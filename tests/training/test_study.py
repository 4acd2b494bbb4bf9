"""A study's folder and its runs: what is drawn, what stays done, what becomes of what fails or stops."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from quickchange.cli import main
from tests.models import build_tiny_model
from tests.training.bases import write_rows
from training.errors import DataError, StoppedError, StudyError
from training.methods import METHODS
from training.study import Ending, engine_for, report_study, run_study
from training.study_cell import EVALUATION_FILE, last_line
from training.study_folder import StudyFolder
from training.study_plan import Study
from training.study_result import CellResult, StudyResult

MACHINE = {"processor": "a test's"}
FIGURES = {"exact": 0.5, "chrf": 60.0, "loss": 1.5}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    test = tmp_path / "test.jsonl"
    test.write_text(
        "".join(json.dumps({"prompt": f"ask {n}", "completion": f"{n}"}) + "\n" for n in range(9))
    )
    return {"data": write_rows(tmp_path / "rows.jsonl"), "test": test}


def study(files: dict[str, Path], base: Path | None = None, **changes: Any) -> Study:
    values = {
        **files,
        "base": str(base),
        "rows": 24,
        "test_rows": 4,
        "methods": ["lora", "full"],
        "ranks": [2],
        "rates": {"factors": [1, 10], "steps": 1, "eval_fraction": 0.25},
        "recipe": {"epochs": 1, "batch_size": 8},
    }
    return Study.from_mapping({**values, **changes}, source="the test")


class Launched:
    """Trains for real, in this process; what would be asked of a server is written down as answered.

    Args:
        endings: how the runs end whose arguments have this in them, in place of being run.
    """

    def __init__(self, endings: dict[str, Ending] | None = None) -> None:
        self.endings = endings or {}
        self.runs: list[str] = []

    def __call__(self, arguments: Sequence[str], log: Path) -> Ending:
        self.runs.append(" ".join(arguments))
        for part, ending in self.endings.items():
            if part in self.runs[-1]:
                log.write_text(f"10%|#  |\rerror: it was to be {ending}\n")
                return ending
        if arguments[0] == "train":
            return "done" if main(arguments) == 0 else "failed"
        out = Path(arguments[arguments.index("--out") + 1])
        out.mkdir()
        metrics = {name: {"value": value, "interval": [None, None]} for name, value in FIGURES.items()}
        (out / EVALUATION_FILE).write_text(
            json.dumps({"model": {"metrics": metrics}, "answers": {"base": "it"}})
        )
        return "done"


def run(study: Study, folder: Path, launch: Launched) -> StudyResult:
    return run_study(study, folder, launch=launch, tell=lambda _: None, machine=MACHINE)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("tiny"))


# The folder


def test_rows_are_drawn_once(files: dict[str, Path], tmp_path: Path) -> None:
    with StudyFolder(tmp_path / "study", study(files)) as folder:
        before = folder.train.read_text()
        assert len(before.splitlines()) == 24
        facts = folder.facts()
    assert (facts["train"]["rows"], facts["test"]["rows"], facts["train"]["file"]) == (24, 4, "rows.jsonl")
    assert facts["test"]["rows that training has too"] == 0
    files["data"].unlink()
    with StudyFolder(tmp_path / "study", study(files)) as folder:
        assert folder.train.read_text() == before


def test_other_terms_are_another_study(files: dict[str, Path], tmp_path: Path) -> None:
    with StudyFolder(tmp_path / "study", study(files)):
        pass
    with StudyFolder(tmp_path / "study", study(files, methods=["lora"], seeds=[0, 1])):
        pass
    with pytest.raises(StudyError, match=r"holds a study with rows 24, this one has 25; give the same"):
        StudyFolder(tmp_path / "study", study(files, rows=25))


def test_one_process_at_a_time(files: dict[str, Path], tmp_path: Path) -> None:
    with (
        StudyFolder(tmp_path / "study", study(files)),
        pytest.raises(StudyError, match="another process's work"),
    ):
        StudyFolder(tmp_path / "study", study(files))


def test_a_folder_of_something_else_is_left_alone(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="exists and is no study"):
        StudyFolder(tmp_path, study(files))
    assert not (tmp_path / "lock").exists()


def test_too_few_rows_leave_no_half_study(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="has 48 rows, 49 are wanted"):
        StudyFolder(tmp_path / "study", study(files, rows=49))
    files["data"].write_text("{")
    with pytest.raises(DataError):
        StudyFolder(tmp_path / "other", study(files))
    assert not (tmp_path / "other" / "data").exists()


# The runs


def test_what_is_done_stays_done(files: dict[str, Path], tiny: Path, tmp_path: Path) -> None:
    compared = study(files, tiny)
    launched = Launched()
    result = run(compared, tmp_path / "study", launched)
    assert [cell.name for cell in result.cells] == ["lora-r2-s0", "full-s0"]
    assert not result.failed
    assert not result.missing
    lora, full = (cell.measured for cell in result.cells)
    assert lora is not None
    assert full is not None
    assert lora.trained_parameters < full.trained_parameters
    assert lora.result_bytes < full.result_bytes
    assert lora.steps == 3 == len(lora.losses)
    assert (lora.test_loss, lora.scores["exact"].value, lora.engine) == (1.5, 0.5, "server")
    assert "loss" not in lora.scores
    assert len(result.cells[0].trials) >= 2
    assert result.base_scores["chrf"].value == 60.0
    assert {"train", "evaluate"} == {run.split()[0] for run in launched.runs}
    full_model = next(run for run in launched.runs if "cells/full-s0/evaluation" in run)
    assert f"--base {tmp_path / 'study/cells/full-s0/result'} --quantization none" in full_model

    again = Launched()
    assert run(compared, tmp_path / "study", again) == result
    assert again.runs == []
    wider = study(files, tiny, seeds=[0, 1], methods=["lora"])
    assert [cell.seed for cell in run(wider, tmp_path / "study", again).cells] == [0, 1]
    assert all("trials" not in run and "s1" in run for run in again.runs)  # the method's rate is known
    assert report_study(compared, tmp_path / "study", machine=MACHINE) == result


def test_a_stopped_study_goes_on(files: dict[str, Path], tiny: Path, tmp_path: Path) -> None:
    compared = study(files, tiny, methods=["lora"], rates={"given": {"lora": 1e-3}})
    with pytest.raises(StoppedError, match="the same command goes on"):
        run(compared, tmp_path / "study", Launched({"cells/lora": "stopped"}))
    unfinished = tmp_path / "study/cells/lora-r2-s0/result.unfinished"
    unfinished.mkdir()
    launched = Launched()
    assert not run(compared, tmp_path / "study", launched).failed
    assert launched.runs[0].endswith("recipe.yaml --resume")


def test_a_cell_that_fails_is_reported_and_tried_again(
    files: dict[str, Path], tiny: Path, tmp_path: Path
) -> None:
    compared = study(files, tiny, rates={"given": {"lora": 1e-3, "full": 1e-4}})
    result = run(compared, tmp_path / "study", Launched({"cells/lora": "failed"}))
    assert [cell.error for cell in result.cells] == ["it was to be failed", None]
    assert [cell.name for cell in result.failed] == ["lora-r2-s0"]
    launched = Launched()
    assert not run(compared, tmp_path / "study", launched).failed
    assert not any("full" in run for run in launched.runs)


def test_rates_that_diverge_lose(files: dict[str, Path], tiny: Path, tmp_path: Path) -> None:
    compared = study(files, tiny, methods=["lora"])
    result = run(compared, tmp_path / "study", Launched({"lora/0.002": "diverged"}))
    (cell,) = result.cells
    losses = {trial.learning_rate: trial.held_out_loss for trial in cell.trials}
    assert losses[2e-3] is None
    assert cell.learning_rate < 2e-3
    nothing = run(compared, tmp_path / "other", Launched({"trials": "diverged"}))
    assert (nothing.cells[0].error or "").startswith("every learning rate diverged: 0.0002, 0.002, 2e-05")


def test_a_base_that_cannot_be_asked_ends_it(files: dict[str, Path], tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="the base could not be asked: it was to be failed"):
        run(study(files, tiny), tmp_path / "study", Launched({"base/evaluation": "failed"}))


def test_results_survive_their_files(files: dict[str, Path], tiny: Path, tmp_path: Path) -> None:
    compared = study(files, tiny, methods=["lora"], rates={"given": {"lora": 1e-3}})
    (cell,) = run(compared, tmp_path / "study", Launched()).cells
    assert CellResult.from_mapping(json.loads(json.dumps(cell.to_mapping()))) == cell


def test_who_answers() -> None:
    engines = {name: engine_for(method, method.quantizations[0]) for name, method in METHODS.items()}
    assert {engines[name] for name in ("qlora", "lora", "rslora", "full")} == {"server"}
    assert {engines[name] for name in ("ia3", "prefix", "prompt", "lora_8bit")} == {"reference"}


def test_what_a_process_said_last(tmp_path: Path) -> None:
    assert last_line(tmp_path / "none") == "it said nothing"
    log = tmp_path / "log"
    log.write_text("one\n 50%|##\r100%|####\nerror: no memory; take less\n\n")
    assert last_line(log) == "no memory; take less"
