"""Owns turning a GGUF file into a model folder: safetensors and tokenizer. Knows no caches, no serving."""

import functools
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.integrations.gguf.reader import read_gguf_metadata
from transformers.utils.quantization_config import GgufConfig

from adapters.errors import BaseNotFoundError, UnsupportedBaseError
from adapters.quantize import progress_bars

log = logging.getLogger(__name__)


def convert_gguf(file: Path, folder: Path, *, progress: bool) -> None:
    """Writes the model and tokenizer of a GGUF file into `folder`: bfloat16, nothing quantised.

    Raises:
        BaseNotFoundError: not a GGUF file, or a damaged one.
        UnsupportedBaseError: transformers cannot read this architecture or tokenizer from GGUF.
    """
    metadata = _read_metadata(file)
    with _parsed_once(), progress_bars(progress):
        try:
            model = _load_model(file)
            tokenizer = _load_tokenizer(file, metadata)
        except Exception as error:  # what it cannot read, transformers meets with many types
            raise UnsupportedBaseError(
                f"{file.name} (architecture {metadata.get('general.architecture')!r}) cannot be converted: "
                f"{error}; give the original safetensors folder"
            ) from error
    tokenizer.model_max_length = model.config.get_text_config().max_position_embeddings
    vars(model.config).pop("quantization_config", None)  # else the folder claims to be packed GGUF
    with progress_bars(progress):
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _drop_defaults(folder / "config.json", type(model.config))


def _read_metadata(file: Path) -> dict[str, Any]:
    try:
        metadata: dict[str, Any] = read_gguf_metadata(str(file))[0]
    except Exception as error:  # a damaged file fails in numpy, in struct or in the reader's own checks
        raise BaseNotFoundError(f"{file} is not a readable GGUF file ({error}); download it again") from error
    return metadata


def _load_model(file: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        local_files_only=True,
        trust_remote_code=False,
    )


def _load_tokenizer(file: Path, metadata: dict[str, Any]) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(
        file.parent, gguf_file=file.name, local_files_only=True, trust_remote_code=False
    )
    split = metadata.get("tokenizer.ggml.pre")
    if metadata.get("tokenizer.ggml.model") != "gpt2" or split in GGUF_PRE_TOKENIZER_SPLITS:
        return tokenizer
    if split == "smollm":  # transformers leaves out that SmolLM splits numbers into digits first
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
            ]
        )
    elif split not in {"gpt-2", "default", None}:
        log.warning(
            "%s splits text by rule %r, unknown here: token ids may differ from the original model's; "
            "give the original safetensors folder to be sure",
            file.name,
            split,
        )
    return tokenizer


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Lets transformers' parses of one GGUF file share a result: 12 s instead of 27 s for SmolLM2.

    It reads the whole vocabulary in Python for each of configuration, weights and tokenizer, and builds the
    table of tensor names again for every module.
    """
    originals = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        for name, original in originals.items():
            setattr(gguf, name, functools.cache(original))
        yield
    finally:
        for name, original in originals.items():
            setattr(gguf, name, original)


def _drop_defaults(path: Path, config_class: Any) -> None:
    """Keeps of config.json only what differs from the architecture's defaults.

    The fingerprint is taken of this file; what another transformers version would add must not change it.
    """
    defaults = config_class().to_dict()
    keep = {"architectures", "dtype", "model_type", "transformers_version"}
    config = json.loads(path.read_bytes())
    kept = {key: value for key, value in config.items() if key in keep or defaults.get(key) != value}
    for name in ("_name_or_path", "_model_name_or_path"):
        kept.pop(name, None)
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")
