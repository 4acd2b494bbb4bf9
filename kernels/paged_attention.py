"""Causal attention of a flattened batch over paged keys and values, in plain torch. Knows no requests.

T tokens of the batch, B decode rows, Q queries of one prefill segment, L keys, H query heads, K key/value
heads, G query heads per key/value head, E head dimension, N blocks of the cache, S token slots per block,
M blocks of one sequence.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class AttentionRule:
    """How scores are made.

    Attributes:
        scale: factor of the scores, usually 1/sqrt(E).
        window: a query at position p sees positions p - window + 1 … p (sliding window); None sees all.
        softcap: scores become softcap·tanh(score/softcap) before the softmax (Gemma 2).
    """

    scale: float
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True, slots=True)
class PrefillSegment:
    """Tokens [start, end) of the batch: a run of one sequence, at positions [offset, offset + end - start).

    Attributes:
        blocks_M: the sequence's cache blocks up to its position offset + end - start - 1.
    """

    start: int
    end: int
    offset: int
    blocks_M: Tensor


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Where a step's tokens write and read keys and values; made once per step, used by every layer.

    Attributes:
        write_T: cache slot of each token: block · S + offset in the block.
        decode_rows: the first so many tokens are one token each of different sequences.
        decode_blocks_BM: each decode row's cache blocks in order of position, padded with its own last one:
            what is masked is multiplied by zero, which another sequence's infinity would survive.
        decode_lengths_B: number of valid positions per decode row, itself included.
        prefills: the remaining tokens.
    """

    write_T: Tensor
    decode_rows: int
    decode_blocks_BM: Tensor | None
    decode_lengths_B: Tensor | None
    prefills: tuple[PrefillSegment, ...]
    _masks: dict[object, Tensor] = field(default_factory=dict)

    def decode_mask(self, keys: int, window: int | None) -> Tensor:
        """True where a decode row may look; shape [B, 1, 1, L] for L = keys."""
        if ("decode", window) not in self._masks:
            assert self.decode_lengths_B is not None
            position_L = torch.arange(keys, device=self.decode_lengths_B.device)
            length_B1 = self.decode_lengths_B[:, None]
            mask_BL = position_L < length_B1
            if window is not None:
                mask_BL &= position_L >= length_B1 - window
            self._masks["decode", window] = mask_BL[:, None, None, :]
        return self._masks["decode", window]

    def prefill_mask(self, segment: PrefillSegment, window: int | None) -> Tensor:
        """True where a query of the segment may look; shape [Q, L]."""
        key = (segment.start, window)
        if key not in self._masks:
            queries, device = segment.end - segment.start, segment.blocks_M.device
            query_Q1 = torch.arange(queries, device=device)[:, None] + segment.offset
            key_L = torch.arange(segment.offset + queries, device=device)
            mask_QL = key_L <= query_Q1
            if window is not None:
                mask_QL &= key_L > query_Q1 - window
            self._masks[key] = mask_QL
        return self._masks[key]


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Keys and values of one layer."""

    k_NSKE: Tensor
    v_NSKE: Tensor

    def write(self, slot_T: Tensor, k_TKE: Tensor, v_TKE: Tensor) -> None:
        """Stores each token's key and value in its slot."""
        for cache_NSKE, new_TKE in ((self.k_NSKE, k_TKE), (self.v_NSKE, v_TKE)):
            slots = cache_NSKE.view(-1, *cache_NSKE.shape[2:])
            slots.index_copy_(0, slot_T, new_TKE.to(cache_NSKE.dtype))

    def read(self, blocks_BM: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of some sequences, [B, K, M·S, E] each; copies whole blocks, not single slots."""
        return _gathered(self.k_NSKE, blocks_BM), _gathered(self.v_NSKE, blocks_BM)


def _gathered(cache_NSKE: Tensor, blocks_BM: Tensor) -> Tensor:
    rows, blocks = blocks_BM.shape
    _, slots, heads_kv, width = cache_NSKE.shape
    gathered = cache_NSKE.index_select(0, blocks_BM.reshape(-1))
    return gathered.view(rows, blocks * slots, heads_kv, width).transpose(1, 2)


def paged_attention(
    q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, cache: LayerCache, plan: AttentionPlan, rule: AttentionRule
) -> Tensor:
    """Writes the step's keys and values, then lets every token attend to its own sequence's past and itself.

    Returns:
        [T, H, E] in the type of q.
    """
    cache.write(plan.write_T, k_TKE, v_TKE)
    parts = [_decode(q_THE[: plan.decode_rows], cache, plan, rule)] if plan.decode_rows else []
    parts += [_prefill(q_THE[s.start : s.end], cache, plan, s, rule) for s in plan.prefills]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _decode(q_BHE: Tensor, cache: LayerCache, plan: AttentionPlan, rule: AttentionRule) -> Tensor:
    assert plan.decode_blocks_BM is not None
    k_BKLE, v_BKLE = cache.read(plan.decode_blocks_BM)
    rows, heads, width = q_BHE.shape
    # The query heads that share a key head stand in for a query length: no key is copied per head.
    q_BKGE = q_BHE.reshape(rows, k_BKLE.shape[1], -1, width)
    out_BKGE = attend(q_BKGE, k_BKLE, v_BKLE, plan.decode_mask(k_BKLE.shape[2], rule.window), rule)
    return out_BKGE.reshape(rows, heads, -1)


def _prefill(
    q_QHE: Tensor, cache: LayerCache, plan: AttentionPlan, segment: PrefillSegment, rule: AttentionRule
) -> Tensor:
    mask_QL = plan.prefill_mask(segment, rule.window)
    groups = q_QHE.shape[1] // cache.k_NSKE.shape[2]
    k_BHLE, v_BHLE = (
        x_BKLE[:, :, : mask_QL.shape[1]].repeat_interleave(groups, dim=1)
        for x_BKLE in cache.read(segment.blocks_M[None])
    )
    out_BHQE = attend(q_QHE.transpose(0, 1)[None], k_BHLE, v_BHLE, mask_QL, rule)
    return out_BHQE[0].transpose(0, 1)


def attend(q_BHQE: Tensor, k_BHLE: Tensor, v_BHLE: Tensor, mask: Tensor, rule: AttentionRule) -> Tensor:
    """softmax(scores where mask) v, for a mask that broadcasts to [B, H, Q, L] and knows the window."""
    k_BHLE, v_BHLE = k_BHLE.to(q_BHQE.dtype), v_BHLE.to(q_BHQE.dtype)
    if rule.softcap is None:
        return F.scaled_dot_product_attention(q_BHQE, k_BHLE, v_BHLE, attn_mask=mask, scale=rule.scale)
    scores = torch.matmul(q_BHQE, k_BHLE.transpose(-1, -2)) * rule.scale
    scores = rule.softcap * torch.tanh(scores / rule.softcap)
    weights = torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1, dtype=torch.float32)
    return torch.matmul(weights.to(q_BHQE.dtype), v_BHLE)
