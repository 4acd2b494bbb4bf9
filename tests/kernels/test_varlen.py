"""Variable-length attention: its reference against plain attention, and how torch's kernel is called."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.paged_attention import AttentionRule, LayerCache
from kernels.varlen import (
    VarlenAttention,
    VarlenPlan,
    gathered_attention,
    paged_varlen_attention,
    varlen_for,
    varlen_reference,
)
from tests.kernels.attention_reference import attention_reference

HEADS, KV_HEADS, WIDTH, BLOCK_TOKENS = 4, 2, 8, 4
RULE = AttentionRule(0.3)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")

Rows = list[tuple[int, int]]
"""Of each sequence: tokens already cached, tokens of this step."""


class Case(NamedTuple):
    """A step, and what attention to each sequence's own keys and values gives."""

    q_THE: Tensor
    cache: LayerCache
    plan: VarlenPlan
    expected_THE: Tensor


def case_of(rows: Rows, rule: AttentionRule, seed: int) -> Case:
    """Blocks are scattered at random among others that hold what was there before."""
    generator = torch.Generator().manual_seed(seed)
    needed = [-(-(past + new) // BLOCK_TOKENS) for past, new in rows]
    free = torch.randperm(sum(needed) + 2, generator=generator).tolist()
    shape = sum(needed) + 2, BLOCK_TOKENS, KV_HEADS, WIDTH
    cache = LayerCache(*(torch.randn(shape, generator=generator) for _ in range(2)))
    queries, expected, write, tables, starts = [], [], [], [], [0]
    for (past, new), count in zip(rows, needed, strict=True):
        table = [free.pop() for _ in range(count)]
        slots = [table[p // BLOCK_TOKENS] * BLOCK_TOKENS + p % BLOCK_TOKENS for p in range(past + new)]
        keys, values = (torch.randn(past + new, KV_HEADS, WIDTH, generator=generator) for _ in range(2))
        cache.write(torch.tensor(slots), keys, values)
        queries.append(torch.randn(new, HEADS, WIDTH, generator=generator))
        expected.append(attention_reference(queries[-1], keys, values, rule))
        write += slots[past:]
        tables.append(table + table[-1:] * (max(needed) - count))
        starts.append(starts[-1] + new)
    plan = VarlenPlan(
        write_T=torch.tensor(write),
        starts=torch.tensor(starts, dtype=torch.int32),
        lengths_B=torch.tensor([past + new for past, new in rows], dtype=torch.int32),
        blocks_BM=torch.tensor(tables, dtype=torch.int32),
        max_queries=max(new for _, new in rows),
    )
    return Case(torch.cat(queries), cache, plan, torch.cat(expected))


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.tuples(st.integers(0, 19), st.sampled_from([1, 1, 2, 5, 16])), min_size=1, max_size=4),
    window=st.sampled_from([None, 1, 3, 16]),
    softcap=st.sampled_from([None, 5.0]),
    seed=st.integers(0, 1000),
)
def test_the_reference_equals_contiguous_attention(
    rows: Rows, window: int | None, softcap: float | None, seed: int
) -> None:
    rule = AttentionRule(0.3, window, softcap)
    case = case_of(rows, rule, seed)
    found = varlen_reference(case.q_THE, case.cache, case.plan, rule)
    torch.testing.assert_close(found, case.expected_THE, rtol=1e-4, atol=1e-5)


def as_documented(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: Tensor,
    block_table: Tensor | None,
) -> Tensor:
    """What torch's documentation says of `varlen_attn`; its kernel runs on CUDA alone."""
    assert cu_seq_q.dtype == seqused_k.dtype == torch.int32
    assert (cu_seq_k is None) == (block_table is not None)
    assert enable_gqa == (query.shape[1] != key.shape[-2])
    parts = []
    for index, used in enumerate(seqused_k.tolist()):
        start, end = cu_seq_q[index : index + 2].tolist()
        if block_table is not None:
            assert block_table.dtype == torch.int32
            keys, values = (pool[block_table[index].long()].flatten(0, 1) for pool in (key, value))
        else:
            assert cu_seq_k is not None
            first, last = cu_seq_k[index : index + 2].tolist()
            keys, values = key[first:last], value[first:last]
        assert used <= len(keys) == max_k
        assert end - start <= max_q
        assert window_size[1] == 0
        window = None if window_size[0] < 0 else window_size[0] + 1
        rule = AttentionRule(scale, window)
        parts.append(attention_reference(query[start:end], keys[:used], values[:used], rule))
    return torch.cat(parts)


@pytest.mark.parametrize("attention", [gathered_attention, paged_varlen_attention])
@pytest.mark.parametrize("window", [None, 3])
def test_torch_is_asked_for_what_the_plan_says(
    attention: VarlenAttention, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kernels.varlen.varlen_attn", as_documented)
    rule = AttentionRule(0.3, window)
    case = case_of([(6, 1), (0, 5), (3, 2), (11, 1)], rule, seed=0)
    found = attention(case.q_THE, case.cache, case.plan, rule)
    torch.testing.assert_close(found, case.expected_THE, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("device", "storage", "rule", "widths"),
    [
        (CPU, torch.bfloat16, RULE, (64, 64)),
        (CUDA, torch.float32, RULE, (64, 64)),
        (CUDA, torch.bfloat16, AttentionRule(0.3, softcap=5.0), (64, 64)),
        (CUDA, torch.bfloat16, RULE, (64, 128)),
        (CUDA, torch.bfloat16, RULE, (512, 512)),
        (CUDA, torch.bfloat16, RULE, (20, 20)),
    ],
)
def test_what_the_kernel_cannot_do_is_left_to_plain_torch(
    device: torch.device, storage: torch.dtype, rule: AttentionRule, widths: tuple[int, int]
) -> None:
    assert varlen_for(device, torch.bfloat16, storage, [RULE, rule], [(64, 64), widths]) is None


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 3])
def test_the_kernel_equals_the_reference_on_cuda(window: int | None) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    rule = AttentionRule(0.3, window)
    case = case_of([(6, 1), (0, 5), (3, 2), (300, 1)], rule, seed=0)
    attention = varlen_for(CUDA, torch.bfloat16, torch.bfloat16, [rule], [(WIDTH, WIDTH)])
    assert attention is not None
    cache = LayerCache(*(half.to(CUDA, torch.bfloat16) for half in (case.cache.k_NSKE, case.cache.v_NSKE)))
    plan = VarlenPlan(
        case.plan.write_T.to(CUDA),
        case.plan.starts.to(CUDA),
        case.plan.lengths_B.to(CUDA),
        case.plan.blocks_BM.to(CUDA),
        case.plan.max_queries,
    )
    found = attention(case.q_THE.to(CUDA, torch.bfloat16), cache, plan, rule)
    torch.testing.assert_close(found.float().cpu(), case.expected_THE, rtol=3e-2, atol=3e-2)
