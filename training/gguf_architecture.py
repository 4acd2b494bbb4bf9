"""Owns how llama.cpp names, orders and configures what a model of transformers has. Knows no files.

Of each architecture here the logits were compared with llama.cpp's. A configuration with what llama.cpp does
not compute in the same way is refused, for a file that loads and answers otherwise is worse than none.

H heads, E half the width of a head, O out-features.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import gguf
import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from adapters.errors import UnsupportedBaseError

_ROPE_FACTORS: Final = "rope_freqs.weight"


@dataclass(frozen=True, slots=True)
class _Family:
    """Attributes:
    name: llama.cpp's.
    interleaves: whether its rotary positions turn neighbours, where transformers turns halves of a head.
    """

    name: str
    arch: Any
    interleaves: bool


_LLAMA: Final = _Family("llama", gguf.MODEL_ARCH.LLAMA, interleaves=True)
_FAMILIES: Final[Mapping[str, _Family]] = MappingProxyType(
    {
        "LlamaForCausalLM": _LLAMA,
        "MistralForCausalLM": _LLAMA,
        "Qwen2ForCausalLM": _Family("qwen2", gguf.MODEL_ARCH.QWEN2, interleaves=False),
        "Qwen3ForCausalLM": _Family("qwen3", gguf.MODEL_ARCH.QWEN3, interleaves=False),
    }
)


class GgufArchitecture:
    """One model's.

    Args:
        config: transformers' configuration.

    Raises:
        UnsupportedBaseError: llama.cpp does not compute it in the same way, or nobody has compared.
    """

    def __init__(self, config: Any) -> None:
        self._config = config
        name = next(iter(config.architectures or ()), None)
        if name is None or name not in _FAMILIES:
            raise UnsupportedBaseError(
                f"{name or 'a model without architectures in its config.json'} is not written as GGUF; "
                f"{', '.join(_FAMILIES)} are. llama.cpp's own convert_hf_to_gguf.py knows more"
            )
        self._family = _FAMILIES[name]
        self._names = gguf.get_tensor_name_map(self._family.arch, config.num_hidden_layers)
        self._head_dim: int = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        fault = next(self._faults(), None)
        if fault is not None:
            raise UnsupportedBaseError(f"{name} with {fault} is not written as GGUF")

    @property
    def name(self) -> str:
        """llama.cpp's."""
        return self._family.name

    def name_of(self, name: str) -> str:
        """Of a tensor or a module, llama.cpp's name.

        Raises:
            UnsupportedBaseError: it has none.
        """
        found: str | None = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UnsupportedBaseError(f"{name} has no place in a GGUF file of a {self.name}")
        return found

    def ordered(self, module: str, rows: Tensor) -> Tensor:
        """Out-features of a module in llama.cpp's order: queries and keys of [H, 2, E] become [H, E, 2].

        Args:
            rows: [O, …]: a weight, a bias, or the B of an update.
        """
        if not self._family.interleaves or not module.endswith(("q_proj", "k_proj")):
            return rows
        halves = rows.reshape(-1, 2, self._head_dim // 2, *rows.shape[1:])
        return halves.transpose(1, 2).reshape(rows.shape)

    def extra_tensors(self) -> dict[str, Tensor]:
        """What GGUF keeps and transformers computes: by how much each rotary frequency is divided."""
        rope = self._rope
        if rope["rope_type"] == "default":
            return {}
        scaled, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](self._config, torch.device("cpu"))
        steps = torch.arange(0, self._head_dim, 2, dtype=torch.float32) / self._head_dim
        return {_ROPE_FACTORS: 1 / rope["rope_theta"] ** steps / scaled}

    def write_parameters(self, writer: Any, vocab_size: int) -> None:
        """Adds the model's sizes and constants.

        Args:
            writer: a gguf.GGUFWriter.
        """
        config = self._config
        writer.add_vocab_size(vocab_size)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(self._head_dim)
        writer.add_value_length(self._head_dim)
        writer.add_rope_dimension_count(self._head_dim)
        writer.add_rope_freq_base(self._rope["rope_theta"])
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)

    @property
    def _rope(self) -> dict[str, Any]:
        return {"rope_type": "default", **self._config.rope_parameters}

    def _faults(self) -> Iterator[str]:
        config, rope = self._config, self._rope
        if rope["rope_type"] not in ("default", "llama3"):
            yield f"rotary positions of type {rope['rope_type']!r}"
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            yield "positions that turn a part of each head"
        layers = getattr(config, "layer_types", None)
        if "sliding_attention" in layers if layers else getattr(config, "sliding_window", None) is not None:
            yield "a sliding window of attention"
        if config.hidden_act != "silu":
            yield f"hidden_act {config.hidden_act!r}"
        if not self._family.interleaves and self._head_dim * config.num_attention_heads != config.hidden_size:
            yield "heads that are together not as wide as the model"
