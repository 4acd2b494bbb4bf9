"""Folds into a plain model what no server applies: DoRA, IA³ and biases. Knows no server.

What such a folder may hold adapters/unserved_folder.py checks. PEFT then does the arithmetic, in float32.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from adapters.base import Base
from adapters.files import CONFIG_FILE, WEIGHTS_FILE
from adapters.model_folder import untie
from adapters.unserved_folder import biases_to_change, load_modules, read_unserved, unserved_kind
from adapters.wrapping import wrapped


@dataclass(frozen=True, slots=True)
class Folded:
    """What was done to a model.

    Attributes:
        modules: how many changed.
        delta_norm: Frobenius norm of the whole change.
    """

    digest: str
    modules: int
    delta_norm: float


def fold_unserved(base: Base, folder: Path) -> Folded | None:
    """Folds the adapter into base.model, in place; None if it is of a kind that this module does not know.

    Args:
        base: dequantised, its model in transformers' own float32 layers.

    Raises:
        InvalidAdapterError, UnsupportedAdapterError: it is of such a kind, and malformed.
    """
    if unserved_kind(folder) in ("prefix", "prompt"):  # there is no weight to fold them into
        return None
    adapter = read_unserved(folder)
    if adapter is None:
        return None
    if adapter.kind == "biases":
        return _folded(folder, _put_in(base, adapter.tensors))
    return _folded(folder, _fold(base, adapter.peft, adapter.tensors))


def unserved_digest(folder: Path) -> str:
    """ "sha256:…" over the bytes of such a folder's two files."""
    content = hashlib.sha256()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        content.update((folder / name).read_bytes())
    return f"sha256:{content.hexdigest()}"


@torch.no_grad()
def _fold(base: Base, config: Any, tensors: Mapping[str, Tensor]) -> list[float]:
    adapted = wrapped(base.model, config)
    load_modules(adapted, tensors)
    head = base.model.get_output_embeddings()
    if _is_tuned(head):
        untie(base.model, head.get_base_layer())
    layers = [module for module in adapted.modules() if hasattr(module, "merge") and _is_tuned(module)]
    squares = [_merged(layer) for layer in layers]
    adapted.unload()
    return squares


def _is_tuned(module: Any) -> bool:
    return isinstance(module, BaseTunerLayer)


def _merged(layer: Any) -> float:
    """Merges a layer; the square of its change's norm."""
    before = layer.get_base_layer().weight.detach().clone()
    layer.merge()
    return _square(layer.get_base_layer().weight.detach() - before)


@torch.no_grad()
def _put_in(base: Base, tensors: Mapping[str, Tensor]) -> list[float]:
    biases = biases_to_change(base, tensors)
    squares = [_square(tensor.float() - biases[name]) for name, tensor in tensors.items()]
    for name, tensor in tensors.items():
        biases[name].copy_(tensor)
    return squares


def _square(change: Tensor) -> float:
    return float(change.double().square().sum())


def _folded(folder: Path, squares: list[float]) -> Folded:
    return Folded(unserved_digest(folder), len(squares), math.sqrt(sum(squares)))
