"""Tiny models whose tokenizers have merges, and texts that tell apart how they are cut."""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from tests.models import CHAT_TEMPLATE, FAMILIES, Architecture, build_tiny_model, rewrite_config

_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
)
_LONG = _CUT + r"|\s+(?!\S)|\s+"

TEXTS = (
    "Hello, world! It is 1234567 o'clock, and 89 more.",
    " leading  and   inner    spaces\n\n\n  and\ttabs \r\n then x \n",
    "I'll DON'T can't we'Re it'S o'clock'd 'tis''s",
    "日本語のテキスト 😀👩\u200d👩\u200d👧 naïve café e\u0301 ﬁ Ω≈ç√ Привет мир",
    "<|user|>What is 2+2?<|end|><|assistant|>4</s> and <|no such|> <mine> <min",
    "def f(x):\n    return x**2  # (comment)...!!!\n\n\n\n",
    "    ", "\n", "a", "\u00a0nbsp\u2003em ٣٤٥ ½ ² Ⅳ x\u0000y",
)  # fmt: skip
_CORPUS = [*TEXTS, "the capital of France is Paris, and it's the year 2024; they'll say 123 or 1234."] * 20
_SPECIAL = ("<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>")


def build_exportable(
    folder: Path, architecture: Architecture = "llama", rule: str = "gpt-2", *, with_bos: bool = False
) -> Path:
    """A tiny model without a sliding window, with a tokenizer of 16 merges; returns the folder.

    Args:
        rule: llama.cpp's name of how text is cut into words.
        with_bos: whether the tokenizer begins each text with a token of its own.
    """
    build_tiny_model(folder, architecture)
    tokenizer = _tokenizer(rule, with_bos=with_bos)
    tokenizer.save_pretrained(folder)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    rewrite_config(folder, **FAMILIES[architecture].plain, **ids)
    (folder / "generation_config.json").write_text(json.dumps(ids))
    return folder


def _tokenizer(rule: str, *, with_bos: bool) -> PreTrainedTokenizerFast:
    backend = Tokenizer(tokenizer_models.BPE(ignore_merges=rule == "llama-bpe"))
    backend.pre_tokenizer = _RULES[rule]
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        _CORPUS, trainers.BpeTrainer(vocab_size=272, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=list(_SPECIAL[3:]),
        model_max_length=512,
    )
    tokenizer.add_tokens([AddedToken("<mine>", normalized=False)])
    tokenizer.chat_template = CHAT_TEMPLATE
    if with_bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
    return tokenizer


def _long(digits: str) -> pre_tokenizers.PreTokenizer:
    cut = pre_tokenizers.Split(Regex(_LONG.replace("DIGITS", digits)), behavior="isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_RULES = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": _long("{1,3}"),
    "qwen2": _long(""),
}
RULES = tuple(_RULES)
