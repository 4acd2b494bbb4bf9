"""Key and value tensors of every layer, and the attention that models call. Knows no requests.

K key/value heads, H query heads, E head dimension, T tokens of the batch.
"""

import math
from dataclasses import dataclass, field

import numpy
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from kernels.decoder_layer import LayerStep
from kernels.paged_attention import AttentionPlan, AttentionRule, LayerCache, paged_attention
from kernels.paging import PagedRows, cache_record, native_paged_attention
from kernels.structs import CacheRecord
from kernels.varlen import VarlenAttention, VarlenPlan
from server.probe import LayerShape, use_attention

ATTENTION_NAME = "quickchange_paged"


@dataclass(frozen=True, slots=True)
class PagedStep:
    """What an attention layer needs of the current step; travels through the model as keyword `paged`."""

    plan: AttentionPlan
    caches: dict[int, LayerCache]

    def attend(self, layer: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, rule: AttentionRule) -> Tensor:
        """[T, H, E], in plain torch."""
        return paged_attention(q_THE, k_TKE, v_TKE, self.caches[layer], self.plan, rule)


@dataclass(frozen=True, slots=True)
class VarlenStep:
    """The same for torch's variable-length kernel."""

    plan: VarlenPlan
    caches: dict[int, LayerCache]
    attention: VarlenAttention

    def attend(self, layer: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, rule: AttentionRule) -> Tensor:
        """[T, H, E], in one kernel for all sequences."""
        cache = self.caches[layer]
        cache.write(self.plan.write_T, k_TKE, v_TKE)
        return self.attention(q_THE, cache, self.plan, rule)


@dataclass(frozen=True, slots=True)
class NativeStep:
    """The same for native code; fused layers put here what all of them share."""

    rows: PagedRows
    caches: dict[int, CacheRecord]
    shared: dict[int, LayerStep] = field(default_factory=dict)

    def attend(self, layer: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, rule: AttentionRule) -> Tensor:
        """[T, H, E], in native code."""
        return native_paged_attention(q_THE, k_TKE, v_TKE, self.caches[layer], self.rows, rule)


Step = PagedStep | VarlenStep | NativeStep


class KVCache:
    """Keys and values of every layer, in blocks of so many token slots."""

    def __init__(
        self,
        shapes: dict[int, LayerShape],
        block_count: int,
        block_tokens: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        def zeros(heads: int, width: int) -> Tensor:
            return _zeros((block_count, block_tokens, heads, width), dtype, device)

        self.layers = {
            index: LayerCache(
                zeros(shape.kv_heads, shape.key_width), zeros(shape.kv_heads, shape.value_width)
            )
            for index, shape in shapes.items()
        }

    def native_records(self) -> dict[int, CacheRecord]:
        """The same for native code; valid as long as this object lives."""
        return {index: cache_record(cache) for index, cache in self.layers.items()}


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU the memory is taken page by page as it is written, since most of a cache never is."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    raw = numpy.zeros(math.prod(shape) * dtype.itemsize, dtype=numpy.uint8)  # calloc; torch.zeros would write
    return torch.from_numpy(raw).view(dtype).view(shape)


def bytes_per_token(shapes: dict[int, LayerShape], dtype: torch.dtype) -> int:
    """Memory of one position over all layers."""
    return sum(shape.values_per_token for shape in shapes.values()) * dtype.itemsize


def use_paged_attention(model: nn.Module) -> None:
    """Makes every attention layer of a transformers model call `_paged_forward`.

    Raises:
        UnsupportedBaseError: the architecture does not take another attention.
    """
    AttentionInterface.register(ATTENTION_NAME, _paged_forward)
    use_attention(model, ATTENTION_NAME)


def _paged_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    paged: Step,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """As transformers calls it: query [1, H, T, E], key and value [1, K, T, E]; returns [1, T, H, E].

    What else a layer passes changes nothing: probe.py has seen to that.
    """
    layer = int(module.layer_idx)  # type: ignore[arg-type]  # set by every transformers attention
    rule = AttentionRule(scaling or query.shape[-1] ** -0.5, sliding_window, softcap)
    q_THE, k_TKE, v_TKE = (x[0].transpose(0, 1) for x in (query, key, value))
    return paged.attend(layer, q_THE, k_TKE, v_TKE, rule)[None], None
