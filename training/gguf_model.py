"""Writes a model folder as a GGUF file, as llama.cpp and what is made of it load it. Knows no adapters.

The weights are the folder's own: of a merge into the dequantised base the live adapter's. Or they are what
the folder's are once quantised, on which adapters were trained.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from adapters.base import dequantized_base
from adapters.cache import default_cache_dir
from adapters.errors import BaseModelError, UnsupportedBaseError
from adapters.model_folder import all_weights, read_weight
from adapters.quantize import Quantization
from adapters.sources import resolve_source
from adapters.support import supported_config
from adapters.text import generation_config, text_of
from training.gguf_architecture import GgufArchitecture
from training.gguf_file import GgufTensor, GgufType, write_gguf
from training.gguf_text import write_text

_EMBEDDING: Final = "model.embed_tokens.weight"
_HEAD: Final = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class GgufReport:
    """What was written.

    Attributes:
        architecture: llama.cpp's name.
        type: of its matrices.
    """

    file: Path
    architecture: str
    type: GgufType
    tensors: int
    size_bytes: int


def export_gguf(
    source: str,
    out: Path,
    *,
    to: GgufType = "bf16",
    quantization: Quantization = "none",
    cache_dir: Path | None = None,
    progress: bool = True,
) -> GgufReport:
    """Writes one GGUF file with weights, tokenizer and chat template.

    Args:
        source: a model folder such as `merge` writes, or what else `adapters.base.load_base` takes.
        out: must not exist yet; appears complete or not at all.
        quantization: "nf4" for the weights that a base in NF4 stands for, to put beside `export_gguf_lora`'s.

    Raises:
        BaseModelError: the model cannot be read, or llama.cpp does not compute it in the same way.
        FileExistsError: out exists.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists already; remove it or choose another --out")
    found = resolve_source(source, cache_dir or default_cache_dir(), progress=progress)
    config = supported_config(found.folder)
    architecture = GgufArchitecture(config)
    text = text_of(found.folder, config, generation_config(found.folder, config))
    if quantization == "none":
        weights = _stored(found.folder)
    else:
        weights = _dequantized(source, quantization, cache_dir, progress=progress)
    _check_ends(weights, config, found.name)
    vocab_size = weights[_EMBEDDING].shape[0]
    extra = architecture.extra_tensors()
    tensors = [GgufTensor.of(name, tensor) for name, tensor in extra.items()]
    tensors += [_placed(architecture, weight) for weight in weights.values()]

    def describe(writer: Any) -> None:
        writer.add_type("model")
        writer.add_name(found.name)
        architecture.write_parameters(writer, vocab_size)
        write_text(writer, text, vocab_size)

    try:
        write_gguf(out, architecture.name, tensors, describe, to=to, progress=progress)
    except UnsupportedBaseError as error:
        raise UnsupportedBaseError(f"{found.name} cannot be written as GGUF: {error}") from error
    return GgufReport(out, architecture.name, to, len(tensors), out.stat().st_size)


def _stored(folder: Path) -> dict[str, GgufTensor]:
    """Each read from the disk when it is its turn."""
    return {
        name: GgufTensor(name, stored.shape, partial(read_weight, stored))
        for name, stored in all_weights(folder).items()
    }


def _dequantized(
    source: str, quantization: Quantization, cache_dir: Path | None, *, progress: bool
) -> dict[str, GgufTensor]:
    base = dequantized_base(source, quantization=quantization, cache_dir=cache_dir, progress=progress)
    return {name: GgufTensor.of(name, weight) for name, weight in base.model.state_dict().items()}


def _check_ends(weights: dict[str, GgufTensor], config: Any, name: str) -> None:
    """Embedding and head; a head that is the embedding is left out: without one llama.cpp takes that.

    Raises:
        BaseModelError: one is missing.
    """
    if config.tie_word_embeddings:
        weights.pop(_HEAD, None)
    needed = [_EMBEDDING] if config.tie_word_embeddings else [_EMBEDDING, _HEAD]
    missing = next((each for each in needed if each not in weights), None)
    if missing is not None:
        raise BaseModelError(f"{name} has no {missing}; give a complete model folder")


def _placed(architecture: GgufArchitecture, weight: GgufTensor) -> GgufTensor:
    """Under llama.cpp's name and in its order."""
    module = weight.name.rpartition(".")[0]
    return GgufTensor(
        name=architecture.name_of(weight.name),
        shape=weight.shape,
        read=lambda: architecture.ordered(module, weight.read()),
    )
