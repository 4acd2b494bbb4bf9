"""Drawing tokens from rows of logits: in native code, and in plain torch. Knows no requests.

V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.library import native
from kernels.structs import DrawRecord


@dataclass(frozen=True, slots=True)
class Draw:
    """One draw: which part of the distribution, and at which point of it.

    Attributes:
        temperature: divides logits; above 0.
        top_k: only so many of the likeliest; 0 leaves all.
        top_p: of those the likeliest until their probabilities sum up to this (Holtzman et al. 2020).
        min_p: of those what is at least so likely, relative to the likeliest (Nguyen et al. 2024).
        uniform: in [0, 1).
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    uniform: float


def draw_tokens(rows: Sequence[Tensor], draws: Sequence[Draw]) -> list[Tensor]:
    """A token of each row, 0-d int64 on its device: where the probabilities of those left, likeliest first,
    reach `uniform` of their sum. A row's token depends on its own logits and draw alone.

    Args:
        rows: [V] each, contiguous.
    """
    if not rows:
        return []
    if rows[0].device.type != "cpu" or native() is None:
        return [draw_reference(logits_V, draw) for logits_V, draw in zip(rows, draws, strict=True)]
    settled = _settled([logits_V.float() for logits_V in rows], draws)
    return [
        token if token >= 0 else draw_reference(logits_V, draw)
        for token, logits_V, draw in zip(settled.unbind(), rows, draws, strict=True)
    ]


def _settled(rows: Sequence[Tensor], draws: Sequence[Draw]) -> Tensor:
    """Of each row, -1 where its likeliest tokens do not settle the draw."""
    library = native()
    assert library is not None, "called only where the library is"
    records = (DrawRecord * len(rows))(
        *(
            DrawRecord(
                logits_V.data_ptr(), draw.temperature, draw.top_p, draw.min_p, draw.uniform, draw.top_k
            )
            for logits_V, draw in zip(rows, draws, strict=True)
        )
    )
    tokens = torch.empty(len(rows), dtype=torch.int64)
    library.functions.qc_draw_tokens(
        records, len(rows), len(rows[0]), tokens.data_ptr(), torch.get_num_threads()
    )
    return tokens


def draw_reference(logits_V: Tensor, draw: Draw) -> Tensor:
    """As `draw_tokens`, by putting the whole row in order."""
    scaled_V = logits_V.double() / draw.temperature
    count = min(draw.top_k or len(scaled_V), len(scaled_V))
    ordered, ids = torch.topk(scaled_V, count)
    probabilities = torch.softmax(ordered, dim=0)
    mass_before = torch.cumsum(probabilities, dim=0) - probabilities
    keep = (mass_before < draw.top_p) & (probabilities >= draw.min_p * probabilities[0])
    cumulative = torch.cumsum(probabilities * keep, dim=0)
    last = (keep * torch.arange(count, device=keep.device)).amax(dim=0, keepdim=True)
    index = torch.searchsorted(cumulative, draw.uniform * cumulative[-1:], right=True).minimum(last)
    return ids.gather(0, index)[0]
