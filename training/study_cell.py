"""Reads what training and evaluation left of one run of a study. Runs nothing."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.outcome import REPORT_FILE, artefacts_folder
from training.study_result import Engine, Measured, Score

EVALUATION_FILE = "evaluation.json"
_LOSS = "loss"


def measured(result: Path, evaluation: Path, engine: Engine) -> Measured:
    """What a cell came to.

    Args:
        result: the folder that training wrote.
        evaluation: the folder that `quickchange evaluate` wrote.
    """
    report = _json(artefacts_folder(result) / REPORT_FILE)
    fit, memory = report["fit"], report["memory"]
    scores = scores_in(evaluation)
    test_loss = scores.pop(_LOSS, None)
    return Measured(
        steps=fit["steps"],
        trained_parameters=fit["trained_parameters"],
        train_seconds=fit["seconds"],
        tokens_per_s=fit["tokens_per_s"],
        peak_memory_bytes=memory["measured_peak"],
        added_bytes=memory["measured_added"],
        predicted_added_bytes=memory["predicted_added"],
        memory_error=memory["error"],
        result_bytes=sum(file.stat().st_size for file in result.glob("*.safetensors")),
        losses=tuple((point["step"], point["loss"]) for point in fit["losses"]),
        test_loss=None if test_loss is None else test_loss.value,
        engine=engine,
        scores=scores,
    )


def scores_in(evaluation: Path) -> dict[str, Score]:
    """By the name of the metric."""
    metrics: Mapping[str, Any] = _json(evaluation / EVALUATION_FILE)["model"]["metrics"]
    return {name: _score(figure) for name, figure in metrics.items()}


def about(evaluation: Path) -> dict[str, Any]:
    """Who was asked: name, and whatever else the evaluation says."""
    answers: dict[str, Any] = _json(evaluation / EVALUATION_FILE)["answers"]
    return {"name": answers.pop("base"), **answers}


def held_out_loss(result: Path) -> float:
    """Of the last evaluation within training, in nats per learned token."""
    return float(_json(artefacts_folder(result) / REPORT_FILE)["fit"]["evals"][-1]["loss"])


def last_line(log: Path) -> str:
    """What a process said last, which is why it failed."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
    said = [line.rpartition("\r")[2].strip() for line in lines if line.strip()]
    return said[-1].removeprefix("error: ") if said else "it said nothing"


def _score(figure: Mapping[str, Any]) -> Score:
    low, high = figure["interval"]
    return Score(value=figure["value"], low=low, high=high)


def _json(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values
