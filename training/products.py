"""Owns the type of matrix products with a base's weights in training. Knows no adapters.

D in-features, O out-features, B rows.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn

from adapters.base import Base
from adapters.bnb import Linear4bit
from adapters.nf4 import dequantized_weight
from training.errors import RecipeError
from training.recipe import Recipe

_PROBE_SHAPE: Final = (512, 576, 1536)  # rows, D, O: a batch of short rows in a small model
_PROBE_REPEATS: Final = 5
_BY_NAME: Final = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def products_dtype(recipe: Recipe, base: Base) -> torch.dtype:
    """Type of the products with the base's weights.

    Around 4-bit weights "auto" is bfloat16 on CUDA and measured on a CPU: with AVX512-BF16 some processors
    multiply bfloat16 twice as fast as float32, others half as fast, and no flag tells which. Unquantised and
    8-bit weights are multiplied in the type that the base was loaded in; weights that are trained themselves
    are float32, and their products on CUDA bfloat16.

    Raises:
        RecipeError: an 8-bit base was asked for another type than its own.
    """
    wanted = _BY_NAME.get(recipe.products)
    if base.scheme.is_4bit:
        return wanted or (torch.bfloat16 if base.device.type == "cuda" else faster_on_a_cpu())
    if base.quantization == "int8" and wanted not in (None, base.dtype):
        raise RecipeError(
            f"products is {recipe.products}, but a base in int8 is multiplied in its own type, "
            f"{name_of(base.dtype)} here; leave products at auto"
        )
    if wanted is None and recipe.kind.family == "own_weights" and base.device.type == "cuda":
        return torch.bfloat16
    return wanted or base.dtype


def is_autocast(base: Base, products: torch.dtype) -> bool:
    """Whether products need torch's autocast: float32 weights in plain layers, bfloat16 products."""
    return not base.scheme.is_4bit and products == torch.bfloat16 != base.dtype


def faster_on_a_cpu() -> torch.dtype:
    """The type in which a product of usual size takes less time here."""
    return min((torch.bfloat16, torch.float32), key=_seconds_of_a_product)


def name_of(dtype: torch.dtype) -> str:
    """For reports: "float32"."""
    return str(dtype).removeprefix("torch.")


@contextmanager
def products_in(base: Base, dtype: torch.dtype) -> Iterator[None]:
    """Within the block products around 4-bit weights are of this type."""
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


@contextmanager
def bfloat16_everywhere(base: Base) -> Iterator[None]:
    """Within the block the model computes, without gradients, as torch's autocast to bfloat16 has it.

    On a CPU the products with 4-bit weights, most of the work, have factors and results in bfloat16 but are
    multiplied in float32. Sums are float32 either way, and many a processor takes several times as long for
    the same in bfloat16.
    """
    layers = [module for module in base.model.modules() if isinstance(module, Linear4bit)]
    with torch.autocast(base.device.type, dtype=torch.bfloat16):
        if base.device.type != "cpu":
            yield
            return
        try:
            for layer in layers:
                layer.forward = partial(_rounded_product, layer)
            yield
        finally:
            for layer in layers:
                vars(layer).pop("forward", None)


def _rounded_product(layer: Linear4bit, x_BD: Tensor) -> Tensor:
    bias_O = None if layer.bias is None else _rounded(layer.bias)
    with torch.autocast(x_BD.device.type, enabled=False):
        y_BO = nn.functional.linear(_rounded(x_BD), _rounded(dequantized_weight(layer)), bias_O)
    return y_BO.bfloat16().to(x_BD.dtype)


def _rounded(tensor: Tensor) -> Tensor:
    """The float32 tensor of its values in bfloat16."""
    return tensor.bfloat16().float()


def _seconds_of_a_product(dtype: torch.dtype) -> float:
    rows, ins, outs = _PROBE_SHAPE
    x_BD, w_OD = torch.ones(rows, ins, dtype=dtype), torch.ones(outs, ins, dtype=dtype)
    return min(_seconds(lambda: nn.functional.linear(x_BD, w_OD)) for _ in range(_PROBE_REPEATS))


def _seconds(work: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s
