"""Token ids to text for the engine's thread. Knows tokenizers, not requests."""

from typing import Any

from tokenizers import Tokenizer

from server.detokenizer import Decoder


def decoder_of(tokenizer: Any) -> Decoder:
    """A decoder for the engine's thread alone: a tokenizer that others encode with must not be shared."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return _SlowDecoder(tokenizer)
    return _FastDecoder(Tokenizer.from_str(backend.to_str()))


class _FastDecoder:
    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend

    def decode(self, token_ids: list[int]) -> str:
        text: str = self._backend.decode(token_ids, skip_special_tokens=True)
        return text


class _SlowDecoder:
    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text
