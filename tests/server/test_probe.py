"""What attention may ask for, and that whatever paged attention would not do is refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from adapters.errors import UnsupportedBaseError
from adapters.support import supported_config
from server.probe import probe_layers
from tests.adapters.bases import save_model
from tests.models import ARCHITECTURES, FAMILIES, Architecture, build_tiny_model, rewrite_config
from tests.server.test_fusion import SIZES

CPU = torch.device("cpu")


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_family_says_what_its_layers_keep(architecture: Architecture, tmp_path: Path) -> None:
    probe = probe_layers(load(build_tiny_model(tmp_path, architecture)), CPU)
    assert sorted(probe.shapes) == list(range(FAMILIES[architecture].layers))
    windows = [probe.rules[layer].window for layer in sorted(probe.rules)]
    expected = {"qwen2": [None, 6], "mistral": [6, 6], "phi3": [9, 9]}
    expected |= {"gemma2": [6, None, 6], "gemma3_text": [6, None, 6]}
    assert windows == expected.get(architecture, [None] * len(windows))
    softcap = 3.0 if architecture == "gemma2" else None
    assert {rule.softcap for rule in probe.rules.values()} == {softcap}


@pytest.mark.parametrize(
    ("model_type", "config", "reason"),
    [
        ("granite_swa", {"sliding_window": 8}, "asks for s_aux, which"),  # attention sinks
        ("diffllama", {}, "attends more than once"),
        ("nemotron", {"head_dim": 16}, "not handed what its model is called with"),
        ("doge", {}, "does not run with another attention"),  # builds its mask from values
    ],
)
def test_attention_of_another_kind_is_refused(
    model_type: str, config: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    """Neither class nor configuration shows it."""
    folder = save_model(tmp_path, model_type, **SIZES, **config)
    supported_config(folder)
    with pytest.raises(UnsupportedBaseError, match=rf"{reason}.*docs/guides/models\.md"):
        probe_layers(load(folder), CPU)


def with_attention(model: Any, change: Callable[[dict[str, Any]], None]) -> Any:
    """The model, whose layers call their attention with other arguments."""
    for layer in model.model.layers:
        attention = layer.self_attn
        plain = attention.forward

        def forward(*args: Any, plain: Any = plain, **keywords: Any) -> Any:
            change(keywords)
            return plain(*args, **keywords)

        attention.forward = forward
    return model


@pytest.mark.parametrize(
    ("argument", "value", "reason"),
    [
        ("s_aux", torch.zeros(4), "asks for s_aux"),
        ("head_mask", torch.ones(4), "asks for head_mask"),
        ("position_bias", torch.zeros(1, 4, 5, 5), "asks for position_bias"),
        ("is_causal", False, "looks ahead"),
        ("output_attentions", True, "asks for output_attentions"),
    ],
)
def test_an_argument_that_is_not_known_is_refused_by_name(
    argument: str, value: object, reason: str, tmp_path: Path
) -> None:
    def add(keywords: dict[str, Any]) -> None:
        if "paged" in keywords:
            keywords[argument] = value

    model = with_attention(load(build_tiny_model(tmp_path)), add)
    with pytest.raises(UnsupportedBaseError, match=f"LlamaAttention cannot be served: it {reason}"):
        probe_layers(model, CPU)


@pytest.mark.parametrize("value", [None, False])
def test_an_argument_that_is_off_is_no_obstacle(value: object, tmp_path: Path) -> None:
    model = with_attention(load(build_tiny_model(tmp_path)), lambda keywords: keywords.update(s_aux=value))
    assert len(probe_layers(model, CPU).rules) == 2


def test_dropout_outside_training_is_refused(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path)
    rewrite_config(folder, attention_dropout=0.1)
    probe_layers(load(folder), CPU)
    with pytest.raises(UnsupportedBaseError, match="drops activations at random"):
        probe_layers(load(folder).train(), CPU)


def visible(mask: Tensor, kind: str) -> Tensor:
    """A mask of the whole past, [1, 1, 2, positions], made narrower as some architectures do."""
    key_L, query_21 = torch.arange(mask.shape[-1]), mask[0, 0].sum(dim=-1, keepdim=True) - 1
    if kind == "chunked":  # Llama 4; the last chunk ends where a window would
        return mask & (key_L // 64 == query_21 // 64)
    if kind == "window":  # Qwen2-MoE; its attention is not told
        return mask & (key_L > query_21 - 6)
    return mask[..., :5]


@pytest.mark.parametrize("kind", ["chunked", "window", "cut off"])
def test_a_mask_that_paged_attention_would_not_make_is_refused(kind: str, tmp_path: Path) -> None:
    def narrow(keywords: dict[str, Any]) -> None:
        if "paged" in keywords:
            keywords["attention_mask"] = visible(keywords["attention_mask"], kind)

    model = with_attention(load(build_tiny_model(tmp_path)), narrow)
    with pytest.raises(UnsupportedBaseError, match="its mask is not that of the whole past"):
        probe_layers(model, CPU)


def test_scores_that_are_not_scaled_as_said_are_refused(tmp_path: Path) -> None:
    """What no argument shows, results do."""
    model = load(build_tiny_model(tmp_path))

    def louder(keywords: dict[str, Any]) -> None:
        if "paged" not in keywords:  # the model's own attention alone
            keywords["hidden_states"] = keywords["hidden_states"] * 3

    with pytest.raises(UnsupportedBaseError, match="computes something that paged attention does not know"):
        probe_layers(with_attention(model, louder), CPU)
