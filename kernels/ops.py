"""The native operations as torch operators, `torch.ops.quickchange.*`, with their shapes for fake tensors.

For graphs (torch.compile, export) and other people's models. The serving path calls the same functions
without torch's dispatcher, which costs as much as a small product. Without the native library each operator
computes its reference.

B rows, D in-features, O out-features, R rank, T tokens, H heads, K key/value heads, E head dimension.
"""

import torch
from torch import Tensor
from torch.library import custom_op

from kernels import rowwise
from kernels.library import native
from kernels.linear import PackedLinear, linear_reference, unpacked_weight
from kernels.lora import LoraFactors, Segment, Segments, add_lora_delta
from kernels.paged_attention import AttentionPlan, AttentionRule, LayerCache, PrefillSegment, paged_attention
from kernels.paging import PagedRows, cache_record, native_paged_attention
from kernels.structs import Activation, WeightForm

_FORMS = {torch.int32: WeightForm.NF4, torch.float32: WeightForm.FLOAT32, torch.bfloat16: WeightForm.BFLOAT16}


@custom_op("quickchange::linear", mutates_args=())
def linear(
    x: Tensor, weights: Tensor, scales: Tensor | None, bias: Tensor | None, out_features: int
) -> Tensor:
    """[…, D] → […, O] float32.

    Args:
        weights, scales: of `kernels.linear.pack_nf4`, or `pack_dense` and None.
        out_features: O; the last tile may be padded.
    """
    shape = out_features, x.shape[-1]
    if native() is None:
        return linear_reference(unpacked_weight(weights, scales, shape), x, bias)
    group = 1 if scales is None else shape[1] // scales.shape[1]
    packed = PackedLinear(weights, scales, bias, shape=shape, form=_FORMS[weights.dtype], group=group)
    return packed(x)


@linear.register_fake
def _(x: Tensor, weights: Tensor, scales: Tensor | None, bias: Tensor | None, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features), dtype=torch.float32)


@custom_op("quickchange::lora_delta", mutates_args={"y"})
def lora_delta(
    y: Tensor,
    x: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    scaling: list[float],
    segments: list[int],
    scales: list[float],
) -> None:
    """y [B, O] += the update of each row's adapter, x [B, D].

    Args:
        a, b, scaling: of each slot from 1 on: [R, D], [R, O].
        segments: start, end, slot; start, end, slot; …
        scales: of each segment.
    """
    factors = {slot + 1: LoraFactors(*each) for slot, each in enumerate(zip(a, b, scaling, strict=True))}
    places = zip(segments[::3], segments[1::3], segments[2::3], scales, strict=True)
    routed = Segments([Segment(*place) for place in places])
    if native() is None:
        add_lora_delta(y, x, routed, factors)
        return
    ins, outs = x.shape[-1], y.shape[-1]
    carrier = PackedLinear(
        x, None, None, shape=(outs, ins), form=WeightForm.FLOAT32
    )  # no product is asked of it
    for slot, pair in factors.items():
        carrier.set_slot(slot, pair)
    carrier.add_delta(y, x, routed)


@lora_delta.register_fake
def _(
    y: Tensor,
    x: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    scaling: list[float],
    segments: list[int],
    scales: list[float],
) -> None:
    return None


@custom_op("quickchange::paged_attention", mutates_args={"keys_cache", "values_cache"})
def paged_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys_cache: Tensor,
    values_cache: Tensor,
    positions: Tensor,
    sequences: Tensor,
    tables: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Writes k, v [T, K, E] into the caches [N, S, K, E] and attends with q [T, H, E]; returns [T, H, E].

    Args:
        positions, sequences: [T] integers; tokens of one sequence are neighbours, in order.
        tables: [sequences, blocks].
    """
    where = positions.tolist(), sequences.tolist(), tables.tolist()
    cache = LayerCache(keys_cache, values_cache)
    rule = AttentionRule(scale, window, softcap)
    if native() is None:
        plan = _plan_of(*where, keys_cache.shape[1])
        return paged_attention(q, k, v, cache, plan, rule)
    rows = PagedRows(*where, keys_cache.shape[1])
    return native_paged_attention(q, k, v, cache_record(cache), rows, rule)


@paged_attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
    return q.new_empty((*q.shape[:2], v.shape[-1]))


@custom_op("quickchange::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Each row of […, D] float32."""
    return (rowwise.rms_norm_reference if native() is None else rowwise.rms_norm)(x, weight, epsilon)


@custom_op("quickchange::rotary", mutates_args=())
def rotary(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """[T, H, E] float32, its first dimensions rotated in halves by angles [T, R]."""
    return (rowwise.rotary_reference if native() is None else rowwise.rotary)(x, cosines, sines)


@custom_op("quickchange::gated", mutates_args=())
def gated(x: Tensor, activation: str) -> Tensor:
    """act(x[:, :D]) · x[:, D:] of [T, 2 D] float32; activation is "silu" or "gelu_tanh"."""
    kind = Activation[activation.upper()]
    return (rowwise.gated_reference if native() is None else rowwise.gated)(x, kind)


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return torch.empty_like(x)


@rotary.register_fake
def _(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    return torch.empty_like(x)


@gated.register_fake
def _(x: Tensor, activation: str) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1] // 2))


def _plan_of(
    positions: list[int], sequences: list[int], tables: list[list[int]], block_tokens: int
) -> AttentionPlan:
    """The plain plan of the same step: every sequence's tokens as one prefill."""
    write, prefills, start = [], [], 0
    for position, sequence in zip(positions, sequences, strict=True):
        block = tables[sequence][position // block_tokens]
        write.append(block * block_tokens + position % block_tokens)
    for end in range(1, len(sequences) + 1):
        if end == len(sequences) or sequences[end] != sequences[start]:
            newest = positions[end - 1]
            blocks = torch.tensor(tables[sequences[start]][: newest // block_tokens + 1])
            prefills.append(PrefillSegment(start, end, positions[start], blocks))
            start = end
    return AttentionPlan(torch.tensor(write), 0, None, None, tuple(prefills))
