"""Owns a training run from recipe to adapter folder. Knows no commands and no demo.

Afterwards there are two folders, each of which appears complete or not at all:

OUT            exactly an adapter: adapter_config.json, adapter_model.safetensors, quickchange.json
OUT.training   how it came about: training.json, loss.png
"""

from dataclasses import dataclass
from pathlib import Path

from transformers import set_seed

from adapters.base import Base, load_base
from adapters.facts import AdapterFacts
from training.data import DataReport, RowEncoder, prepare
from training.errors import RecipeError
from training.fitting import Fit, fit
from training.outcome import write_outcome
from training.publish import check_server, publish_adapter
from training.qlora import attached, products_dtype
from training.recipe import Recipe


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


def train(recipe: Recipe, base: Base | None = None, progress: bool = True) -> TrainingResult:
    """Trains an adapter and writes it to recipe.out.

    Args:
        base: loaded with purpose="train", as the recipe wants it, so that several runs can share it; None
            loads recipe.base. It is given back without the adapter.
        progress: whether there is a bar with the loss on standard error.

    Raises:
        TrainingError: recipe or data are wrong, the loss is no number, or the server refuses the adapter.
        BaseModelError: the base cannot be loaded.
        FileExistsError: recipe.out exists.
    """
    if recipe.out.exists():
        raise FileExistsError(f"{recipe.out} exists already; remove it or choose another --out")
    base = base or _load(recipe, progress)
    _check_fits(base, recipe)
    if recipe.publish is not None:
        check_server(recipe.publish, base.fingerprint)
    encoder = RowEncoder(base.tokenizer, base.chat_template, base.eos_token_ids, _max_length(base, recipe))
    data = prepare(recipe.data, encoder, held_out_fraction=recipe.eval_fraction, seed=recipe.seed)
    products = products_dtype(recipe, base.device)
    set_seed(recipe.seed)
    with attached(base, recipe, products) as model:
        fitted = fit(model, base, data, recipe, products, progress)
        facts, artefacts = write_outcome(model, base, data, recipe, fitted)
    published = _publish(recipe, progress)
    return TrainingResult(recipe.out, artefacts, facts, data.report, fitted, published)


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


def _max_length(base: Base, recipe: Recipe) -> int:
    return min(recipe.max_length, base.max_context_tokens)


def _publish(recipe: Recipe, progress: bool) -> str | None:
    if recipe.publish is None or recipe.name is None:
        return None
    return publish_adapter(recipe.out, recipe.publish, recipe.name, progress=progress)
