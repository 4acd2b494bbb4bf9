"""Owns the adapter in training: PEFT on a frozen base, and what makes that fast and right. Knows no data.

The base is the one that is served, in bitsandbytes' Linear4bit; gradients flow through its dequantised
weights without changing them. The adapter is held in float32: it is small, and its updates are smaller still.

R rank, D in-features, O out-features.
"""

import inspect
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from adapters.base import Base
from adapters.bnb import Linear4bit
from adapters.layout import BaseLayout
from training.errors import RecipeError
from training.recipe import Recipe

_PROBE_SHAPE: Final = (512, 576, 1536)  # rows, D, O: a batch of short rows in a small model
_PROBE_REPEATS: Final = 5

OPTIMIZERS: Final = {
    "adamw": "adamw_torch_fused",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}
"""Name in a recipe → name in transformers."""


@contextmanager
def attached(base: Base, recipe: Recipe, products: torch.dtype) -> Iterator[PeftModel]:
    """The base with a new adapter on it, ready to train; afterwards the base is as it was.

    Args:
        products: type of the matrix products around 4-bit weights.

    Raises:
        RecipeError: target_modules names nothing in this base.
    """
    base.model.requires_grad_(False)
    try:
        with warnings.catch_warnings():  # PEFT asks by a name that transformers has renamed
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            model = get_peft_model(base.model, lora_config(recipe, base.layout))
    except ValueError as error:  # PEFT found no module of that name, or one that is not linear
        raise RecipeError(f"target_modules is {recipe.target_modules!r}: {error}") from None
    with products_in(base, products), _contiguous_head(base.model), _checkpointed(base, recipe):
        try:
            yield model
        finally:
            model.unload()
            base.model.requires_grad_(False)
            base.model.eval()


def lora_config(recipe: Recipe, layout: BaseLayout) -> LoraConfig:
    """What PEFT is asked for: nothing but low-rank updates of linear modules."""
    return LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.effective_alpha,
        lora_dropout=recipe.dropout,
        target_modules=target_modules(recipe, layout),
        use_rslora=recipe.method == "rslora",
        bias="none",
        task_type="CAUSAL_LM",
    )


def target_modules(recipe: Recipe, layout: BaseLayout) -> list[str]:
    """Names of the modules to adapt, the shortest that mean exactly them.

    PEFT would write the full name of every layer's modules for "all-linear".
    """
    if isinstance(recipe.target_modules, tuple):
        return list(recipe.target_modules)
    inner = [name for name in layout.modules if name != layout.head]
    short = sorted({name.rpartition(".")[2] for name in inner})
    head_is_apart = layout.head is None or layout.head.rpartition(".")[2] not in short
    return short if head_is_apart else inner


def optimizer_name(recipe: Recipe, device: torch.device) -> str:
    """The optimizer in transformers' words.

    A CPU has nothing to page, and 8-bit states cost more time there than the memory they save is worth;
    docs/guides/training.md has the figures.
    """
    if recipe.optimizer != "auto":
        return OPTIMIZERS[recipe.optimizer]
    return OPTIMIZERS["paged_adamw_8bit" if device.type == "cuda" else "adamw"]


def takes_logits_to_keep(model: nn.Module) -> bool:
    """Whether the model can leave out the logits of columns that nobody learns."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


@contextmanager
def products_in(base: Base, dtype: torch.dtype) -> Iterator[None]:
    """Within the block the frozen layers' products are of this type."""
    layers = [module for module in base.model.modules() if isinstance(module, Linear4bit)]
    before = [layer.compute_dtype for layer in layers]
    for layer in layers:
        # A repacked weight would give wrong gradients without a word.
        assert not layer.support_avx512bf16_for_cpu, "load the base with purpose='train'"
        layer.compute_dtype = dtype
    try:
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.compute_dtype = old


def products_dtype(recipe: Recipe, device: torch.device) -> torch.dtype:
    """Type of the matrix products around 4-bit weights.

    On a CPU "auto" measures: with AVX512-BF16 some processors multiply bfloat16 twice as fast as float32,
    others half as fast, and no flag tells which.
    """
    if recipe.products != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[recipe.products]
    if device.type == "cuda":
        return torch.bfloat16
    return min((torch.bfloat16, torch.float32), key=_seconds_of_a_product)


def _seconds_of_a_product(dtype: torch.dtype) -> float:
    rows, ins, outs = _PROBE_SHAPE
    x_BD, w_OD = torch.ones(rows, ins, dtype=dtype), torch.ones(outs, ins, dtype=dtype)
    return min(_seconds(lambda: nn.functional.linear(x_BD, w_OD)) for _ in range(_PROBE_REPEATS))


def _seconds(work: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s


@contextmanager
def _contiguous_head(model: Any) -> Iterator[None]:
    """Hands the output head contiguous rows: a slice of columns is multiplied row by row, 15 times slower."""

    def contiguous(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].contiguous(), *args[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(contiguous)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _checkpointed(base: Base, recipe: Recipe) -> Iterator[None]:
    if not recipe.gradient_checkpointing:
        yield
        return
    base.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        base.model.gradient_checkpointing_disable()
