"""Asks a model, once, what each of its attention layers keeps and how it scores. Knows no cache, no requests.

Whatever an attention layer asks for and paged attention would not do is refused here, before anything is
served: unknown arguments, positions that a mask hides or shows, results that differ from the model's own.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from adapters.errors import UnsupportedBaseError
from kernels.paged_attention import AttentionRule, attend

PROBE_NAME = "quickchange_probe"

_TOKENS = 5
_TOLERANCE, _ROUNDED_TOLERANCE = 0.1, 0.3
"""Of logits, relative to the largest. SmolLM2 measures 2e-6 in float32, and 0.05 with bfloat16 activations;
products may be bfloat16 in either. Attention of another kind differs by as much as the logits themselves."""
_LONGEST_MASK = 2**17
_NO_EFFECT = frozenset(
    {"position_ids", "position_embeddings", "cache_position", "use_cache", "logits_to_keep"}
)
"""Arguments that models hand on to their attention and that it does not compute with."""


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
class LayerProbe:
    """What was found out; stands in for a step while the model is asked."""

    shapes: dict[int, LayerShape] = field(default_factory=dict)
    rules: dict[int, AttentionRule] = field(default_factory=dict)


def probe_layers(model: nn.Module, device: torch.device) -> LayerProbe:
    """What each attention layer would keep, and how it scores; runs a few tokens through the model.

    Raises:
        UnsupportedBaseError: paged attention would not compute what the model does; the message says why.
    """
    AttentionInterface.register(PROBE_NAME, _probe_forward)
    AttentionMaskInterface.register(PROBE_NAME, _visible_positions)
    probe = LayerProbe()
    own_TV = _logits(model, device, "eager")
    try:
        found_TV = _logits(model, device, PROBE_NAME, paged=probe)
    except (TypeError, RuntimeError, LookupError) as error:
        raise _unsupported(model, f"it does not run with another attention: {error}") from error
    reason = _missing_layers(model, probe) or _other_results(found_TV, own_TV)
    if reason:
        raise _unsupported(model, reason)
    return probe


def _missing_layers(model: Any, probe: LayerProbe) -> str | None:
    layers = model.config.get_text_config().num_hidden_layers
    if sorted(probe.shapes) == list(range(layers)):
        return None
    return (
        f"{len(probe.shapes)} of {layers} layers keep keys and values in the usual way; hybrid, recurrent "
        "and shared-cache architectures are not served"
    )


def _other_results(found_TV: Tensor, own_TV: Tensor) -> str | None:
    difference = float((found_TV.float() - own_TV.float()).abs().max() / own_TV.float().abs().max())
    if difference <= (_TOLERANCE if found_TV.dtype == torch.float32 else _ROUNDED_TOLERANCE):
        return None
    return (
        "its attention computes something that paged attention does not know; logits differ by "
        f"{difference:.1e} of the largest"
    )


def use_attention(model: nn.Module, name: str) -> None:
    """Makes every attention layer of a transformers model call the function registered under a name.

    Raises:
        UnsupportedBaseError: the architecture does not take another attention.
    """
    try:
        model.set_attn_implementation(name)  # type: ignore[operator]  # PreTrainedModel's
    except ValueError as error:
        raise _unsupported(model, f"its attention cannot be replaced: {error}") from error


def _unsupported(module: nn.Module, reason: str) -> UnsupportedBaseError:
    return UnsupportedBaseError(
        f"{type(module).__name__} cannot be served: {reason}; docs/guides/models.md lists what can be"
    )


def _logits(model: nn.Module, device: torch.device, attention: str, **keywords: object) -> Tensor:
    """[tokens, vocabulary] of a few tokens."""
    use_attention(model, attention)
    ids = torch.arange(_TOKENS, device=device)[None]
    with torch.inference_mode():
        logits: Tensor = model(input_ids=ids, position_ids=ids, use_cache=False, **keywords).logits
    return logits[0]


def _visible_positions(
    *, mask_function: Callable[..., Tensor], config: Any, device: torch.device, **_: object
) -> Tensor:
    """In place of a mask: which of a long sequence's positions two of its queries see, [1, 1, 2, positions].

    Which tokens are there makes no difference: masks are functions of positions.
    """
    length = min(getattr(config, "max_position_embeddings", None) or _LONGEST_MASK, _LONGEST_MASK)
    zero, keys = (
        torch.zeros((1, 1, 1, 1), dtype=torch.long, device=device),
        torch.arange(length, device=device),
    )
    queries = _queries(length).to(device)
    return mask_function(zero, zero, queries[None, None, :, None], keys[None, None, None]).expand(1, 1, 2, -1)


def _queries(length: int) -> Tensor:
    """The last position and another: a chunk that ends there as a window does ends elsewhere here."""
    return torch.tensor([length * 2 // 3 - 1, length - 1])


def _probe_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    paged: LayerProbe | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """As transformers calls it: query [1, H, T, E], key and value [1, K, T, E]; returns [1, T, H, E]."""
    layer = int(module.layer_idx)  # type: ignore[arg-type]  # set by every transformers attention
    if paged is None:
        raise _unsupported(module, "it is not handed what its model is called with")
    if layer in paged.rules:
        raise _unsupported(
            module, "it attends more than once, to values of which only the last would be kept"
        )
    reason = _unknown_argument(others) or _unknown_mask(attention_mask, sliding_window)
    if reason:
        raise _unsupported(module, reason)
    rule = AttentionRule(scaling or query.shape[-1] ** -0.5, sliding_window, softcap)
    paged.rules[layer] = rule
    paged.shapes[layer] = LayerShape(key.shape[1], key.shape[3], value.shape[3])
    groups, tokens = query.shape[1] // key.shape[1], query.shape[2]
    mask = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()
    if sliding_window is not None:
        mask = mask.triu(1 - sliding_window)
    keys, values = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return attend(query, keys, values, mask, rule).transpose(1, 2), None


def _unknown_argument(others: dict[str, object]) -> str | None:
    """Why an argument of an attention layer cannot be ignored; None if all can."""
    if others.pop("is_causal", None) is False:
        return "it looks ahead"
    if others.pop("dropout", None):
        return "it drops activations at random outside training"
    asked = [name for name, value in others.items() if value is not None and value is not False]
    unknown = sorted(set(asked) - _NO_EFFECT)
    return f"it asks for {', '.join(unknown)}, which paged attention does not do" if unknown else None


def _unknown_mask(mask: Tensor | None, window: int | None) -> str | None:
    """Why a mask of `_visible_positions` is not what paged attention does; None if it is."""
    if mask is None:
        return "its mask is not made by transformers"
    query_21, key_L = _queries(mask.shape[-1]).to(mask.device)[:, None], torch.arange(mask.shape[-1])
    expected_2L = key_L.to(mask.device) <= query_21
    if window is not None:
        expected_2L &= key_L.to(mask.device) > query_21 - window
    if (
        mask.shape == (1, 1, *expected_2L.shape)
        and mask.dtype == torch.bool
        and torch.equal(mask[0, 0], expected_2L)
    ):
        return None
    seen = "the whole past" if window is None else f"the last {window} positions"
    return f"its mask is not that of {seen}; chunked, block-wise and learned masks are not served"
