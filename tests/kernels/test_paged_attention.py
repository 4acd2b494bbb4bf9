"""Paged attention against attention over each sequence's own contiguous keys and values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.paged_attention import AttentionPlan, AttentionRule, LayerCache, PrefillSegment, paged_attention
from tests.kernels.attention_reference import attention_reference

HEADS, KV_HEADS, WIDTH, BLOCK_TOKENS = 4, 2, 8, 4


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.tuples(st.integers(0, 19), st.sampled_from([1, 1, 2, 5, 16])), min_size=1, max_size=4),
    window=st.sampled_from([None, 1, 3, 16]),
    softcap=st.sampled_from([None, 5.0]),
    seed=st.integers(0, 1000),
)
def test_equals_contiguous_attention(
    rows: list[tuple[int, int]], window: int | None, softcap: float | None, seed: int
) -> None:
    """Each row is (tokens already cached, tokens of this step); blocks are scattered at random."""
    generator = torch.Generator().manual_seed(seed)
    rows = sorted(rows, key=lambda row: row[1] != 1)  # decode rows first
    needed = [-(-(past + new) // BLOCK_TOKENS) for past, new in rows]
    free = torch.randperm(sum(needed) + 2, generator=generator).tolist()
    shape = sum(needed) + 2, BLOCK_TOKENS, KV_HEADS, WIDTH
    cache = LayerCache(*(torch.randn(shape, generator=generator) for _ in range(2)))  # what was there before
    q, k, v, write, tables, expected = [], [], [], [], [], []
    rule = AttentionRule(0.3, window, softcap)
    for (past, new), count in zip(rows, needed, strict=True):
        table = [free.pop() for _ in range(count)]
        slots = [table[p // BLOCK_TOKENS] * BLOCK_TOKENS + p % BLOCK_TOKENS for p in range(past + new)]
        keys, values = (torch.randn(past + new, KV_HEADS, WIDTH, generator=generator) for _ in range(2))
        queries = torch.randn(new, HEADS, WIDTH, generator=generator)
        cache.write(torch.tensor(slots[:past], dtype=torch.long), keys[:past], values[:past])
        q.append(queries), k.append(keys[past:]), v.append(values[past:])
        write += slots[past:]
        tables.append(table)
        expected.append(attention_reference(queries, keys, values, rule))
    plan = plan_of(rows, tables, write)
    out = paged_attention(torch.cat(q), torch.cat(k), torch.cat(v), cache, plan, rule)
    torch.testing.assert_close(out, torch.cat(expected), rtol=1e-4, atol=1e-5)


def plan_of(rows: list[tuple[int, int]], tables: list[list[int]], write: list[int]) -> AttentionPlan:
    decodes = sum(new == 1 for _, new in rows)
    width = max((len(table) for table in tables[:decodes]), default=0)
    padded = [table + [0] * (width - len(table)) for table in tables[:decodes]]
    prefills, start = [], decodes
    for (past, new), table in zip(rows[decodes:], tables[decodes:], strict=True):
        prefills.append(PrefillSegment(start, start + new, past, torch.tensor(table)))
        start += new
    return AttentionPlan(
        write_T=torch.tensor(write),
        decode_rows=decodes,
        decode_blocks_BM=torch.tensor(padded) if decodes else None,
        decode_lengths_B=torch.tensor([past + 1 for past, _ in rows[:decodes]]) if decodes else None,
        prefills=tuple(prefills),
    )


@pytest.mark.gpu
def test_equals_the_cpu_on_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, HEADS, WIDTH, generator=generator)
    k, v = (torch.randn(3, KV_HEADS, WIDTH, generator=generator) for _ in range(2))
    results = []
    for device in ("cpu", "cuda"):
        shape = 2, BLOCK_TOKENS, KV_HEADS, WIDTH
        cache = LayerCache(*(torch.zeros(shape, device=device) for _ in range(2)))
        segment = PrefillSegment(0, 3, 0, torch.tensor([1], device=device))
        plan = AttentionPlan(torch.tensor([4, 5, 6], device=device), 0, None, None, (segment,))
        out = paged_attention(q.to(device), k.to(device), v.to(device), cache, plan, AttentionRule(0.3))
        results.append(out.cpu())
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
