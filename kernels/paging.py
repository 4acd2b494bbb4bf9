"""Paged attention in native code: keys and values are written to and read from their blocks in place.

T tokens of the batch, H query heads, K key/value heads, E head dimension, N blocks of the cache, S token
slots per block, B sequences, M blocks of the longest one.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.library import native
from kernels.linear import ELEMENT_TYPES
from kernels.paged_attention import AttentionRule, LayerCache
from kernels.structs import CacheRecord, Paging, RuleRecord


class PagedRows:
    """Where each token of a step stands in its own sequence, and where that sequence's blocks lie."""

    def __init__(
        self,
        positions_T: Sequence[int],
        sequences_T: Sequence[int],
        tables: Sequence[Sequence[int]],
        block_tokens: int,
    ) -> None:
        """
        Args:
            positions_T: each token's own position.
            sequences_T: index in `tables` of each token's sequence.
            tables: each sequence's blocks in order of position, as many as its newest position needs.
        """
        width = max(map(len, tables), default=0)
        flat = [block for table in tables for block in (*table, *[0] * (width - len(table)))]
        numbers = (*positions_T, *sequences_T, *flat)
        self._numbers = (ctypes.c_int32 * len(numbers))(*numbers)
        start, size = ctypes.addressof(self._numbers), ctypes.sizeof(ctypes.c_int32)
        rows = len(positions_T)
        self.record = Paging(
            start, start + rows * size, start + 2 * rows * size, width, block_tokens
        )  # fmt: skip


def cache_record(cache: LayerCache) -> CacheRecord:
    """One layer's cache as the native code sees it; valid as long as its tensors live.

    Raises:
        ValueError: its heads are wider than native code can take.
    """
    if cache.v_NSKE.shape[-1] > MAX_WIDTH:
        raise ValueError(f"values of {cache.v_NSKE.shape[-1]} per head are more than {MAX_WIDTH}")
    _, _, heads, key_width = cache.k_NSKE.shape
    return CacheRecord(
        cache.k_NSKE.data_ptr(),
        cache.v_NSKE.data_ptr(),
        ELEMENT_TYPES[cache.k_NSKE.dtype],
        heads,
        key_width,
        cache.v_NSKE.shape[-1],
    )


MAX_WIDTH = 512
"""QC_MAX_WIDTH: the widest values of one head."""


def rule_record(rule: AttentionRule, heads: int) -> RuleRecord:
    """How scores are made, for the native code."""
    return RuleRecord(rule.scale, rule.softcap or 0.0, rule.window or 0, heads)


def native_paged_attention(
    q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, cache: CacheRecord, rows: PagedRows, rule: AttentionRule
) -> Tensor:
    """Writes the step's keys and values, then lets every token attend to its own sequence's past and itself.

    Returns:
        [T, H, E] in the type of q. A token's bits depend on its own sequence alone.
    """
    library = native()
    assert library is not None, "native caches are made only where the library is"
    threads = torch.get_num_threads()
    q, k, v = (x.float().contiguous() for x in (q_THE, k_TKE, v_TKE))
    count, heads = q.shape[:2]
    out_THE = torch.empty((count, heads, v.shape[-1]))
    library.functions.qc_cache_write(
        cache, rows.record, k.data_ptr(), k[0].numel(), v.data_ptr(), v[0].numel(), count, threads
    )
    library.functions.qc_attention(
        cache, rows.record, rule_record(rule, heads), q.data_ptr(), q[0].numel(),
        out_THE.data_ptr(), out_THE[0].numel(), count, threads,
    )  # fmt: skip
    return out_THE.to(q_THE.dtype)
