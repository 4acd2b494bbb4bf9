"""Replaces a model's decoder layers by a native call, where that computes the same. Knows no requests.

Which modules a layer has says how it could be computed; whether it is so, one forward pass of both says.
Layers that are built otherwise, or whose results differ, stay transformers' own.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from adapters.layers import Routing
from adapters.native import NativeRMSNorm
from kernels.decoder_layer import DecoderLayers, LayerParts, LayerStep
from kernels.linear import PackedLinear
from kernels.paging import PagedRows
from kernels.structs import Activation, CacheRecord
from server.kv_cache import NativeStep
from server.probe import LayerProbe, LayerShape

log = logging.getLogger(__name__)

_PROBE_TOKENS = 5
_TOLERANCE = 1e-4
"""Of a layer's output, relative to its largest value: other orders of summation, nothing more."""


class FusedLayers(nn.Module):
    """Decoder layers as transformers calls one, computed by one native call. Changes its input in place."""

    def __init__(self, layers: Sequence["_Fused"], routing: Routing) -> None:
        super().__init__()
        self._native = DecoderLayers([layer.parts for layer in layers])
        self._routing = routing
        self._in_tuple = layers[0].call.in_tuple
        self._replaced = [layer.module for layer in layers]  # keeps weights alive; a list has no submodules
        if hasattr(layers[0].module, "attention_type"):  # some models choose the rotary table by it
            self.attention_type = layers[0].module.attention_type

    def __len__(self) -> int:
        """Decoder layers."""
        return len(self._replaced)

    def forward(
        self,
        hidden_states: Tensor,
        *_: object,
        position_embeddings: tuple[Tensor, Tensor],
        paged: NativeStep,
        **__: object,
    ) -> Tensor | tuple[Tensor]:
        """[1, T, D] → [1, T, D]."""
        x = hidden_states.contiguous()
        step = paged.shared.get(position_embeddings[0].data_ptr())
        if step is None:
            cosines, sines = (table.reshape(x.shape[-2], -1) for table in position_embeddings)
            step = LayerStep(x.shape[-2], paged.rows, self._routing.segments, cosines, sines)
            paged.shared[position_embeddings[0].data_ptr()] = step
        self._native(x, step)
        return (x,) if self._in_tuple else x


@dataclass(frozen=True, slots=True)
class _Call:
    """How transformers called a layer, and what came out."""

    hidden_states: Tensor
    keywords: dict[str, Any]
    output: Tensor
    in_tuple: bool

    @property
    def rotary_table(self) -> int:
        """What tells apart the tables of angles that layers were given."""
        return int(self.keywords["position_embeddings"][0].data_ptr())

    @property
    def rotary_width(self) -> int | None:
        """Dimensions of a head that are rotated; None if the layer was not given their angles."""
        angles = self.keywords.get("position_embeddings")
        return angles[0].shape[-1] if isinstance(angles, tuple) and len(angles) == 2 else None


