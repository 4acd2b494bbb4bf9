"""Folds into a plain model what no server applies: DoRA, IA³ and biases. Knows no server.

The folder may be a stranger's. Its configuration is read by name and a fresh one made of it; its tensors come
from safetensors alone. PEFT then does the arithmetic, in float32.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from peft import IA3Config, LoraConfig, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from adapters.base import Base
from adapters.errors import InvalidAdapterError
from adapters.files import CONFIG_FILE, WEIGHTS_FILE, read_bounded
from adapters.spec import MAX_CONFIG_BYTES, parse_spec
from adapters.strict_json import parse_object
from training.model_folder import untie
from training.peft_configs import wrapped

_IA3_NAMES: Final = ("target_modules", "feedforward_modules")


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
    raw = read_bounded(folder / CONFIG_FILE, MAX_CONFIG_BYTES)
    config = parse_object(raw, source=CONFIG_FILE, max_bytes=MAX_CONFIG_BYTES)
    if config.get("peft_type") == "BITFIT":
        return _folded(folder, _put_in(base, _tensors(folder)))
    peft = _ia3(config) if config.get("peft_type") == "IA3" else _dora(config)
    return None if peft is None else _folded(folder, _fold(base, peft, _tensors(folder)))


def _ia3(config: Mapping[str, Any]) -> IA3Config:
    names = {field: config.get(field) for field in _IA3_NAMES}
    for field, value in names.items():
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise InvalidAdapterError(
                f"{field} in {CONFIG_FILE} must be a list of names", reason="BAD_CONFIG"
            )
    return IA3Config(**names, task_type="CAUSAL_LM")


def _dora(config: Mapping[str, Any]) -> LoraConfig | None:
    """DoRA is LoRA in every other field, which is checked as a server would."""
    if config.get("peft_type") != "LORA" or config.get("use_dora") is not True:
        return None
    spec = parse_spec(json.dumps({**config, "use_dora": False}).encode())
    return LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        use_rslora=spec.method == "rslora",
        use_dora=True,
        target_modules=_plain(spec.target_modules),
        exclude_modules=_plain(spec.exclude_modules),
        rank_pattern=dict(spec.rank_pattern),
        alpha_pattern=dict(spec.alpha_pattern),
        layers_to_transform=_plain(spec.layers_to_transform),
        layers_pattern=_plain(spec.layers_pattern),
        task_type="CAUSAL_LM",
    )


def _plain(names: Any) -> Any:
    return list(names) if isinstance(names, tuple) else names


@torch.no_grad()
def _fold(base: Base, config: Any, tensors: Mapping[str, Tensor]) -> list[float]:
    adapted = wrapped(base.model, config)
    _load(adapted, tensors)
    head = base.model.get_output_embeddings()
    if _is_tuned(head):
        untie(base.model, head.get_base_layer())
    layers = [module for module in adapted.modules() if hasattr(module, "merge") and _is_tuned(module)]
    squares = [_merged(layer) for layer in layers]
    adapted.unload()
    return squares


def _is_tuned(module: Any) -> bool:
    return isinstance(module, BaseTunerLayer)


def _load(adapted: Any, tensors: Mapping[str, Tensor]) -> None:
    """All tensors that the configuration calls for, and no others."""
    expected = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    try:
        loaded = set_peft_model_state_dict(adapted, dict(tensors))
    except RuntimeError as error:
        raise InvalidAdapterError(
            f"{WEIGHTS_FILE} does not fit this base: {error}", reason="SHAPE_MISMATCH"
        ) from None
    missing = sorted(expected.intersection(loaded.missing_keys))
    if missing:
        raise InvalidAdapterError(f"{WEIGHTS_FILE} lacks {missing[0]}", reason="MISSING_TENSOR")
    if loaded.unexpected_keys:
        name = min(loaded.unexpected_keys)
        raise InvalidAdapterError(f"{name} in {WEIGHTS_FILE} is not called for", reason="UNKNOWN_TENSOR")


def _merged(layer: Any) -> float:
    """Merges a layer; the square of its change's norm."""
    before = layer.get_base_layer().weight.detach().clone()
    layer.merge()
    return _square(layer.get_base_layer().weight.detach() - before)


@torch.no_grad()
def _put_in(base: Base, tensors: Mapping[str, Tensor]) -> list[float]:
    biases = {name: p for name, p in base.model.named_parameters() if name.endswith(".bias")}
    for name, tensor in tensors.items():
        if name not in biases or biases[name].shape != tensor.shape:
            raise InvalidAdapterError(
                f"{name} in {WEIGHTS_FILE} is no bias of this base", reason="UNKNOWN_TENSOR"
            )
    squares = [_square(tensor.float() - biases[name]) for name, tensor in tensors.items()]
    for name, tensor in tensors.items():
        biases[name].copy_(tensor)
    return squares


def _square(change: Tensor) -> float:
    return float(change.double().square().sum())


def _tensors(folder: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise InvalidAdapterError(
            f"{folder / WEIGHTS_FILE} cannot be read ({error})", reason="BAD_HEADER"
        ) from error
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise InvalidAdapterError(f"{name} in {WEIGHTS_FILE} has NaN or infinity", reason="NOT_FINITE")
    return tensors


def _folded(folder: Path, squares: list[float]) -> Folded:
    content = hashlib.sha256()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        content.update((folder / name).read_bytes())
    return Folded(f"sha256:{content.hexdigest()}", len(squares), math.sqrt(sum(squares)))
