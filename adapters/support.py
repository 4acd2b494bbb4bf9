"""Owns the question whether a base can be served at all, by inspecting its class and modules. Knows no names.

What serving needs of a model: causal self-attention that transformers lets us replace, keys and values per
position as its only memory, explicit positions, and every large weight in a linear module.
"""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from adapters.errors import UnsupportedBaseError
from adapters.fingerprint import read_config

_REMEDY = "docs/guides/models.md lists what can be"
_SERVED_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
# transformers recomputes these frequencies from the longest sequence of the batch: a request would change its
# neighbours' answers.
_ROPE_BY_LENGTH = frozenset({"dynamic", "longrope"})


def supported_config(folder: Path) -> Any:
    """The configuration of a model folder whose architecture can be served.

    Raises:
        UnsupportedBaseError: it cannot; the message says why.
        BaseNotFoundError: there is no readable config.json.
    """
    config = _load_config(folder)
    reason = next(_config_faults(config), None) or next(_model_faults(config), None)
    if reason:
        raise UnsupportedBaseError(
            f"{folder.name} ({config.model_type}) cannot be served: {reason}; {_REMEDY}"
        )
    return config


def _load_config(folder: Path) -> Any:
    raw = read_config(folder)
    if "quantization_config" in raw:
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise UnsupportedBaseError(
            f"{folder.name} is already quantised ({method}); give its 16-bit or 32-bit original"
        )
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many types for a configuration it cannot read
        raise UnsupportedBaseError(
            f"{folder.name} (model_type {raw.get('model_type')!r}) is not an architecture of this "
            f"transformers version, and code from a model folder is never run: {_first_line(error)}"
        ) from error


def _config_faults(config: Any) -> Iterator[str]:
    """Reasons that the configuration alone shows."""
    if config.is_encoder_decoder:
        yield "it is an encoder-decoder; give a decoder-only model"
    if config.get_text_config() is not config:
        yield "it is multimodal; give the text model alone"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        yield "it is no causal language model; give one that answers"
    other_layers = set(getattr(config, "layer_types", None) or ()) - _SERVED_LAYER_TYPES
    if other_layers:
        yield (
            f"some of its layers attend neither to the whole past nor to a sliding window "
            f"({', '.join(sorted(other_layers))})"
        )
    by_length = _rope_types(config) & _ROPE_BY_LENGTH
    if by_length:
        yield (
            f"its rotary positions ({', '.join(by_length)}) depend on the longest sequence of a batch; give "
            "its variant for short contexts, or a fixed rope_type in config.json"
        )


def _rope_types(config: Any) -> set[str]:
    """Kinds of rotary positions; a configuration has one for all layers, or one for each type of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    return {entry.get("rope_type", "default") for entry in [rope, *rope.values()] if isinstance(entry, dict)}


def _model_faults(config: Any) -> Iterator[str]:
    """Reasons that the class and an empty model show; no weights are made."""
    mapped = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model_class = mapped[0] if isinstance(mapped, tuple) else mapped
    if model_class._is_stateful:
        yield "it keeps a recurrent state instead of keys and values"
    if not model_class._supports_attention_backend:
        yield "its attention cannot be replaced through transformers' AttentionInterface"
    if "position_ids" not in inspect.signature(model_class.forward).parameters:
        yield "it takes no explicit positions"
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever a model's code makes of a configuration it does not expect
        yield f"no model can be made of its configuration: {_first_line(error)}"
    else:
        yield from _module_faults(model)


def _module_faults(model: Any) -> Iterator[str]:
    if any(getattr(owner, "is_causal", True) is False for owner in (model.config, *model.modules())):
        yield "its attention looks ahead; give a model that was trained to continue text"
    if not isinstance(model.get_output_embeddings(), nn.Linear):
        yield "its output head is not a linear layer"
    fused = next((name for name, parameter in model.named_parameters() if parameter.ndim > 2), None)
    if fused is not None:
        yield (
            f"{fused} is a fused or convolutional weight, which NF4 and adapters do not reach; give a dense "
            "model instead of a mixture of experts"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