@dataclass(frozen=True, slots=True)
class _Fused:
    """A layer of the model, how it was called, and what it is made of."""

    module: nn.Module
    call: _Call
    parts: LayerParts


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a layer stands in its model, and what was found out about it."""

    index: int
    probe: LayerProbe
    record: CacheRecord
    call: _Call


@dataclass(frozen=True, slots=True)
class NativeCaches:
    """The cache of each layer as native code sees it, and its blocks."""

    records: dict[int, CacheRecord]
    block_count: int
    block_tokens: int

    def probe_step(self, tokens: int) -> NativeStep:
        """A step of the first tokens of one sequence, in the first blocks."""
        blocks = -(-tokens // self.block_tokens)
        rows = PagedRows(range(tokens), [0] * tokens, [range(blocks)], self.block_tokens)
        return NativeStep(rows, self.records)


def fuse_layers(
    model: Any, probe: LayerProbe, caches: NativeCaches, routing: Routing
) -> Sequence["FusedLayers"]:
    """Replaces the model's decoder layers in place; all of them or none.

    Args:
        probe: what each layer's attention keeps and how it scores.
        caches: whose first blocks may be overwritten.

    Returns:
        What they were replaced by, a native call each; empty if by nothing.
    """
    name, layers = _decoder_layers(model, len(probe.shapes))
    calls = _recorded_calls(model, layers, caches)
    built = [
        _fused(layer, _Place(index, probe, caches.records[index], call), routing)
        for index, (layer, call) in enumerate(zip(layers, calls, strict=True))
    ]
    fused = [layer for layer in built if layer is not None]
    if not layers or len(fused) < len(layers):
        log.info("decoder layers of %s run module by module: they are built otherwise", type(model).__name__)
        return ()
    worst = max(difference for _, difference in fused)
    if not worst <= _TOLERANCE:
        log.warning(
            "decoder layers of %s run module by module: fused they differ by %.1e",
            type(model).__name__,
            worst,
        )
        return ()
    stretches = [FusedLayers(stretch, routing) for stretch in _stretches([layer for layer, _ in fused])]
    model.set_submodule(name, nn.ModuleList(stretches))
    log.info(
        "decoder layers fused count=%d calls=%d relative_difference=%.1e", len(fused), len(stretches), worst
    )
    return stretches


def _stretches(layers: Sequence[_Fused]) -> list[Sequence[_Fused]]:
    """Layers to be computed in one call: all, if they share their rotary tables.

    Otherwise each alone, since a model chooses the table of a layer by its place in the list.
    """
    tables = {layer.call.rotary_table for layer in layers}
    return [layers] if len(tables) == 1 else [[layer] for layer in layers]


def _decoder_layers(model: nn.Module, count: int) -> tuple[str, Sequence[nn.Module]]:
    """The list that holds one module with attention per layer."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and hasattr(module[0], "self_attn"):
            return name, list(module)
    return "", []


def _fused(layer: Any, place: _Place, routing: Routing) -> tuple[_Fused, float] | None:
    """The layer and how far it is from transformers' own; None if that has other parts.

    Some layers are given rotary angles and do not use them; which, their own result tells.
    """
    parts = _parts_of(layer, place)
    if parts is None:
        return None
    tried = []
    for form in (parts, replace(parts, rotary_width=0)):
        fused = _Fused(layer, place.call, form)
        tried.append((fused, _difference(FusedLayers([fused], routing), place.call)))
        if tried[-1][1] <= _TOLERANCE:
            return tried[-1]
    return tried[0]


def _parts_of(layer: Any, place: _Place) -> LayerParts | None:
    """What the layer is made of, None if those are not the parts of a decoder layer, in its sizes."""
    attention, mlp = layer.self_attn, getattr(layer, "mlp", None)
    qkv = _packed(attention, ("q_proj", "k_proj", "v_proj")) or _packed(attention, ("qkv_proj",))
    output = _packed(attention, ("o_proj",))
    gate_up = _packed(mlp, ("gate_proj", "up_proj")) or _packed(mlp, ("gate_up_proj",))
    down = _packed(mlp, ("down_proj",))
    activation = _activation_of(mlp)
    norms = _norms_of(layer)
    rotary_width = place.call.rotary_width
    if not (qkv and output and gate_up and down and norms and rotary_width) or activation is None:
        return None
    norms |= {"query_norm": _norm(attention, "q_norm"), "key_norm": _norm(attention, "k_norm")}
    epsilons = {norm.epsilon for norm in norms.values() if norm is not None}
    weights = {name: None if norm is None else norm.weight for name, norm in norms.items()}
    shape = place.probe.shapes[place.index]
    head_norms = [weights[name] for name in ("query_norm", "key_norm")]
    parts = LayerParts(
        qkv=qkv,
        output=output[0],
        gate_up=gate_up,
        down=down[0],
        **weights,
        norm_all_heads=any(weight is not None and len(weight) != shape.key_width for weight in head_norms),
        norm_epsilon=max(epsilons),
        residual_scale=getattr(layer, "residual_multiplier", 1.0),
        activation=activation,
        rule=place.probe.rules[place.index],
        heads=output[0].in_features // shape.value_width,
        rotary_width=rotary_width,
        cache=place.record,
    )
    return parts if len(epsilons) == 1 and _fits(parts, shape) else None


