"""The multi-adapter low-rank update, in plain torch. Knows shapes and segments, not where adapters come from.

T tokens, D in-features, O out-features, R rank of one adapter (ranks differ between adapters).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens [start, end) of the flattened batch that use the adapter in `slot`."""

    start: int
    end: int
    slot: int


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """One adapter's factors for one linear layer, on the device and in the type they are applied in.

    Attributes:
        a_RD: shrinks D in-features to rank R.
        b_RO: expands rank R to O out-features; transposed, and already multiplied by the adapter's scaling.
    """

    a_RD: Tensor
    b_RO: Tensor


def add_lora_delta(
    y_TO: Tensor, x_TD: Tensor, segments: Sequence[Segment], factors: Mapping[int, LoraFactors]
) -> None:
    """Adds each token's own update in place: y[t] += (x[t] @ a[slot].T) @ b[slot].

    A segment's numbers depend on its own rows and factors alone. Tokens outside every segment, and slots
    without factors, cost nothing and stay as they are: their update is zero.

    Args:
        y_TO: output of the base layer; changed in place.
        x_TD: the layer's input.
        segments: disjoint ranges of T.
        factors: by slot.
    """
    for segment in segments:
        pair = factors.get(segment.slot)
        if pair is None:
            continue
        x_SD = x_TD[segment.start : segment.end].to(pair.a_RD.dtype)
        shrunk_SR = torch.mm(x_SD, pair.a_RD.t())
        y_SO = y_TO[segment.start : segment.end]
        if y_SO.dtype == shrunk_SR.dtype:
            y_SO.addmm_(shrunk_SR, pair.b_RO)
        else:
            y_SO.add_(torch.mm(shrunk_SR, pair.b_RO))
