"""Owns a base's shape as its config.json tells it: modules, widths, parameters. Reads no weights.

H hidden width, A width of all queries, K width of all keys, I inner width of the MLP, V vocabulary.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from adapters.errors import BaseNotFoundError, UnsupportedBaseError
from adapters.layout import BaseLayout, ModuleShape

Reads = Literal["attention input", "attention output", "mlp input", "mlp product"]
"""The activation that a linear module multiplies; modules that read the same one share what is kept of it."""


@dataclass(frozen=True, slots=True)
class LinearModule:
    """One linear module of every layer; a mixture of experts has `copies` of it."""

    name: str
    in_features: int
    out_features: int
    reads: Reads
    copies: int = 1

    @property
    def parameters(self) -> int:
        return self.copies * self.in_features * self.out_features


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A decoder's widths.

    Attributes:
        name: what people call the model.
        gated: whether the MLP multiplies two projections (Llama) or has one (GPT-2).
        tied: whether the output head is the embedding.
        experts: of each layer's MLP; 1 without a mixture.
        active_experts: that a token goes through.
        biased: names of the linear modules that have a bias.
        max_positions: the longest context; None if the configuration states none.
    """

    name: str
    model_type: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_width: int
    inner: int
    vocabulary: int
    gated: bool = True
    tied: bool = False
    experts: int = 1
    active_experts: int = 1
    biased: tuple[str, ...] = ()
    max_positions: int | None = None

    @property
    def query_width(self) -> int:
        """A."""
        return self.heads * self.head_width

    @property
    def key_width(self) -> int:
        """K."""
        return self.kv_heads * self.head_width

    @property
    def modules(self) -> tuple[LinearModule, ...]:
        """The linear modules of one layer, without the router of a mixture."""
        return (*self._attention_modules(), *self._mlp_modules())

    @property
    def linear_parameters(self) -> int:
        """Of all layers: what quantisation shrinks. The output head is none of them."""
        return self.layers * sum(module.parameters for module in self.modules)

    @property
    def table_parameters(self) -> int:
        """Of embedding and output head, V·H or twice that."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def norm_parameters(self) -> int:
        """Two norms a layer and one at the end, and the routers of a mixture."""
        routers = self.layers * self.hidden * self.experts if self.experts > 1 else 0
        return (2 * self.layers + 1) * self.hidden + routers

    @property
    def parameters(self) -> int:
        return self.linear_parameters + self.table_parameters + self.norm_parameters

    @property
    def active_linear_parameters(self) -> int:
        """Linear parameters that one token is multiplied with."""
        inactive = self.experts - self.active_experts
        return self.linear_parameters - self.layers * inactive * sum(
            module.in_features * module.out_features for module in self._mlp_modules()
        )

    @property
    def bias_values(self) -> int:
        """What BitFit trains; most families have none."""
        biased = [module for module in self.modules if module.name.rpartition(".")[2] in self.biased]
        norms = (2 * self.layers + 1) * self.hidden if self.model_type in _BIASED_NORMS else 0
        return self.layers * sum(module.copies * module.out_features for module in biased) + norms

    @property
    def block_layout(self) -> BaseLayout:
        """One block's linear modules and the output head, named as in the model."""
        modules = {f"{_BLOCK}.{m.name}": ModuleShape(m.in_features, m.out_features) for m in self.modules}
        head = {"lm_head": ModuleShape(self.hidden, self.vocabulary)}
        return BaseLayout(modules=modules | head, head="lm_head", fingerprint="")

    def targeted(self, targets: tuple[str, ...]) -> tuple[LinearModule, ...]:
        """The modules of a layer of these names, such as "self_attn.q_proj"."""
        return tuple(module for module in self.modules if module.name in targets)

    def _attention_modules(self) -> tuple[LinearModule, ...]:
        h, a, k = self.hidden, self.query_width, self.key_width
        names = _FUSED_ATTENTION.get(self.model_type)
        if names is not None:
            fused, out = names
            return (
                LinearModule(fused, h, a + 2 * k, "attention input"),
                LinearModule(out, a, h, "attention output"),
            )
        return (
            LinearModule("self_attn.q_proj", h, a, "attention input"),
            LinearModule("self_attn.k_proj", h, k, "attention input"),
            LinearModule("self_attn.v_proj", h, k, "attention input"),
            LinearModule("self_attn.o_proj", a, h, "attention output"),
        )

    def _mlp_modules(self) -> tuple[LinearModule, ...]:
        h, i, n = self.hidden, self.inner, self.experts
        if self.model_type in _FUSED_GATE:
            return (
                LinearModule("mlp.gate_up_proj", h, 2 * i, "mlp input", n),
                LinearModule("mlp.down_proj", i, h, "mlp product", n),
            )
        if self.gated:
            return (
                LinearModule("mlp.gate_proj", h, i, "mlp input", n),
                LinearModule("mlp.up_proj", h, i, "mlp input", n),
                LinearModule("mlp.down_proj", i, h, "mlp product", n),
            )
        up, down = _PLAIN_MLP[self.model_type]
        return (
            LinearModule(up, h, i, "mlp input", n),
            LinearModule(down, i, h, "mlp product", n),
        )


