"""Owns what a GGUF file says of text: vocabulary, merges, special tokens, chat template. Knows no weights.

Only byte-level BPE whose rule for cutting text into words llama.cpp has too. The rule is recognised by
itself, not by the model's name: what llama.cpp would cut in another way is refused.
"""

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import gguf
from tokenizers import pre_tokenizers
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from adapters.errors import UnsupportedBaseError
from adapters.text import BaseText

_OTHERWISE: Final = "llama.cpp would make other tokens of the same text; serve it with quickchange or vLLM"
_PLAIN_BPE: Final = MappingProxyType(
    {
        "byte_fallback": False,
        "continuing_subword_prefix": None,
        "dropout": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
    }
)
_ENDS: Final = ("add_eos_token_id", "add_eot_token_id", "add_eom_token_id")
"""Places for tokens that end an answer; each of them does."""


def _bytes(*, uses_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "use_regex": uses_regex}


def _split(name: str) -> list[dict[str, Any]]:
    pattern = {"Regex": GGUF_PRE_TOKENIZER_SPLITS[name]}
    cut = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    return [cut, _bytes(uses_regex=False)]


_RULES: Final[Mapping[str, tuple[list[dict[str, Any]], bool]]] = MappingProxyType(
    {
        "gpt-2": ([_bytes(uses_regex=True)], False),
        "smollm": ([{"type": "Digits", "individual_digits": True}, _bytes(uses_regex=True)], False),
        "llama-bpe": (_split("llama-bpe"), True),
        "qwen2": (_split("qwen2"), False),
    }
)
"""By llama.cpp's name: the steps as tokenizers writes them, and whether a whole word needs no merges."""


def write_text(writer: Any, text: BaseText, vocab_size: int) -> None:
    """Adds all that makes llama.cpp find the tokenizer's tokens in a text, and end an answer where it ends.

    Args:
        writer: a gguf.GGUFWriter.
        vocab_size: rows of the embedding; those without a token get a name of their own.

    Raises:
        UnsupportedBaseError: llama.cpp has no such tokenizer.
    """
    tokenizer = text.tokenizer
    backend = _backend(tokenizer)
    merges = backend["model"]["merges"]
    writer.add_tokenizer_model("gpt2")  # llama.cpp's name of byte-level BPE
    writer.add_tokenizer_pre(_rule(backend))
    tokens, types = _vocabulary(tokenizer, backend, vocab_size)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([each if isinstance(each, str) else " ".join(each) for each in merges])
    _write_special(writer, text)
    if text.chat_template is not None:
        writer.add_chat_template(text.chat_template)


def _backend(tokenizer: Any) -> dict[str, Any]:
    """tokenizer.json, as the tokenizer in memory would write it."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        raise UnsupportedBaseError(f"its tokenizer has no tokenizer.json; {_OTHERWISE}")
    backend: dict[str, Any] = json.loads(fast.to_str())
    model = backend["model"]
    odd = [name for name, plain in _PLAIN_BPE.items() if (model.get(name) or None) != (plain or None)]
    if model.get("type") != "BPE" or odd:
        raise UnsupportedBaseError(
            f"its tokenizer ({', '.join([str(model.get('type')), *odd])}) is no byte-level BPE, and GGUF "
            f"files are written of no other kind; {_OTHERWISE}"
        )
    if not model["merges"]:
        raise UnsupportedBaseError("its tokenizer has no merges, and llama.cpp reads none without")
    return backend


def _rule(backend: Mapping[str, Any]) -> str:
    """llama.cpp's name for how text is cut into words."""
    steps, whole_words = _steps(backend["pre_tokenizer"]), bool(backend["model"].get("ignore_merges"))
    normal = backend["normalizer"]
    for name, rule in _RULES.items():
        # llama.cpp takes text as it is; composed characters (NFC) are what nearly all text has anyway
        if rule == (steps, whole_words) and normal in (None, {"type": "NFC"}):
            return name
    raise UnsupportedBaseError(
        f"its tokenizer cuts text by {json.dumps(steps)} (normalizer {json.dumps(normal)}, ignore_merges "
        f"{json.dumps(whole_words)}), none of {', '.join(_RULES)}; {_OTHERWISE}"
    )


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Without what decides only where in the text a token is said to lie."""
    if pre_tokenizer is None:
        return []
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    return [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]


def _vocabulary(
    tokenizer: Any, backend: Mapping[str, Any], vocab_size: int
) -> tuple[list[str], list[gguf.TokenType]]:
    by_id = {place: token for token, place in tokenizer.get_vocab().items()}
    if max(by_id) >= vocab_size:
        raise UnsupportedBaseError(
            f"its tokenizer has token {max(by_id)}, its embedding {vocab_size} rows; the folder is incomplete"
        )
    added = {entry["id"]: entry for entry in backend["added_tokens"]}
    spaced = [entry["content"] for entry in added.values() if _is_spaced(entry)]
    if spaced:
        raise UnsupportedBaseError(f"its token {spaced[0]!r} takes in the space beside it; {_OTHERWISE}")
    _check_bytes(by_id[place] for place in by_id.keys() - added.keys())
    tokens = [by_id.get(place, f"[PAD{place}]") for place in range(vocab_size)]
    return tokens, [_type(place in by_id, added.get(place)) for place in range(vocab_size)]


def _is_spaced(entry: Mapping[str, Any]) -> bool:
    return bool(entry["lstrip"] or entry["rstrip"] or entry["single_word"])


def _check_bytes(tokens: Any) -> None:
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    odd = next((token for token in tokens if not alphabet.issuperset(token)), None)
    if odd is not None:
        raise UnsupportedBaseError(f"its token {odd!r} is not spelled in bytes; {_OTHERWISE}")


def _type(exists: bool, added: Mapping[str, Any] | None) -> gguf.TokenType:
    if not exists:
        return gguf.TokenType.UNUSED
    if added is None:
        return gguf.TokenType.NORMAL
    return gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED


def _write_special(writer: Any, text: BaseText) -> None:
    tokenizer = text.tokenizer
    bos, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    ends = sorted(text.eos_token_ids, key=lambda token: (token != end, token))
    if len(ends) > len(_ENDS):
        raise UnsupportedBaseError(
            f"{len(ends)} tokens end its answers, and GGUF has places for {len(_ENDS)}; shorten eos_token_id "
            "in its generation_config.json"
        )
    for add, token in zip(_ENDS, ends, strict=False):
        getattr(writer, add)(token)
    for add, token in (
        (writer.add_bos_token_id, bos),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if token is not None:
            add(token)
    before, after = _around(tokenizer)
    if before not in ([], [bos]) or after not in ([], [end]):
        raise UnsupportedBaseError(
            f"its tokenizer puts {before} before a text and {after} after it, llama.cpp at most its bos and "
            "its eos token; change its post-processor"
        )
    writer.add_add_bos_token(bool(before))
    writer.add_add_eos_token(bool(after))


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer adds to a text by itself."""
    whole: list[int] = tokenizer.encode("a")
    bare: list[int] = tokenizer.encode("a", add_special_tokens=False)
    start = next(at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
    return whole[:start], whole[start + len(bare) :]
