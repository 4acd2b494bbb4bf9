"""Attention of one sequence, written out without any library: the oracle of both implementations."""

import torch

from kernels.paged_attention import AttentionRule


def attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rule: AttentionRule
) -> torch.Tensor:
    """q [Q, H, E] are the last Q positions of k [L, K, E] and v [L, K, E']; returns [Q, H, E']."""
    length, queries, heads = k.shape[0], q.shape[0], q.shape[1]
    groups = heads // k.shape[1]
    out = q.new_empty(queries, heads, v.shape[-1])
    for i in range(queries):
        position = length - queries + i
        first = 0 if rule.window is None else max(0, position - rule.window + 1)
        for head in range(heads):
            keys = k[first : position + 1, head // groups]
            scores = keys @ q[i, head] * rule.scale
            if rule.softcap is not None:
                scores = rule.softcap * torch.tanh(scores / rule.softcap)
            out[i, head] = torch.softmax(scores, 0) @ v[first : position + 1, head // groups]
    return out
