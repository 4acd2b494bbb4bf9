"""Tiny random models of each supported family, with a tokenizer, for tests that need a real one.

Weights are wide enough (standard deviation 0.5 in the embedding, logits well apart) that greedy tokens vary
and ties do not happen. The tokenizer is byte-level: one token per byte and a few special ones.
"""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

Architecture = Literal["llama", "qwen2", "qwen3", "mistral", "gemma"]
ARCHITECTURES: tuple[Architecture, ...] = ("llama", "qwen2", "qwen3", "mistral", "gemma")

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
    tokenizer = build_tokenizer()
    config = AutoConfig.for_model(
        architecture,
        vocab_size=PADDED_VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=MAX_CONTEXT,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **({"sliding_window": None} if architecture == "mistral" else {}),
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