_FUSED_ATTENTION: Final[Mapping[str, tuple[str, str]]] = {
    "phi3": ("self_attn.qkv_proj", "self_attn.o_proj"),
    "gpt_neox": ("attention.query_key_value", "attention.dense"),
    "gpt2": ("attn.c_attn", "attn.c_proj"),
}
_FUSED_GATE: Final = ("phi3", "glm")
_PLAIN_MLP: Final[Mapping[str, tuple[str, str]]] = {
    "gpt2": ("mlp.c_fc", "mlp.c_proj"),
    "gpt_neox": ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "opt": ("fc1", "fc2"),
    "phi": ("mlp.fc1", "mlp.fc2"),
    "starcoder2": ("mlp.c_fc", "mlp.c_proj"),
}
_BLOCK: Final = "model.layers.0"
_QKV: Final = ("q_proj", "k_proj", "v_proj")
_BIASED_NORMS: Final = ("gpt2", "gpt_neox", "opt", "phi", "starcoder2")
_TIED_UNLESS_SAID: Final = ("gpt2", "opt", "gemma", "gemma2", "gemma3_text", "cohere", "starcoder2")
"""transformers' defaults, where a configuration says nothing; the other families' is no."""
_NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "layers": ("num_hidden_layers", "n_layer"),
    "hidden": ("hidden_size", "n_embd"),
    "heads": ("num_attention_heads", "n_head"),
    "vocabulary": ("vocab_size",),
}
"""What a width is called in a config.json; the second name is GPT-2's."""
_INNER: Final = ("intermediate_size", "n_inner", "ffn_dim")
_POSITIONS: Final = ("max_position_embeddings", "n_positions")


def read_shape(folder: Path, name: str) -> ModelShape:
    """The shape that a model folder's config.json states.

    Raises:
        BaseNotFoundError: there is no readable config.json.
        UnsupportedBaseError: it states no decoder's widths.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise BaseNotFoundError(
            f"{folder} has no readable config.json ({error.strerror}); give a model folder"
        ) from None
    except ValueError as error:
        raise BaseNotFoundError(f"{folder / 'config.json'} is not JSON ({error})") from None
    if not isinstance(config, dict):
        raise BaseNotFoundError(f"{folder / 'config.json'} holds no JSON object; give a model folder")
    return shape_of(config, name)


def shape_of(config: Mapping[str, Any], name: str) -> ModelShape:
    """The shape that the members of a config.json state."""
    widths = {field: _width(config, names, name) for field, names in _NAMES.items()}
    model_type = str(config.get("model_type", "unknown"))
    experts = int(config.get("num_local_experts") or config.get("num_experts") or 1)
    heads, hidden = widths["heads"], widths["hidden"]
    return ModelShape(
        name=name,
        model_type=model_type,
        **widths,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_width=int(config.get("head_dim") or hidden // heads),
        inner=_first(config, _INNER) or 4 * hidden,
        gated=model_type not in _PLAIN_MLP,
        tied=bool(config.get("tie_word_embeddings", model_type in _TIED_UNLESS_SAID)),
        biased=_biased(config, model_type),
        experts=experts,
        active_experts=int(config.get("num_experts_per_tok") or 1),
        max_positions=_first(config, _POSITIONS),
    )


def _biased(config: Mapping[str, Any], model_type: str) -> tuple[str, ...]:
    """By the families' defaults, and by the two switches that many of them have."""
    if model_type in _BIASED_NORMS:
        attention = _FUSED_ATTENTION.get(model_type, (*_QKV, "o_proj", "dense", "out_proj"))
        return tuple(name.rpartition(".")[2] for name in (*attention, *_PLAIN_MLP[model_type]))
    found: tuple[str, ...] = _QKV if model_type == "qwen2" else ()
    if config.get("attention_bias"):
        found = (*_QKV, "o_proj")
    return (*found, "gate_proj", "up_proj", "down_proj") if config.get("mlp_bias") else found


def _width(config: Mapping[str, Any], names: tuple[str, ...], name: str) -> int:
    found = _first(config, names)
    if found is None:
        raise UnsupportedBaseError(
            f"the config.json of {name} states no {names[0]}; only decoders of the Llama and GPT kind are "
            "planned for"
        )
    return found


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    found = next((config[name] for name in names if config.get(name) is not None), None)
    return found if isinstance(found, int) and found > 0 else None
