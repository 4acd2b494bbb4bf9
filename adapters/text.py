"""Owns what of a base turns text into tokens: tokenizer, chat template, ends, context. Knows no weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig

from adapters.cache import default_cache_dir
from adapters.errors import UnsupportedBaseError
from adapters.sources import resolve_source
from adapters.support import supported_config

_NO_LIMIT = 1_000_000_000  # tokenizers without a limit say 1e30


@dataclass(frozen=True, slots=True)
class BaseText:
    """A base as far as text goes; the attributes are those of `adapters.base.Base`."""

    tokenizer: Any
    chat_template: str | None
    eos_token_ids: frozenset[int]
    max_context_tokens: int


def load_text(source: str, *, cache_dir: Path | None = None, progress: bool = True) -> BaseText:
    """Of a base that can be served, without loading its weights; the first time it may be fetched.

    Args:
        source: as `adapters.base.load_base` takes it.

    Raises:
        BaseNotFoundError: the source is not there or cannot be read.
        UnsupportedBaseError: its architecture or form cannot be served.
    """
    folder = resolve_source(source, cache_dir or default_cache_dir(), progress=progress).folder
    config = supported_config(folder)
    return text_of(folder, config, generation_config(folder, config))


def text_of(folder: Path, config: Any, generation: Any) -> BaseText:
    """What the files of a model folder say."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return BaseText(
        tokenizer=tokenizer,
        chat_template=_default_template(tokenizer),
        eos_token_ids=_eos_token_ids(generation, tokenizer),
        max_context_tokens=_max_context_tokens(config, tokenizer),
    )


def generation_config(folder: Path, config: Any) -> Any:
    """That of the folder, else what the model's own configuration implies."""
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    return GenerationConfig.from_model_config(config)


def _default_template(tokenizer: Any) -> str | None:
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def _eos_token_ids(generation: Any, tokenizer: Any) -> frozenset[int]:
    configured = generation.eos_token_id
    ids = [configured] if isinstance(configured, int) else list(configured or ())
    return frozenset(token for token in [*ids, tokenizer.eos_token_id] if token is not None)


def _max_context_tokens(config: Any, tokenizer: Any) -> int:
    positions = getattr(config, "max_position_embeddings", None)
    limit = tokenizer.model_max_length if positions is None else positions
    if limit > _NO_LIMIT:
        raise UnsupportedBaseError(
            f"{config.model_type} states no context length; add max_position_embeddings to its config.json"
        )
    return int(limit)
