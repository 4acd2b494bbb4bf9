"""Plain model folders: a model written with all that belongs to it, and weights read one at a time.

What is written needs nothing of this project. Knows no adapters and no training.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.core_model_loading import revert_weight_conversion

from adapters.base import Base
from adapters.errors import BaseModelError
from adapters.fingerprint import StoredTensor, stored_tensors, weight_files
from adapters.quantize import progress_bars

_GENERATION_FILE: Final = "generation_config.json"


def save_model(
    folder: Path,
    base: Base,
    model: Any,
    *,
    dtype: str,
    chat_template: str | None,
    shard_bytes: int | None = None,
) -> None:
    """Fills the folder; the model is rounded to `dtype` in place.

    Args:
        base: gives tokenizer and generation configuration.
        model: in transformers' own layers.
        chat_template: None for the base's own.
        shard_bytes: what a file of weights holds at most; None for what transformers does.

    Raises:
        BaseModelError: a weight is too large for `dtype`.
    """
    model.to(getattr(torch, dtype))
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise overflow(name, parameter.dtype)
    sizes = {} if shard_bytes is None else {"max_shard_size": shard_bytes}
    _save(folder, base, model, dtype=dtype, chat_template=chat_template, **sizes)


def save_all_but_weights(
    folder: Path, base: Base, model: Any, *, dtype: str, chat_template: str | None
) -> None:
    """As `save_model`, but for the weights, which the model need not have."""
    model.to(getattr(torch, dtype))
    _save(folder, base, model, dtype=dtype, chat_template=chat_template, state_dict={})


def overflow(name: str, dtype: torch.dtype) -> BaseModelError:
    """What is raised of a weight that is too large for a type."""
    return BaseModelError(f"{name} overflows {str(dtype).removeprefix('torch.')}; save it in float32")


def _save(
    folder: Path, base: Base, model: Any, *, dtype: str, chat_template: str | None, **options: Any
) -> None:
    model.config.dtype = dtype
    own_template = base.tokenizer.chat_template
    try:
        base.tokenizer.chat_template = chat_template or own_template
        base.tokenizer.save_pretrained(folder)
    finally:
        base.tokenizer.chat_template = own_template
    original = base.folder / _GENERATION_FILE
    if original.is_file():  # copied: save_pretrained refuses many that are published and work
        model.generation_config = GenerationConfig()
    with progress_bars(False), writing("the model"):
        model.save_pretrained(folder, **options)
    if original.is_file():
        shutil.copyfile(original, folder / _GENERATION_FILE)


def untie(model: Any, head: nn.Module) -> None:
    """Gives the head a weight of its own: live, an adapter on the head does not change the embedding."""
    embedding = model.get_input_embeddings()
    if head.weight is not embedding.weight:
        return
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def stored_weights(folder: Path, model: Any) -> Callable[[str, Tensor], Tensor]:
    """Reads one weight of a model folder at a time, as it is stored: by its name, of the shape of another.

    Args:
        model: of the same architecture; what it calls a weight may have another name in files.

    Raises:
        BaseModelError: the folder has no weights; on reading, it has no such one.
    """
    stored, names_in_files = all_weights(folder), _names_in_files(model)

    def read(name: str, like: Tensor) -> Tensor:
        shape, name = "is missing", names_in_files.get(name, name)
        if name in stored:
            weight = read_weight(stored[name])
            if weight.shape == like.shape:
                return weight
            shape = f"is {tuple(weight.shape)}"
        raise BaseModelError(
            f"{folder}: {name} {shape}, {tuple(like.shape)} is expected; give the base it was made from"
        )

    return read


def _names_in_files(model: Any) -> dict[str, str]:
    """By transformers' rules for saving; without weights that are saved in parts, or as a part of others."""
    state = {name: weight.to("meta") for name, weight in model.state_dict().items()}
    names = {id(weight): name for name, weight in state.items()}
    saved = revert_weight_conversion(model, state)
    return {names[id(weight)]: stored for stored, weight in saved.items() if id(weight) in names}


@contextmanager
def writing(name: str) -> Iterator[None]:
    """Around a call of safetensors that writes, whose error for a full disk is no OSError."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{name} cannot be written: {error}") from error


def all_weights(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model folder by its name, without reading any.

    Raises:
        BaseNotFoundError: the folder has no weights, or damaged ones.
    """
    return {stored.name: stored for path in weight_files(folder) for stored in stored_tensors(path)}


def read_weight(stored: StoredTensor) -> Tensor:
    """One of `all_weights`, as it is stored."""
    with safe_open(stored.path, "pt") as file:
        weight: Tensor = file.get_tensor(stored.name)
    return weight
