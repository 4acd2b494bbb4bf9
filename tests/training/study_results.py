"""Results of studies, made by hand for tests: no cell was ever trained."""

from dataclasses import replace
from typing import Any

from training.study_result import CellResult, Measured, RateTrial, Score, StudyResult


def score(value: float | None, margin: float | None = 0.05) -> Score:
    """With an interval of `margin` to both sides; without one if that is None."""
    if value is None or margin is None:
        return Score(value=value, low=None, high=None)
    return Score(value=value, low=value - margin, high=value + margin)


def measured(json_equal: float = 0.6, **changes: Any) -> Measured:
    values: dict[str, Any] = {
        "steps": 20, "trained_parameters": 1_234_567, "train_seconds": 192.6, "tokens_per_s": 412.0,
        "peak_memory_bytes": 2_500_000_000, "added_bytes": 1_000_000_000,
        "predicted_added_bytes": 1_100_000_000, "memory_error": 0.1, "result_bytes": 4_900_000,
        "losses": tuple((step, 2.0 / step) for step in range(1, 21)), "test_loss": 0.75, "engine": "server",
        "scores": {"json_equal": score(json_equal), "chrf": Score(value=61.0, low=60.0, high=62.0)},
    }  # fmt: skip
    return Measured(**(values | changes))


def cell(method: str = "lora", rank: int | None = 16, seed: int = 0, **changes: Any) -> CellResult:
    values: dict[str, Any] = {
        "name": f"{method}-r{rank}-s{seed}", "method": method, "rank": rank, "targets": "all-linear",
        "seed": seed, "quantization": "none", "learning_rate": 2e-4, "trials": (), "measured": measured(),
    }  # fmt: skip
    return CellResult(**(values | changes))


def failed(method: str, error: str) -> CellResult:
    return replace(cell(method), measured=None, error=error)


def study(*cells: CellResult, **changes: Any) -> StudyResult:
    values: dict[str, Any] = {
        "title": "A study", "settings": {"base": "tiny", "rows": 100, "recipe": {"epochs": 1}},
        "data": {"train": {"rows": 100}, "test": {"rows": 50}}, "base": {"name": "tiny"}, "base_scores": {},
        "machine": {"cores": 2, "versions": {"torch": "2.13"}}, "cells": cells,
    }  # fmt: skip
    return StudyResult(**(values | changes))


def trials(*losses: float | None) -> tuple[RateTrial, ...]:
    """At 1e-4, 2e-4, 4e-4 and so on."""
    return tuple(
        RateTrial(learning_rate=1e-4 * 2**order, held_out_loss=loss) for order, loss in enumerate(losses)
    )
