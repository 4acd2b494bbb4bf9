"""Tiny random models of each supported family, with a tokenizer, for tests that need a real one.

Weights are wide enough (standard deviation 0.5 in the embedding, logits well apart) that greedy tokens vary
and ties do not happen. The tokenizer is byte-level: one token per byte and a few special ones.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

Architecture = Literal[
    "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "granite",
    "smollm3", "gpt_neox", "gpt_neox serial", "gpt2",
]  # fmt: skip


@dataclass(frozen=True)
class Projections:
    """Names of a layer's linear modules; one that computes several things has several roles."""

    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


@dataclass(frozen=True)
class Family:
    """What tests need to know of an architecture.

    Attributes:
        peculiar: configuration that switches on what sets it apart; windows are shorter than the prompts.
        plain: entries of config.json, each of which switches off one such thing.
        fused: whether native code computes its whole layers.
    """

    model_type: str
    peculiar: dict[str, Any] = field(default_factory=dict)
    plain: dict[str, Any] = field(default_factory=dict)
    layers: int = 2
    projections: Projections = Projections()
    fused: bool = True


_FUSED_PROJECTIONS = Projections("qkv_proj", "qkv_proj", "qkv_proj", gate="gate_up_proj", up="gate_up_proj")
_NEOX_PROJECTIONS = Projections(
    *["query_key_value"] * 3, "dense", "dense_h_to_4h", "dense_h_to_4h", "dense_4h_to_h"
)
_GPT2_PROJECTIONS = Projections(*["c_attn"] * 3, "c_proj", "c_fc", "c_fc", "mlp.c_proj")
_ROTATE_ALL = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0}
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"

FAMILIES: dict[Architecture, Family] = {
    "llama": Family("llama"),
    "qwen2": Family(
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
        {"layer_types": [_GLOBAL] * 2},
    ),
    "qwen3": Family("qwen3"),
    "mistral": Family("mistral", {"sliding_window": 6}, {"sliding_window": None}),
    "gemma": Family("gemma"),
    "gemma2": Family(
        "gemma2",
        {
            "sliding_window": 6,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 10.0,
            "query_pre_attn_scalar": 24,
        },
        {
            "layer_types": [_GLOBAL] * 3,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "query_pre_attn_scalar": 16,
        },
        layers=3,
    ),
    "gemma3_text": Family(
        "gemma3_text",
        {"sliding_window": 6, "layer_types": [_LOCAL, _GLOBAL, _LOCAL], "query_pre_attn_scalar": 24},
        {"layer_types": [_GLOBAL] * 3, "query_pre_attn_scalar": 16},
        layers=3,
    ),
    "phi3": Family("phi3", {"sliding_window": 9}, {"sliding_window": None}, projections=_FUSED_PROJECTIONS),
    "olmo2": Family("olmo2"),
    "granite": Family(
        "granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.6,
            "attention_multiplier": 0.4,
            "logits_scaling": 0.5,
        },
        {
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": 0.25,
            "logits_scaling": 1.0,
        },
    ),
    "smollm3": Family("smollm3", {"no_rope_layers": [1, 0, 1]}, {"no_rope_layers": [1, 1, 1]}, layers=3),
    "gpt_neox": Family(
        "gpt_neox",
        {"rotary_pct": 0.5},
        {"use_parallel_residual": False, "rope_parameters": _ROTATE_ALL},
        projections=_NEOX_PROJECTIONS,
        fused=False,
    ),
    "gpt_neox serial": Family(
        "gpt_neox",
        {"rotary_pct": 0.25, "use_parallel_residual": False},
        {"use_parallel_residual": True, "rope_parameters": _ROTATE_ALL},
        projections=_NEOX_PROJECTIONS,
        fused=False,
    ),
    "gpt2": Family(
        "gpt2",
        {"n_inner": 128, "scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_by_inverse_layer_idx": False},
        projections=_GPT2_PROJECTIONS,
        fused=False,
    ),
}
ARCHITECTURES: tuple[Architecture, ...] = tuple(FAMILIES)

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
VOCABULARY = 256 + len(SPECIAL_TOKENS)
PADDED_VOCABULARY = 288  # a multiple of 32, as 4-bit kernels like it
MAX_CONTEXT = 512

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tiny_model(folder: Path, architecture: Architecture = "llama", seed: int = 0) -> Path:
    """Writes a loadable model and tokenizer into `folder`, the same for the same seed; returns the folder."""
    tokenizer, family = build_tokenizer(), FAMILIES[architecture]
    config = AutoConfig.for_model(
        family.model_type,
        vocab_size=PADDED_VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=family.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=MAX_CONTEXT,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **family.peculiar,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _fill(model, seed)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, special tokens after them, a chat template, and no token added by default."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    backend = Tokenizer(tokenizer_models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=list(SPECIAL_TOKENS[3:]),
        model_max_length=MAX_CONTEXT,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    assert len(tokenizer) == VOCABULARY
    return tokenizer


def _fill(model: Any, seed: int) -> None:
    """Random weights whose activations keep their size through the layers and whose logits lie well apart."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms and biases: near what they are born as
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
                continue
            scale = 0.5 if "embed" in name or "lm_head" in name else parameter.shape[1] ** -0.5 * 1.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        model.get_output_embeddings().weight[VOCABULARY:] = 0.0  # ids without a token


def rewrite_config(folder: Path, **changes: object) -> None:
    """Changes keys of a saved model's config.json, to make a base that differs in one thing."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
