"""Reads adapter folders that no server applies: DoRA, IA³, biases, prefixes, prompts. Knows no server.

The folder may be a stranger's. Its configuration is read by name and a fresh one made of it; its tensors come
from safetensors alone.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from adapters.base import Base
from adapters.errors import InvalidAdapterError, UnsupportedAdapterError
from adapters.files import CONFIG_FILE, WEIGHTS_FILE, read_bounded
from adapters.kinds import MAX_VIRTUAL_TOKENS
from adapters.spec import MAX_CONFIG_BYTES, parse_spec
from adapters.strict_json import brief, parse_object

Kind = Literal["dora", "ia3", "biases", "prefix", "prompt"]

_TASK: Final = "CAUSAL_LM"
_IA3_NAMES: Final = ("target_modules", "feedforward_modules")
_VECTORS: Final = "prompt_embeddings"  # as PEFT saves what prefix and prompt tuning learn
_BY_TYPE: Final[Mapping[object, Kind]] = MappingProxyType(
    {"IA3": "ia3", "BITFIT": "biases", "PREFIX_TUNING": "prefix", "PROMPT_TUNING": "prompt"}
)


@dataclass(frozen=True, slots=True)
class UnservedFolder:
    """What is in one.

    Attributes:
        peft: a configuration made anew; None for biases, of which PEFT knows nothing.
        tensors: every one of them finite, by its name in the file.
    """

    kind: Kind
    peft: Any
    tensors: Mapping[str, Tensor]

    @property
    def is_prompt_learning(self) -> bool:
        """Whether it learned vectors that precede the prompt, and changes no module."""
        return self.kind in ("prefix", "prompt")


def unserved_kind(folder: Path) -> Kind | None:
    """Of the folder's adapter; None if it is of another kind, which servers apply or nobody here knows.

    Raises:
        InvalidAdapterError: its configuration is missing or malformed.
    """
    return _kind(_config(folder))


def read_unserved(folder: Path) -> UnservedFolder | None:
    """The folder's adapter; None as of `unserved_kind`.

    Raises:
        InvalidAdapterError, UnsupportedAdapterError: it is of such a kind, and malformed.
    """
    config = _config(folder)
    kind = _kind(config)
    return None if kind is None else UnservedFolder(kind, _PEFT[kind](config), _tensors(folder))


def load_modules(adapted: Any, tensors: Mapping[str, Tensor]) -> None:
    """Fills PEFT's modules with all tensors that the configuration calls for, and no others.

    Raises:
        InvalidAdapterError: one is missing, superfluous or of another shape.
    """
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


@torch.no_grad()
def load_vectors(adapted: Any, tensors: Mapping[str, Tensor]) -> None:
    """Fills the learned vectors of PEFT's prefix or prompt tuning; errors as `load_modules`."""
    weight = adapted.prompt_encoder[adapted.active_adapter].embedding.weight
    if set(tensors) != {_VECTORS}:
        raise InvalidAdapterError(
            f"{WEIGHTS_FILE} has {', '.join(sorted(tensors)) or 'nothing'}, must have {_VECTORS} alone",
            reason="UNKNOWN_TENSOR" if tensors else "MISSING_TENSOR",
        )
    if tensors[_VECTORS].shape != weight.shape:
        raise InvalidAdapterError(
            f"{WEIGHTS_FILE} does not fit this base: {_VECTORS} is {tuple(tensors[_VECTORS].shape)}, "
            f"must be {tuple(weight.shape)}",
            reason="SHAPE_MISMATCH",
        )
    weight.copy_(tensors[_VECTORS])


def biases_to_change(base: Base, tensors: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """The base's parameters of those names.

    Raises:
        InvalidAdapterError: one is no bias of the base, or of another shape.
    """
    biases = {name: p for name, p in base.model.named_parameters() if name.endswith(".bias")}
    for name, tensor in tensors.items():
        if name not in biases or biases[name].shape != tensor.shape:
            raise InvalidAdapterError(
                f"{name} in {WEIGHTS_FILE} is no bias of this base", reason="UNKNOWN_TENSOR"
            )
    return {name: biases[name] for name in tensors}


def _config(folder: Path) -> Mapping[str, Any]:
    raw = read_bounded(folder / CONFIG_FILE, MAX_CONFIG_BYTES)
    return parse_object(raw, source=CONFIG_FILE, max_bytes=MAX_CONFIG_BYTES)


def _kind(config: Mapping[str, Any]) -> Kind | None:
    peft_type = config.get("peft_type")
    if peft_type == "LORA":
        return "dora" if config.get("use_dora") is True else None
    return _BY_TYPE.get(peft_type) if isinstance(peft_type, str) else None


def _dora(config: Mapping[str, Any]) -> LoraConfig:
    """DoRA is LoRA in every other field, which is checked as a server would."""
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
        task_type=_TASK,
    )


def _plain(names: Any) -> Any:
    return list(names) if isinstance(names, tuple) else names


def _ia3(config: Mapping[str, Any]) -> IA3Config:
    names = {field: config.get(field) for field in _IA3_NAMES}
    for field, value in names.items():
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise InvalidAdapterError(
                f"{field} in {CONFIG_FILE} must be a list of names", reason="BAD_CONFIG"
            )
    return IA3Config(**names, task_type=_TASK)


def _prefix(config: Mapping[str, Any]) -> PrefixTuningConfig:
    if config.get("prefix_projection"):
        raise UnsupportedAdapterError(
            "prefix_projection is on: a network makes this prefix; retrain without it",
            feature="prefix_projection",
        )
    return PrefixTuningConfig(num_virtual_tokens=_virtual_tokens(config), task_type=_TASK)


def _prompt(config: Mapping[str, Any]) -> PromptTuningConfig:
    return PromptTuningConfig(num_virtual_tokens=_virtual_tokens(config), task_type=_TASK)


def _virtual_tokens(config: Mapping[str, Any]) -> int:
    count = config.get("num_virtual_tokens")
    if type(count) is not int or not 1 <= count <= MAX_VIRTUAL_TOKENS:
        raise InvalidAdapterError(
            f"num_virtual_tokens in {CONFIG_FILE} is {brief(count)}, must be 1 to {MAX_VIRTUAL_TOKENS}",
            reason="BAD_CONFIG",
        )
    return count


_PEFT: Final[Mapping[Kind, Callable[[Mapping[str, Any]], Any]]] = MappingProxyType(
    {"dora": _dora, "ia3": _ia3, "biases": lambda _: None, "prefix": _prefix, "prompt": _prompt}
)


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
