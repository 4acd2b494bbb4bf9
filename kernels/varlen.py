"""Attention of a flattened batch by torch's variable-length kernel, and its reference. Knows no requests.

T tokens of the batch, B sequences, H query heads, K key/value heads, E head dimension, N blocks of the cache,
S token slots per block, M blocks of one sequence.

All of a plan is on the device: no layer waits for the host, and plans of equal shapes run the same kernels.
"""

import importlib.util
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.attention import activate_flash_attention_impl
from torch.nn.attention.varlen import varlen_attn

from kernels.paged_attention import AttentionRule, LayerCache, attend

log = logging.getLogger(__name__)

_WIDEST_HEAD = 256
"""Of FlashAttention, which takes widths that are multiples of 8 and values as wide as keys."""
_PAGED_BY_MAJOR = {9: ("FA3", "flash_attn_interface"), 10: ("FA4", "flash_attn")}
"""Which implementation reads block tables on which compute capability, and the module it lives in.

torch's own, FlashAttention 2, does not (pytorch/pytorch#175924)."""


@dataclass(frozen=True, slots=True)
class VarlenPlan:
    """Where a step's tokens write and read keys and values; made once per step, used by every layer.

    Attributes:
        write_T: cache slot of each token, block · S + offset in the block; int64.
        starts: [B + 1], first token of each sequence, then T; int32.
        lengths_B: positions of each sequence that are valid, the step's own included; int32.
        blocks_BM: cache blocks of each sequence in order of position, padded with its own last; int32.
        max_queries: tokens of one sequence at most.
    """

    write_T: Tensor
    starts: Tensor
    lengths_B: Tensor
    blocks_BM: Tensor
    max_queries: int


class VarlenAttention(Protocol):
    """Lets every token attend to its own sequence's past and itself; [T, H, E] in the type of q."""

    def __call__(
        self, q_THE: Tensor, cache: LayerCache, plan: VarlenPlan, rule: AttentionRule, /
    ) -> Tensor: ...


def gathered_attention(q_THE: Tensor, cache: LayerCache, plan: VarlenPlan, rule: AttentionRule, /) -> Tensor:
    """By FlashAttention over a copy of the sequences' blocks, side by side; one copy per layer."""
    rows, blocks = plan.blocks_BM.shape
    slots = blocks * cache.k_NSKE.shape[1]
    keys, values = (
        each_NSKE.index_select(0, plan.blocks_BM.reshape(-1)).flatten(0, 1)
        for each_NSKE in (cache.k_NSKE, cache.v_NSKE)
    )
    starts = torch.arange(0, (rows + 1) * slots, slots, dtype=torch.int32, device=q_THE.device)
    return _varlen(q_THE, keys, values, starts, plan, rule, slots, None)


def paged_varlen_attention(
    q_THE: Tensor, cache: LayerCache, plan: VarlenPlan, rule: AttentionRule, /
) -> Tensor:
    """By FlashAttention 3 or 4 over the blocks where they are."""
    slots = plan.blocks_BM.shape[1] * cache.k_NSKE.shape[1]
    return _varlen(q_THE, cache.k_NSKE, cache.v_NSKE, None, plan, rule, slots, plan.blocks_BM)


def _varlen(
    q_THE: Tensor,
    keys: Tensor,
    values: Tensor,
    key_starts: Tensor | None,
    plan: VarlenPlan,
    rule: AttentionRule,
    max_keys: int,
    block_table: Tensor | None,
) -> Tensor:
    attended = varlen_attn(
        q_THE,
        keys,
        values,
        plan.starts,
        key_starts,
        plan.max_queries,
        max_keys,
        scale=rule.scale,
        window_size=(-1 if rule.window is None else rule.window - 1, 0),
        enable_gqa=q_THE.shape[1] != keys.shape[-2],
        seqused_k=plan.lengths_B,
        block_table=block_table,
    )
    assert isinstance(attended, Tensor)  # a pair only where more is asked for
    return attended


def varlen_reference(q_THE: Tensor, cache: LayerCache, plan: VarlenPlan, rule: AttentionRule, /) -> Tensor:
    """The same in plain torch, sequence by sequence."""
    parts = []
    for index, length in enumerate(plan.lengths_B.tolist()):
        start, end = plan.starts[index : index + 2].tolist()
        q_1HQE = q_THE[start:end].transpose(0, 1)[None]
        groups = q_THE.shape[1] // cache.k_NSKE.shape[2]
        k_1HLE, v_1HLE = (
            x_BKLE[:, :, :length].repeat_interleave(groups, dim=1)
            for x_BKLE in cache.read(plan.blocks_BM[index : index + 1])
        )
        query_Q1 = torch.arange(length - (end - start), length, device=q_THE.device)[:, None]
        key_L = torch.arange(length, device=q_THE.device)
        mask_QL = key_L <= query_Q1
        if rule.window is not None:
            mask_QL &= key_L > query_Q1 - rule.window
        parts.append(attend(q_1HQE, k_1HLE, v_1HLE, mask_QL, rule)[0].transpose(0, 1))
    return torch.cat(parts)


def varlen_for(
    device: torch.device,
    dtype: torch.dtype,
    storage: torch.dtype,
    rules: Iterable[AttentionRule],
    widths: Iterable[tuple[int, int]],
) -> VarlenAttention | None:
    """The kernel for a model's attention on this device; None if there is none that computes all of it.

    Args:
        dtype: of queries.
        storage: of cached keys and values.
        widths: of each layer's keys and values.
    """
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or storage != dtype:
        return None
    if any(rule.softcap is not None for rule in rules):
        return None  # torch's function has no place for it
    if any(key != value or key > _WIDEST_HEAD or key % 8 for key, value in widths):
        return None
    return paged_varlen_attention if _activate_paged(device) else gathered_attention


def _activate_paged(device: torch.device) -> bool:
    """Whether an implementation that reads block tables is installed and in use now."""
    major, _ = torch.cuda.get_device_capability(device)
    name, module = _PAGED_BY_MAJOR.get(major, ("", ""))
    if not name or importlib.util.find_spec(module) is None:
        return False
    try:
        activate_flash_attention_impl(name)
    except (ImportError, RuntimeError, ValueError) as error:
        log.warning("%s is installed and cannot be used: %s; keys and values are copied", name, error)
        return False
    return True
