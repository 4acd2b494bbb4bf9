"""The multi-adapter low-rank update: its data, and its reference in plain torch. Knows no store.

T tokens, D in-features, O out-features, R rank of one adapter (ranks differ between adapters).
"""

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.structs import SegmentRecord


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens [start, end) of the flattened batch that use the adapter in `slot`, its update times `scale`."""

    start: int
    end: int
    slot: int
    scale: float = 1.0


class Segments:
    """A step's segments, disjoint, for every layer of the model."""

    def __init__(self, segments: Sequence[Segment] = ()) -> None:
        self._segments = tuple(segments)
        self._records = (SegmentRecord * len(self._segments))(
            *(SegmentRecord(each.start, each.end, each.slot, each.scale) for each in self._segments)
        )

    def __len__(self) -> int:
        return len(self._segments)

    def __iter__(self) -> Iterator[Segment]:
        return iter(self._segments)

    @property
    def address(self) -> int:
        """Of the C array; valid as long as this object lives."""
        return ctypes.addressof(self._records)


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """One adapter's factors for one linear layer, on the device and in the type they are kept in.

    Attributes:
        a_RD: shrinks D in-features to rank R.
        b_RO: expands rank R to O out-features; transposed.
        scaling: of the whole update, alpha/R or alpha/√R.
    """

    a_RD: Tensor
    b_RO: Tensor
    scaling: float = 1.0

    @property
    def rank(self) -> int:
        return self.a_RD.shape[0]

    @property
    def nbytes(self) -> int:
        return self.a_RD.nbytes + self.b_RO.nbytes


def add_lora_delta(
    y_TO: Tensor, x_TD: Tensor, segments: Segments, factors: Mapping[int, LoraFactors]
) -> None:
    """Adds each token's own update in place: y[t] += scaling[slot] · scale · (x[t] @ a[slot].T) @ b[slot].

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
        scaling = pair.scaling * segment.scale
        if y_SO.dtype == shrunk_SR.dtype:
            y_SO.addmm_(shrunk_SR, pair.b_RO, alpha=scaling)
        else:
            y_SO.add_(torch.mm(shrunk_SR, pair.b_RO), alpha=scaling)
