"""Owns writing a GGUF file: header first, then one tensor after another. Knows no models and no adapters.

A tensor is in memory only while it is written, and a file appears when it is complete.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import gguf
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from adapters.cache import publish_file
from adapters.errors import BaseModelError

GgufType = Literal["f32", "f16", "bf16", "q8_0"]

_TYPES: Final = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
}
_LARGEST: Final = {
    _TYPES["f32"]: torch.finfo(torch.float32).max,
    _TYPES["f16"]: torch.finfo(torch.float16).max,
    _TYPES["bf16"]: torch.finfo(torch.bfloat16).max,
    _TYPES["q8_0"]: torch.finfo(torch.float16).max * 127,  # of a block's scale, times its largest integer
}
_FILE_TYPES: Final = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One to be written.

    Attributes:
        read: gives it, of this shape, when it is its turn.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> "GgufTensor":
        """One that is in memory already."""
        return cls(name, tuple(tensor.shape), lambda: tensor)


def write_gguf(
    out: Path,
    architecture: str,
    tensors: Iterable[GgufTensor],
    describe: Callable[[Any], None],
    *,
    to: GgufType,
    progress: bool,
) -> None:
    """Writes a file that appears complete or not at all.

    Args:
        describe: adds the metadata to a gguf.GGUFWriter.
        to: of the matrices; vectors stay in float32, and rows that are no whole number of q8_0's blocks
            become f16.

    Raises:
        BaseModelError: a value is not finite, or too large for the type.
    """

    def write(path: Path) -> None:
        writer = gguf.GGUFWriter(path, architecture)
        try:
            describe(writer)
            writer.add_file_type(_FILE_TYPES[to])
            if to == "q8_0":
                writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            _write(writer, list(tensors), to, progress=progress)
        except OSError as error:
            if error.errno is not None:
                raise
            raise OSError(f"{out} cannot be written ({error}); is the disk full?") from error  # numpy's
        finally:
            writer.close()

    publish_file(out, write)


def _write(writer: Any, tensors: list[GgufTensor], to: GgufType, *, progress: bool) -> None:
    for tensor in tensors:
        kind = _type(tensor.shape, to)
        shape, size = gguf.quant_shape_to_byte_shape(tensor.shape, kind), _size(tensor.shape, kind)
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tqdm(tensors, desc="gguf", unit="tensor", disable=not progress):
        writer.write_tensor_data(_encoded(tensor, _type(tensor.shape, to)))


def _type(shape: tuple[int, ...], to: GgufType) -> Any:
    if len(shape) < 2:
        return _TYPES["f32"]
    block, _ = gguf.GGML_QUANT_SIZES[_TYPES[to]]
    return _TYPES[to] if shape[-1] % block == 0 else _TYPES["f16"]


def _size(shape: tuple[int, ...], kind: Any) -> int:
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    return int(math.prod(shape) // block * block_bytes)


def _encoded(tensor: GgufTensor, kind: Any) -> Any:
    values = tensor.read().to(torch.float32)
    assert tuple(values.shape) == tensor.shape, "as announced"
    if not bool((values.abs() <= _LARGEST[kind]).all()):  # NaN is not either
        raise BaseModelError(
            f"{tensor.name} has values that are no numbers or too large for {kind.name.lower()}; "
            "f32 takes all numbers"
        )
    return gguf.quantize(values.contiguous().numpy(), kind).view(np.uint8)
