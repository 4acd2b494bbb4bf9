"""Key and value tensors of every layer, and the attention that models call. Knows no requests.

K key/value heads, H query heads, E head dimension, T tokens of the batch.
"""

import math
from dataclasses import dataclass, field

import numpy
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from adapters.errors import UnsupportedBaseError
from kernels.decoder_layer import LayerStep
from kernels.paged_attention import AttentionPlan, AttentionRule, LayerCache, attend, paged_attention
from kernels.paging import PagedRows, cache_record, native_paged_attention
from kernels.structs import CacheRecord

ATTENTION_NAME = "quickchange_paged"


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one attention layer keeps per token."""

    kv_heads: int
    key_width: int
    value_width: int

    @property
    def values_per_token(self) -> int:
        return self.kv_heads * (self.key_width + self.value_width)


@dataclass(frozen=True, slots=True)
class PagedStep:
    """What an attention layer needs of the current step; travels through the model as keyword `paged`."""

    plan: AttentionPlan
    caches: dict[int, LayerCache]

    def attend(self, layer: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, rule: AttentionRule) -> Tensor:
        """[T, H, E], in plain torch."""
        return paged_attention(q_THE, k_TKE, v_TKE, self.caches[layer], self.plan, rule)


@dataclass(frozen=True, slots=True)
class NativeStep:
    """The same for native code; fused layers put here what all of them share."""

    rows: PagedRows
    caches: dict[int, CacheRecord]
    shared: dict[int, LayerStep] = field(default_factory=dict)

    def attend(self, layer: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, rule: AttentionRule) -> Tensor:
        """[T, H, E], in native code."""
        return native_paged_attention(q_THE, k_TKE, v_TKE, self.caches[layer], self.rows, rule)


@dataclass(frozen=True, slots=True)
class LayerProbe:
    """Stands in for a step while the model is asked, once, what each attention layer does."""

    shapes: dict[int, LayerShape] = field(default_factory=dict)
    rules: dict[int, AttentionRule] = field(default_factory=dict)


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
    try:
        model.set_attn_implementation(ATTENTION_NAME)  # type: ignore[operator]  # PreTrainedModel's
    except ValueError as error:
        raise UnsupportedBaseError(
            f"{type(model).__name__} does not let its attention be replaced, so it cannot be served: {error}"
        ) from error


def probe_layers(model: nn.Module, device: torch.device) -> LayerProbe:
    """Runs two tokens through the model and returns what each attention layer would keep, and how it scores.

    Raises:
        UnsupportedBaseError: some layer did not use the replaced attention, so its state would be lost.
    """
    probe = LayerProbe()
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    with torch.inference_mode():
        model(input_ids=ids, position_ids=torch.arange(2, device=device)[None], use_cache=False, paged=probe)
    expected = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
    if sorted(probe.shapes) != list(range(expected)):
        raise UnsupportedBaseError(
            f"{type(model).__name__}: {len(probe.shapes)} of {expected} layers keep keys and values in the "
            "usual way; hybrid, recurrent and shared-cache architectures cannot be served yet"
        )
    return probe


def _paged_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    paged: PagedStep | NativeStep | LayerProbe,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_unused: object,
) -> tuple[Tensor, None]:
    """As transformers calls it: query [1, H, T, E], key and value [1, K, T, E]; returns [1, T, H, E]."""
    layer = int(module.layer_idx)  # type: ignore[arg-type]  # set by every transformers attention
    rule = AttentionRule(scaling or query.shape[-1] ** -0.5, sliding_window, softcap)
    if isinstance(paged, LayerProbe):
        paged.rules[layer] = rule
        paged.shapes[layer] = LayerShape(key.shape[1], key.shape[3], value.shape[3])
        return _probe_attention(query, key, value, rule), None
    q_THE, k_TKE, v_TKE = (x[0].transpose(0, 1) for x in (query, key, value))
    return paged.attend(layer, q_THE, k_TKE, v_TKE, rule)[None], None


def _probe_attention(query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    keys, values = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return attend(query, keys, values, mask, rule).transpose(1, 2)
