"""Causal attention of a flattened batch over paged keys and values, in plain torch. Knows no requests.

T tokens of the batch, B decode rows, Q queries of one prefill segment, L keys, H query heads, K key/value
heads, G query heads per key/value head, E head dimension, N token slots of the cache.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class PrefillSegment:
    """Tokens [start, end) of the batch: a run of one sequence, at positions [offset, offset + end - start).

    Attributes:
        gather_L: cache slots of the sequence's positions 0 … offset + end - start - 1.
    """

    start: int
    end: int
    offset: int
    gather_L: Tensor


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Where a step's tokens write and read keys and values; made once per step, used by every layer.

    Attributes:
        write_T: cache slot of each token.
        decode_rows: the first so many tokens are one token each of different sequences.
        decode_gather_BL: cache slots of each decode row's positions, padded with slot 0.
        decode_lengths_B: number of valid positions per decode row, itself included.
        prefills: the remaining tokens.
    """

    write_T: Tensor
    decode_rows: int
    decode_gather_BL: Tensor | None
    decode_lengths_B: Tensor | None
    prefills: tuple[PrefillSegment, ...]
    _masks: dict[object, Tensor] = field(default_factory=dict)

    def decode_mask(self, window: int | None) -> Tensor:
        """True where a decode row may look; shape [B, 1, 1, L]."""
        key = ("decode", window)
        if key not in self._masks:
            assert self.decode_gather_BL is not None
            assert self.decode_lengths_B is not None
            position_L = torch.arange(self.decode_gather_BL.shape[1], device=self.decode_gather_BL.device)
            length_B1 = self.decode_lengths_B[:, None]
            mask_BL = position_L < length_B1
            if window is not None:
                mask_BL &= position_L >= length_B1 - window
            self._masks[key] = mask_BL[:, None, None, :]
        return self._masks[key]

    def prefill_mask(self, segment: PrefillSegment, window: int | None) -> Tensor:
        """True where a query of the segment may look; shape [Q, L]."""
        key = (segment.start, window)
        if key not in self._masks:
            device = segment.gather_L.device
            query_Q1 = torch.arange(segment.end - segment.start, device=device)[:, None] + segment.offset
            key_L = torch.arange(segment.gather_L.shape[0], device=device)
            mask_QL = key_L <= query_Q1
            if window is not None:
                mask_QL &= key_L > query_Q1 - window
            self._masks[key] = mask_QL
        return self._masks[key]


def paged_attention(
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKE: Tensor,
    k_cache_NKE: Tensor,
    v_cache_NKE: Tensor,
    plan: AttentionPlan,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Writes the step's keys and values, then lets every token attend to its own sequence's past and itself.

    Args:
        scale: factor of the scores, usually 1/sqrt(E).
        window: a query at position p sees positions p - window + 1 … p (sliding window); None sees all.
        softcap: scores become softcap·tanh(score/softcap) before the softmax (Gemma 2).

    Returns:
        [T, H, E] in the type of q.
    """
    k_cache_NKE.index_copy_(0, plan.write_T, k_TKE.to(k_cache_NKE.dtype))
    v_cache_NKE.index_copy_(0, plan.write_T, v_TKE.to(v_cache_NKE.dtype))
    out_THE = torch.empty_like(q_THE)
    rows = plan.decode_rows
    if rows:
        out_THE[:rows] = _decode(q_THE[:rows], k_cache_NKE, v_cache_NKE, plan, scale, window, softcap)
    for segment in plan.prefills:
        out_THE[segment.start : segment.end] = _prefill(
            q_THE[segment.start : segment.end],
            k_cache_NKE,
            v_cache_NKE,
            plan,
            segment,
            scale,
            window,
            softcap,
        )
    return out_THE


def _decode(
    q_BHE: Tensor,
    k_cache_NKE: Tensor,
    v_cache_NKE: Tensor,
    plan: AttentionPlan,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    assert plan.decode_gather_BL is not None
    rows, length = plan.decode_gather_BL.shape
    heads_kv, width = k_cache_NKE.shape[1:]
    index = plan.decode_gather_BL.reshape(-1)
    k_BKLE = k_cache_NKE.index_select(0, index).view(rows, length, heads_kv, width).transpose(1, 2)
    v_BKLE = v_cache_NKE.index_select(0, index).view(rows, length, heads_kv, width).transpose(1, 2)
    # The query heads that share a key head stand in for a query length: no key is copied per head.
    q_BKGE = q_BHE.view(rows, heads_kv, -1, width)
    out_BKGE = attend(q_BKGE, k_BKLE, v_BKLE, plan.decode_mask(window), scale, softcap)
    return out_BKGE.reshape(rows, -1, width)


def _prefill(
    q_QHE: Tensor,
    k_cache_NKE: Tensor,
    v_cache_NKE: Tensor,
    plan: AttentionPlan,
    segment: PrefillSegment,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    groups = q_QHE.shape[1] // k_cache_NKE.shape[1]
    k_HLE = k_cache_NKE.index_select(0, segment.gather_L).transpose(0, 1).repeat_interleave(groups, dim=0)
    v_HLE = v_cache_NKE.index_select(0, segment.gather_L).transpose(0, 1).repeat_interleave(groups, dim=0)
    mask_QL = plan.prefill_mask(segment, window)
    out_HQE = attend(q_QHE.transpose(0, 1)[None], k_HLE[None], v_HLE[None], mask_QL, scale, softcap)[0]
    return out_HQE.transpose(0, 1)


def attend(
    q_BHQE: Tensor, k_BHLE: Tensor, v_BHLE: Tensor, mask: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """softmax(softcap(scale · q kᵀ) where mask) v, for a mask that broadcasts to [B, H, Q, L]."""
    k_BHLE, v_BHLE = k_BHLE.to(q_BHQE.dtype), v_BHLE.to(q_BHQE.dtype)
    if softcap is None:
        return F.scaled_dot_product_attention(q_BHQE, k_BHLE, v_BHLE, attn_mask=mask, scale=scale)
    scores = torch.matmul(q_BHQE, k_BHLE.transpose(-1, -2)) * scale
    scores = softcap * torch.tanh(scores / softcap)
    weights = torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1, dtype=torch.float32)
    return torch.matmul(weights.to(q_BHQE.dtype), v_BHLE)
