"""Decoder layers that follow each other, in one native call. Knows shapes and pointers, not transformers.

T tokens, D hidden features, R rotated dimensions of a head.

The call computes what each layer's parts do one by one, in the same order on the same rows: norm, q/k/v,
rotary, keys and values into the cache, attention, output projection, norm, residual, norm, gate and up,
activation, down, norm, residual; each norm only where there is one.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.library import native
from kernels.linear import PackedLinear
from kernels.lora import Segments
from kernels.paged_attention import AttentionRule
from kernels.paging import PagedRows, rule_record
from kernels.structs import Activation, CacheRecord, LayerRecord, Linear, StepRecord


@dataclass(frozen=True, slots=True)
class LayerParts:
    """What a decoder layer is made of.

    Attributes:
        qkv: the projections for queries, keys and values; or one that computes all three side by side.
        gate_up: those of the gated activation, or one for both.
        input_norm, mlp_norm: [D], before attention and before the activation.
        attention_norm, after_mlp_norm: [D], of what is added to the residual.
        query_norm, key_norm: before rotary; per head, or with norm_all_heads over all heads together.
        residual_scale: factor of what is added to the residual.
        heads: query heads.
        rotary_width: R; 0 if positions are not rotated.
    """

    qkv: Sequence[PackedLinear]
    output: PackedLinear
    gate_up: Sequence[PackedLinear]
    down: PackedLinear
    input_norm: Tensor | None
    mlp_norm: Tensor | None
    attention_norm: Tensor | None
    after_mlp_norm: Tensor | None
    query_norm: Tensor | None
    key_norm: Tensor | None
    norm_all_heads: bool
    norm_epsilon: float
    residual_scale: float
    activation: Activation
    rule: AttentionRule
    heads: int
    rotary_width: int
    cache: CacheRecord


class LayerStep:
    """What all layers of one step share; made once per step and pair of rotary tables."""

    def __init__(
        self, rows: int, paging: PagedRows, segments: Segments, cosines_TR: Tensor, sines_TR: Tensor
    ) -> None:
        """
        Args:
            cosines_TR, sines_TR: rotary angles of each token.
        """
        cosines, sines = cosines_TR.float().contiguous(), sines_TR.float().contiguous()
        # What was given stays alive, too: steps are told apart by its address.
        self._kept = cosines_TR, sines_TR, cosines, sines, paging, segments
        self.record = StepRecord(
            segments.address, len(segments), cosines.data_ptr(), sines.data_ptr(), paging.record, rows,
            torch.get_num_threads(),
        )  # fmt: skip


class DecoderLayers:
    """The native form of layers that follow each other and share their rotary tables."""

    def __init__(self, layers: Sequence[LayerParts]) -> None:
        library = native()
        assert library is not None, "made only where the library is"
        self._forward = library.functions.qc_layers_forward
        self._kept = layers, [_layer_record(parts) for parts in layers]
        self._records = (ctypes.POINTER(LayerRecord) * len(layers))(*map(ctypes.pointer, self._kept[1]))

    def __call__(self, x_TD: Tensor, step: LayerStep) -> None:
        """Turns x, contiguous float32, into the last layer's output, in place."""
        self._forward(self._records, len(self._records), step.record, x_TD.data_ptr())


def _layer_record(parts: LayerParts) -> LayerRecord:
    def address(tensor: Tensor | None) -> int | None:
        return None if tensor is None else tensor.data_ptr()

    def pointers(linears: Sequence[PackedLinear], room: int) -> "ctypes.Array[ctypes._Pointer[Linear]]":
        return (ctypes.POINTER(Linear) * room)(*(ctypes.pointer(linear.record) for linear in linears))

    return LayerRecord(
        pointers(parts.qkv, 3),
        ctypes.pointer(parts.output.record),
        pointers(parts.gate_up, 2),
        ctypes.pointer(parts.down.record),
        address(parts.input_norm),
        address(parts.attention_norm),
        address(parts.mlp_norm),
        address(parts.after_mlp_norm),
        address(parts.query_norm),
        address(parts.key_norm),
        ctypes.pointer(parts.cache),
        rule_record(parts.rule, parts.heads),
        parts.norm_epsilon,
        parts.residual_scale,
        len(parts.qkv),
        len(parts.gate_up),
        parts.output.out_features,
        parts.down.in_features,
        parts.rotary_width,
        parts.activation,
        parts.norm_all_heads,
    )