def _fits(parts: LayerParts, shape: LayerShape) -> bool:
    """Whether every part takes what the one before it gives: native code relies on it."""
    hidden, gated, head = parts.output.out_features, parts.down.in_features, shape.key_width
    of_hidden = (parts.input_norm, parts.attention_norm, parts.mlp_norm, parts.after_mlp_norm)
    normed = (parts.heads, shape.kv_heads) if parts.norm_all_heads else (1, 1)
    of_heads = zip((parts.query_norm, parts.key_norm), normed, strict=True)
    return (
        sum(part.out_features for part in parts.qkv) == parts.heads * head + shape.values_per_token
        and parts.output.in_features == parts.heads * shape.value_width
        and sum(part.out_features for part in parts.gate_up) == 2 * gated
        and parts.down.out_features == hidden
        and all(part.in_features == hidden for part in (*parts.qkv, *parts.gate_up))
        and all(weight is None or len(weight) == hidden for weight in of_hidden)
        and all(weight is None or len(weight) == heads * head for weight, heads in of_heads)
        and parts.rotary_width % 2 == 0
        and parts.rotary_width <= head
    )


def _packed(parent: Any, names: tuple[str, ...]) -> list[PackedLinear]:
    """The native weights of some children; empty if any has none."""
    found = [getattr(getattr(parent, name, None), "packed", None) for name in names]
    return [packed for packed in found if packed is not None] if all(found) else []


def _norm(parent: Any, name: str) -> NativeRMSNorm | None:
    norm = getattr(parent, name, None)
    return norm if isinstance(norm, NativeRMSNorm) else None


_NORM_PLACES = (
    {"input_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    {"attention_norm": "post_attention_layernorm", "after_mlp_norm": "post_feedforward_layernorm"},
    {
        "input_norm": "input_layernorm",
        "attention_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "after_mlp_norm": "post_feedforward_layernorm",
    },
)
"""Norms by place: before attention and activation (most), after both (OLMo 2), around both (Gemma 2)."""


def _norms_of(layer: nn.Module) -> dict[str, NativeRMSNorm | None]:
    """A layer's norms by their place; empty if they are others, or any of them has no native form."""
    names = {name for name, _ in layer.named_children() if name.endswith("norm")}
    for places in _NORM_PLACES:
        norms = {place: _norm(layer, name) for place, name in places.items()}
        if set(places.values()) == names and all(norms.values()):
            return dict.fromkeys(_NORM_PLACES[-1]) | norms
    return {}


def _activation_of(mlp: Any) -> Activation | None:
    function = getattr(mlp, "act_fn", getattr(mlp, "activation_fn", None))
    if isinstance(function, nn.SiLU | type(ACT2FN["silu"])):
        return Activation.SILU
    return Activation.GELU_TANH if isinstance(function, type(ACT2FN["gelu_pytorch_tanh"])) else None


def _recorded_calls(model: nn.Module, layers: Sequence[nn.Module], caches: NativeCaches) -> list[_Call]:
    """Runs a few tokens through the model, module by module, and records each layer's input and output.

    They stand where the model's positions end: what a layer does from some position on would not show before.
    """
    calls: list[_Call] = []

    def record(_: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        hidden = args[0] if args else keywords["hidden_states"]
        first = output[0] if isinstance(output, tuple) else output
        kept = {name: value for name, value in keywords.items() if name != "hidden_states"}
        calls.append(_Call(hidden.clone(), kept, first.clone(), isinstance(output, tuple)))

    hooks = [layer.register_forward_hook(record, with_kwargs=True) for layer in layers]
    count = min(_PROBE_TOKENS, caches.block_count * caches.block_tokens)
    ids = torch.arange(count)[None]
    positions = ids + max(0, (getattr(model.config, "max_position_embeddings", None) or 0) - count)
    step = caches.probe_step(count)
    try:
        with torch.inference_mode():
            model(input_ids=ids, position_ids=positions, use_cache=False, paged=step)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _difference(layer: FusedLayers, call: _Call) -> float:
    """Largest difference to what transformers' layer made, relative to its largest value."""
    with torch.inference_mode():
        output = layer(call.hidden_states.clone(), **call.keywords)
    found = output[0] if isinstance(output, tuple) else output
    return float((found - call.output).abs().max() / call.output.abs().max())
