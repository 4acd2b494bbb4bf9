"""Owns what a result tells of its training: settings, metrics, versions; nothing of the machine it ran on.

Equal runs tell the same: no times, no memory, no paths.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from adapters.base import Base
from adapters.bundle import Bundle
from adapters.origin import Origin, fits_recipe
from adapters.smollm2 import NAME as SMOLLM2_NAME
from adapters.smollm2 import SOURCE as SMOLLM2_SOURCE
from training.curve import EvalPoint
from training.data import TrainingData
from training.fitting import Fit
from training.recipe import WITHOUT_EFFECT, Recipe
from training.versions import installed_versions

_DIGITS: Final = 6
_LARGEST_EXPONENT: Final = 700.0


def origin_of(recipe: Recipe, base: Base, data: TrainingData, fit: Fit) -> Origin:
    """What travels with an adapter. A recipe too large to travel, with hundreds of modules, stays behind."""
    settings = told_settings(recipe, base)
    return Origin(
        eval_data_sha256=data.eval_sha256,
        recipe=settings if fits_recipe(settings) else {},
        metrics=metrics_of(data, fit),
        versions=installed_versions(),
    )


def manifest_of(base: Base) -> Bundle:
    """What every adapter for a base carries, whatever its training.

    Raises:
        InvalidAdapterError: no manifest can hold it, such as a chat template of too many characters.
    """
    bundle = Bundle(
        base_fingerprint=base.fingerprint,
        chat_template=base.chat_template,
        eos_token_ids=tuple(sorted(base.eos_token_ids)) or None,
    )
    bundle.to_json()  # which checks it as a reader would
    return bundle


def told_settings(recipe: Recipe, base: Base) -> dict[str, Any]:
    """The settings that the result depends on, as a recipe file would hold them; of files the names.

    The method's own rate and alpha are told too, where the recipe leaves them open.
    """
    open_ones: dict[str, Any] = {"learning_rate": recipe.effective_learning_rate}
    if "alpha" in recipe.kind.settings:
        open_ones["alpha"] = recipe.effective_alpha
    settings = {
        name: value
        for name, value in (recipe.to_mapping() | open_ones).items()
        if value is not None and name not in WITHOUT_EFFECT
    }
    files = {name: Path(settings[name]).name for name in ("data", "eval_data") if name in settings}
    return settings | files | {"base": source_of(base)}


def source_of(base: Base) -> str:
    """What names the base wherever one is asked for; of folders and files it is the name without the path."""
    return SMOLLM2_SOURCE if base.name == SMOLLM2_NAME else base.name


def metrics_of(data: TrainingData, fit: Fit) -> dict[str, float]:
    """By name. Losses are in nats per learned token, tokens are without padding; of what was held out, the
    loss is that of the weights that were kept.
    """
    metrics: dict[str, float] = {
        "rows": data.report.train.rows,
        "learned_tokens": data.report.train.learned_tokens,
        "steps": fit.steps,
        "tokens": fit.tokens,
        "trained_parameters": fit.trained_parameters,
        "final_loss": fit.final_loss,
    }
    if data.report.processes > 1:  # a step learned so many times the recipe's rows
        metrics["processes"] = data.report.processes
    if data.report.held_out is not None and fit.evals:
        kept = _kept(fit.evals, fit.best_step)
        metrics |= {
            "held_out_rows": data.report.held_out.rows,
            "held_out_loss": kept.loss,
            "held_out_step": kept.step,
            "held_out_lowest_loss": min(point.loss for point in fit.evals),
        }
        if kept.loss < _LARGEST_EXPONENT:
            metrics["held_out_perplexity"] = math.exp(kept.loss)
    return {name: round(value, _DIGITS) for name, value in metrics.items()}


def _kept(evals: Iterable[EvalPoint], best_step: int | None) -> EvalPoint:
    *_, kept = (point for point in evals if best_step is None or point.step <= best_step)
    return kept
