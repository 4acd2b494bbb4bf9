"""Writes a model's weights as safetensors shards, in pieces that need not be in memory together.

What comes out is byte for byte what transformers' save_pretrained writes. Knows no adapters and no base.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from adapters.weights import dtype_name

_INDEX: Final = "model.safetensors.index.json"
_ALIGNMENT: Final = 8
_LENGTH_BYTES: Final = 8

Blocks = Callable[[str], Iterable[Tensor]]
"""The elements of a tensor, in order, by its name in the file."""


def stored_names(model: Any) -> dict[str, str]:
    """Which weights of a model are saved: their names in the file, and those in its state dictionary.

    Args:
        model: may be on the meta device.
    """
    state = model.state_dict()
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    kept = remove_tied_weights_from_state_dict(state, model)
    names = {id(tensor): name for name, tensor in kept.items()}
    return {stored: names[id(tensor)] for stored, tensor in revert_weight_conversion(model, kept).items()}


def write_shards(
    folder: Path, tensors: Mapping[str, Tensor], blocks: Blocks, *, shard_bytes: int, parameters: int
) -> None:
    """Writes model.safetensors, or several files and their index where it would be larger than a shard.

    Args:
        tensors: type and shape of each, by its name in the file; their data is not looked at.
        blocks: asked for one tensor after another.
        shard_bytes: what a file holds at most, of several tensors; a larger tensor has one of its own.
        parameters: of the model, for the index.
    """
    meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    split = split_torch_state_dict_into_shards(meta, max_shard_size=shard_bytes)
    for file, names in split.filename_to_tensors.items():
        _write_file(folder / file, {name: meta[name] for name in names}, blocks)
    if split.is_sharded:
        index = {
            "metadata": {"total_parameters": parameters, **split.metadata},
            "weight_map": split.tensor_to_filename,
        }
        (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_file(path: Path, tensors: Mapping[str, Tensor], blocks: Blocks) -> None:
    """In the order in which safetensors lays tensors: the wider types first, each by name."""
    ordered = sorted(
        tensors, key=lambda name: (-tensors[name].dtype.itemsize, dtype_name(tensors[name]), name)
    )
    with path.open("wb", buffering=0) as file:
        file.write(_header(tensors, ordered))
        for name in ordered:
            _write_tensor(file, name, tensors[name], blocks(name))


def _header(tensors: Mapping[str, Tensor], ordered: list[str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in ordered:
        start, end = end, end + tensors[name].nbytes
        shape = list(tensors[name].shape)
        entries[name] = {"dtype": dtype_name(tensors[name]), "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    return len(header).to_bytes(_LENGTH_BYTES, "little") + header


def _write_tensor(file: BinaryIO, name: str, expected: Tensor, blocks: Iterable[Tensor]) -> None:
    written = 0
    for block in blocks:
        assert block.dtype == expected.dtype, f"{name} is written in the type that the header says"
        data = block.contiguous().view(-1).view(torch.uint8).numpy().data
        file.write(data)
        written += len(data)
    assert written == expected.nbytes, f"{name} has as many bytes as the header says"
