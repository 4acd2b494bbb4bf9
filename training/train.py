"""Owns a training run from recipe to adapter folder. Knows no commands and no demo.

Afterwards there are two folders, each of which appears complete or not at all:

OUT            exactly an adapter: adapter_config.json, adapter_model.safetensors, quickchange.json
OUT.training   how it came about: training.json, loss.png, TensorBoard's event files
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from transformers import set_seed

from adapters.base import Base, load_base
from adapters.facts import AdapterFacts
from adapters.text import BaseText, load_text
from training.data import TrainingData, prepare
from training.data_report import DataReport
from training.encoding import RowEncoder
from training.errors import RecipeError
from training.fitting import Fit, fit
from training.outcome import write_outcome
from training.publish import check_server, publish_adapter
from training.qlora import attached, products_dtype
from training.recipe import Recipe
from training.recorder import check_trackers
from training.unfinished import Start, UnfinishedRun

_WITHOUT_EFFECT: Final = ("out", "checkpoint_every_s", "trackers", "canary_probes", "publish", "name")
"""Settings that a run may change when it goes on."""


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """A finished run.

    Attributes:
        out: the adapter's folder.
        artefacts: the folder with training.json and loss.png.
        facts: of the adapter, as a server would find them.
        published: "name@version" on the server; None if it was not uploaded.
    """

    out: Path
    artefacts: Path
    facts: AdapterFacts
    data: DataReport
    fit: Fit
    published: str | None


def train(
    recipe: Recipe,
    base: Base | None = None,
    *,
    start: Start = "new",
    stop: threading.Event | None = None,
    progress: bool = True,
    on_data: Callable[[DataReport], None] = lambda _: None,
) -> TrainingResult:
    """Trains an adapter and writes it to recipe.out.

    Args:
        base: loaded with purpose="train", as the recipe wants it, so that several runs can share it; None
            loads recipe.base. It is given back without the adapter.
        start: what to do if an earlier run towards recipe.out left a checkpoint: "new" refuses, "resume" goes
            on from it, exactly as if it had never stopped, "restart" removes it. Without one all three begin.
        stop: ends the run after its step, with a checkpoint, once it is set.
        progress: whether there is a bar with the loss on standard error.
        on_data: is told of the data before the first step.

    Raises:
        TrainingError: recipe or data are wrong, the loss is no number, the run was stopped, or the server
            refuses the adapter.
        BaseModelError: the base cannot be loaded.
        FileExistsError: recipe.out exists.
    """
    _check_out(recipe)
    check_trackers(recipe.trackers)
    with UnfinishedRun(recipe.out, start) as run:
        base = base or _load(recipe, progress)
        result = _run(recipe, base, run, stop or threading.Event(), progress, on_data)
        run.finished()
    return replace(result, published=_publish(recipe, progress))


def _run(
    recipe: Recipe,
    base: Base,
    run: UnfinishedRun,
    stop: threading.Event,
    progress: bool,
    on_data: Callable[[DataReport], None],
) -> TrainingResult:
    """Everything but the upload."""
    _check_fits(base, recipe)
    if recipe.publish is not None:
        check_server(recipe.publish, base.fingerprint)
    data = prepare(recipe, _encoder(recipe, base))
    on_data(data.report)
    products = _products(recipe, base, run)
    run.identify(_identity(recipe, base, data, products))
    set_seed(recipe.seed)
    with attached(base, recipe, products) as model:
        fitted = fit(model, base, data, recipe, products, run, progress=progress, stop=stop)
        facts, artefacts = write_outcome(model, base, data, recipe, fitted, run.events)
    return TrainingResult(recipe.out, artefacts, facts, data.report, fitted, published=None)


def _products(recipe: Recipe, base: Base, run: UnfinishedRun) -> torch.dtype:
    """As the run that goes on had them: measured anew, "auto" might choose the other type."""
    recorded = run.recorded().get("products") if run.checkpoint is not None else None
    return products_dtype(recipe, base.device) if recorded is None else getattr(torch, recorded)


def _identity(recipe: Recipe, base: Base, data: TrainingData, products: torch.dtype) -> dict[str, Any]:
    """What must be the same for a run to go on: all that its losses depend on."""
    settings = {name: value for name, value in recipe.to_mapping().items() if name not in _WITHOUT_EFFECT}
    return settings | {
        "base": base.fingerprint,
        "data": data.sha256,
        "eval_data": data.eval_sha256,
        "products": str(products).removeprefix("torch."),
    }


def examine(recipe: Recipe, progress: bool = True) -> DataReport:
    """What training would say of its data before the first step; no weights are loaded, nothing is written.

    Raises:
        TrainingError: recipe or data are wrong.
        BaseModelError: the base cannot be read.
        FileExistsError: recipe.out exists.
    """
    _check_out(recipe)
    return prepare(recipe, _encoder(recipe, load_text(recipe.base, progress=progress))).report


def _check_out(recipe: Recipe) -> None:
    if recipe.out.exists():
        raise FileExistsError(f"{recipe.out} exists already; remove it or choose another --out")


def _load(recipe: Recipe, progress: bool) -> Base:
    return load_base(
        recipe.base,
        purpose="train",
        quantization=recipe.quantization,
        device=recipe.device,
        progress=progress,
    )


def _check_fits(base: Base, recipe: Recipe) -> None:
    if base.quantization != recipe.quantization:
        raise RecipeError(
            f"method {recipe.method} trains on quantization {recipe.quantization}, the base given has "
            f"{base.quantization}"
        )


def _encoder(recipe: Recipe, text: Base | BaseText) -> RowEncoder:
    return RowEncoder(
        text.tokenizer,
        text.chat_template,
        text.eos_token_ids,
        min(recipe.max_length, text.max_context_tokens),
        loss_on=recipe.loss_on,
        on_too_long=recipe.on_too_long,
    )


def _publish(recipe: Recipe, progress: bool) -> str | None:
    if recipe.publish is None or recipe.name is None:
        return None
    return publish_adapter(recipe.out, recipe.publish, recipe.name, progress=progress)
