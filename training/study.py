"""Owns a study from its settings to its report: every cell trained and measured by itself, one after another.

Every run is a process of its own, as a user would start it, so that time and memory are its own. Whatever is
done stays done: a study that is stopped or killed goes on where it was, within a run from its checkpoint.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import yaml  # type: ignore[import-untyped]  # PyYAML carries no types

from adapters.durable import replace_text
from training.errors import StoppedError, StudyError
from training.methods import Method
from training.metrics import METRICS
from training.rate_search import best, first_rate, needs_trials, next_rate
from training.study_cell import EVALUATION_FILE, about, held_out_loss, last_line, measured, scores_in
from training.study_folder import StudyFolder
from training.study_plan import Cell, Study
from training.study_report import write_study_report
from training.study_result import CellResult, Engine, Measured, RateTrial, StudyResult
from training.unfinished import unfinished_folder
from training.versions import installed_versions

Ending = Literal["done", "failed", "diverged", "stopped"]
"""How a process ended; "diverged" is a training run whose loss became no number."""
Launch = Callable[[Sequence[str], Path], Ending]
"""Runs `quickchange` with these arguments until it ends; all it says goes to the end of that file."""
Tell = Callable[[str], None]

_SERVED_BASES: Final = ("nf4", "none")
_TOLD: Final = ("json_equal", "exact", "chrf")


class _CellFailedError(Exception):
    """A step of a cell failed; the study goes on with the next cell."""


def run_study(
    study: Study, path: Path, *, launch: Launch, tell: Tell, machine: Mapping[str, Any]
) -> StudyResult:
    """Runs what is not done yet and writes the report after every cell.

    A cell that fails is in the report with the reason, and is tried again when the study is run again.

    Args:
        machine: what it runs on, for the report's readers.

    Raises:
        StudyError: the folder is another study's.
        DataError: the rows cannot be used.
        StoppedError: a run was asked to stop; the same call goes on.
    """
    with StudyFolder(path, study) as folder:
        runner = _Runner(study, folder, launch, tell)
        runner.evaluate_base()
        to_run = [cell for cell in runner.cells if runner.result(cell) is None]
        began_s = time.monotonic()
        for done, cell in enumerate(to_run):
            left = _left(time.monotonic() - began_s, done, len(to_run))
            tell(f"{cell.name}: cell {done + 1} of {len(to_run)} to run{left}")
            runner.run(cell)
            _write_report(study, folder, machine)
        return _write_report(study, folder, machine)


def _left(seconds: float, done: int, total: int) -> str:
    """How long the others will take if they take as long as those that are done."""
    if not done:
        return ""
    return f", about {seconds / done * (total - done) / 60:.0f} min left"


def report_study(study: Study, path: Path, *, machine: Mapping[str, Any]) -> StudyResult:
    """Writes the report of what is done so far.

    Raises:
        StudyError: the folder is another study's, or nothing is done yet.
    """
    if not path.exists():
        raise StudyError(f"{path} does not exist; run the study first")
    with StudyFolder(path, study) as folder:
        return _write_report(study, folder, machine)


def _write_report(study: Study, folder: StudyFolder, machine: Mapping[str, Any]) -> StudyResult:
    result = _collected(study, folder, machine)
    folder.publish_report(lambda staged: write_study_report(result, staged))
    return result


def _collected(study: Study, folder: StudyFolder, machine: Mapping[str, Any]) -> StudyResult:
    """What is done so far."""
    found = {cell.name: _done(folder, cell) for cell in study.cells()}
    has_base = (folder.base / "evaluation").exists()
    return StudyResult(
        title=study.title,
        settings=study.to_mapping(),
        data=folder.facts(),
        base=about(folder.base / "evaluation") if has_base else {"name": study.base},
        base_scores=scores_in(folder.base / "evaluation") if has_base else {},
        machine={**machine, **installed_versions()},
        cells=tuple(result for result in found.values() if result is not None),
        missing=tuple(name for name, result in found.items() if result is None),
    )


def _done(folder: StudyFolder, cell: Cell) -> CellResult | None:
    """What is written of a cell, whether it succeeded or failed."""
    path = folder.cell_file(cell)
    return CellResult.from_file(path) if path.exists() else None


class _Runner:
    """Brings one cell after the other to its result."""

    def __init__(self, study: Study, folder: StudyFolder, launch: Launch, tell: Tell) -> None:
        self._study, self._folder, self._launch, self._tell = study, folder, launch, tell
        self.cells = list(study.cells())

    def result(self, cell: Cell) -> CellResult | None:
        """None also of a cell that failed: it is tried again."""
        result = _done(self._folder, cell)
        return None if result is None or result.measured is None else result

    def evaluate_base(self) -> None:
        """The base without any training, quantised as for the first cell that a server could hold."""
        base = self._folder.base
        quantizations = [self._study.quantization_of(cell) for cell in self.cells]
        served = next((each for each in quantizations if each in _SERVED_BASES), "nf4")
        if not (base / "evaluation" / EVALUATION_FILE).exists():
            self._tell("the bare base")
            try:
                self._evaluate(base, ["--base", self._study.base, "--quantization", served])
            except _CellFailedError as failure:
                raise StudyError(f"the base could not be asked: {failure}") from None

    def run(self, cell: Cell) -> None:
        """Writes the cell's result, whether it succeeds or fails."""
        trials: list[RateTrial] = []
        rate, found, error = 0.0, None, None
        try:
            rate = self._rate(cell, trials)
            found = self._measured(cell, rate)
            self._tell(f"  trained in {found.train_seconds / 60:.1f} min; {_scores(found)}")
        except _CellFailedError as failure:
            error = str(failure)
            self._tell(f"  failed: {error}")
        result = CellResult(
            name=cell.name,
            method=cell.method,
            rank=cell.rank,
            targets=cell.targets_text,
            seed=cell.seed,
            quantization=self._study.quantization_of(cell),
            learning_rate=rate,
            trials=tuple(trials),
            measured=found,
            error=error,
        )
        replace_text(self._folder.cell_file(cell), json.dumps(result.to_mapping(), indent=2) + "\n")

    def _rate(self, cell: Cell, trials: list[RateTrial]) -> float:
        """The learning rate of a cell's method, found with the first of its cells.

        Args:
            trials: gets those that were needed.
        """
        search = self._study.rates
        if not needs_trials(cell.method, search):
            return first_rate(cell.method, search)
        first = next(each for each in self.cells if each.method == cell.method)
        while (rate := next_rate(cell.method, search, trials)) is not None:
            trials.append(self._trial(first, rate))
        chosen = best(trials)
        if chosen is None:
            raise _CellFailedError(f"every learning rate diverged: {', '.join(_rates(trials))}")
        return chosen

    def _trial(self, cell: Cell, rate: float) -> RateTrial:
        folder = self._folder.trial(cell.method, rate)
        path = folder / "trial.json"
        if not path.exists():
            search = self._study.rates
            self._tell(f"  learning rate {rate:g}: {search.steps} steps")
            more = {"max_steps": search.steps, "eval_fraction": search.eval_fraction}
            ending = self._train(cell, folder, learning_rate=rate, **more)
            loss = None if ending == "diverged" else held_out_loss(folder / "result")
            replace_text(path, json.dumps({"learning_rate": rate, "held_out_loss": loss}) + "\n")
        return RateTrial(**json.loads(path.read_text()))

    def _measured(self, cell: Cell, rate: float) -> Measured:
        folder = self._folder.cell(cell)
        self._tell(f"  training, learning rate {rate:g}")
        if self._train(cell, folder, learning_rate=rate) == "diverged":
            raise _CellFailedError(last_line(folder / "train.log"))
        engine = engine_for(cell.kind, self._study.quantization_of(cell))
        if not (folder / "evaluation" / EVALUATION_FILE).exists():
            self._tell(f"  evaluating ({engine})")
            self._evaluate(folder, self._who(cell, folder / "result", engine))
        return measured(folder / "result", folder / "evaluation", engine)

    def _train(self, cell: Cell, folder: Path, **more: Any) -> Ending:
        """Trains to FOLDER/result, unless it is there; goes on if a process before this one began."""
        result, log = folder / "result", folder / "train.log"
        if result.exists():
            return "done"
        values = self._study.recipe_of(cell, out=result, data=self._folder.train, **more)
        config = folder / "recipe.yaml"
        replace_text(config, yaml.safe_dump(values, sort_keys=False))
        arguments = ["train", "--config", str(config)]
        if unfinished_folder(result).exists():
            arguments.append("--resume")
        return self._run(arguments, log)

    def _evaluate(self, folder: Path, who: Sequence[str]) -> None:
        study = self._study
        arguments = ["evaluate", "--data", str(self._folder.test), *who, "--out", str(folder / "evaluation")]
        if study.max_new_tokens is not None:
            arguments += ["--max-new-tokens", str(study.max_new_tokens)]
        if self._run(arguments, folder / "evaluate.log") != "done":
            raise _CellFailedError(last_line(folder / "evaluate.log"))

    def _who(self, cell: Cell, result: Path, engine: Engine) -> list[str]:
        """Flags that say who is asked."""
        if cell.kind.saved is None:  # a model of its own
            return ["--base", str(result), "--quantization", "none"]
        quantization = self._study.quantization_of(cell)
        who = ["--base", self._study.base, "--quantization", quantization, "--adapter", str(result)]
        who += ["--against", "none"]
        return who if engine == "server" else [*who, "--engine", engine]

    def _run(self, arguments: Sequence[str], log: Path) -> Ending:
        ending = self._launch(arguments, log)
        if ending == "stopped":
            raise StoppedError(f"{self._folder.path}: stopped; the same command goes on")
        if ending == "failed":
            raise _CellFailedError(last_line(log))
        return ending


def engine_for(method: Method, quantization: str) -> Engine:
    """What answers for what a method leaves: the server if it can."""
    if method.saved is None:
        return "server"
    return "server" if method.why_not_served is None and quantization in _SERVED_BASES else "reference"


def _scores(found: Measured) -> str:
    shown = {name: found.scores[name].value for name in _TOLD if name in found.scores}
    return ", ".join(
        f"{METRICS[name].title} {value:.3g}" for name, value in shown.items() if value is not None
    )


def _rates(trials: Sequence[RateTrial]) -> list[str]:
    return [f"{trial.learning_rate:g}" for trial in trials]
