"""Tensors out of an adapter's safetensors file: every bound is checked before anything is allocated.

Knows which tensors an adapter must have, not what is done with them. R rank, D in-features, O out-features.
"""

import io
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from adapters.errors import (
    AdapterCorruptError,
    AdapterError,
    InvalidAdapterError,
    UnsupportedAdapterError,
    raise_first,
)
from adapters.files import CONFIG_FILE, WEIGHTS_FILE, open_regular
from adapters.kinds import APPLIED, REFUSED_TENSORS
from adapters.layout import BaseLayout
from adapters.memory import empty
from adapters.spec import AdapterSpec
from adapters.strict_json import brief, parse_object

__all__ = ["CONFIG_FILE", "WEIGHTS_FILE", "LoraPair", "TensorInfo", "load_pairs", "read_header"]

MAX_HEADER_BYTES = 4 * 1024 * 1024  # 25 000 tensors with long names
_LENGTH_BYTES = 8
_MAX_DIMENSIONS = 8
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80")
_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies in its file, and how to read it.

    Attributes:
        dtype: as safetensors names it: "F32", "F16" or "BF16".
        offset: of its first byte, from the start of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class LoraPair:
    """The two factors of one module's update, as they were stored, not scaled: ΔW = scaling · b_OR @ a_RD."""

    a_RD: Tensor
    b_OR: Tensor


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file by name, without reading any; the file holds them and nothing else.

    Raises:
        InvalidAdapterError: reason BAD_HEADER or BAD_DTYPE, naming the tensor.
    """
    with open_regular(path) as file:
        return _read_header(file)


def load_pairs(path: Path, spec: AdapterSpec, layout: BaseLayout) -> dict[str, LoraPair]:
    """The factors of every module the specification targets, on the CPU, in the base's order.

    Raises:
        InvalidAdapterError: a tensor is missing, unknown, or of another shape; the message names it.
        UnsupportedAdapterError: a tensor belongs to a method that is not applied here.
        AdapterCorruptError: the file changed while it was read.
    """
    ranks = {module: rank for module, (rank, _) in spec.ranks_and_scalings(layout).items()}
    with open_regular(path) as file:
        header = _read_header(file)
        check_tensors(header, expected_tensors(spec, ranks, layout), layout)
        tensors = _read_tensors(file, header)
    return {
        module: LoraPair(a_RD=tensors[tensor_name(module, "A")], b_OR=tensors[tensor_name(module, "B")])
        for module in ranks
    }


def read_pairs(
    path: Path, header: Mapping[str, TensorInfo], modules: Iterable[str]
) -> Iterator[tuple[str, LoraPair]]:
    """The factors of one module after another, each read when it is its turn: only one is in memory.

    Args:
        header: of this file, with the tensors of all these modules in it: `check_tensors` passed.

    Raises:
        AdapterCorruptError: the file changed while it was read.
    """
    with open_regular(path) as file:
        for module in modules:
            # Without names for the tensors, which would keep them while the next ones are read.
            yield module, LoraPair(*(_read_tensor(file, header[tensor_name(module, each)]) for each in "AB"))


def expected_tensors(
    spec: AdapterSpec, ranks: Mapping[str, int], layout: BaseLayout
) -> dict[str, tuple[int, int]]:
    """Name and shape of every tensor of an adapter of this method, with these ranks by module."""
    kind = APPLIED[spec.method]
    return {
        f"{_PREFIX}{module}.{ending}": shape
        for module, rank in ranks.items()
        for ending, shape in kind.tensors(layout.modules[module], rank).items()
    }


def check_tensors(
    header: Mapping[str, TensorInfo], expected: Mapping[str, tuple[int, int]], layout: BaseLayout
) -> None:
    """Exactly the tensors that the configuration calls for, each of the shape that the base calls for.

    Raises:
        InvalidAdapterError, UnsupportedAdapterError: with every tensor that is wrong among its problems.
    """
    raise_first(_tensor_faults(header, expected, layout))


def tensor_name(module: str, factor: str) -> str:
    """PEFT's name for factor "A" or "B" of a module."""
    return f"{_PREFIX}{module}.lora_{factor}.weight"


def dtype_name(tensor: Tensor) -> str:
    """How safetensors names the tensor's type."""
    return _DTYPE_NAMES[tensor.dtype]


def _read_header(file: io.BufferedReader) -> dict[str, TensorInfo]:
    file_bytes = file.seek(0, 2)
    file.seek(0)
    prefix = file.read(_LENGTH_BYTES)
    if len(prefix) < _LENGTH_BYTES:
        _bad_header(f"it has {file_bytes} bytes; the length of the header alone takes {_LENGTH_BYTES}")
    (header_bytes,) = struct.unpack("<Q", prefix)
    if header_bytes > min(MAX_HEADER_BYTES, file_bytes - _LENGTH_BYTES):
        if prefix.startswith(_PICKLE_STARTS):
            _bad_header("it looks like a pickle, which is never read; save with safe_serialization=True")
        _bad_header(
            f"it announces a header of {header_bytes} bytes; the file has {file_bytes}, and a header may "
            f"have {MAX_HEADER_BYTES}"
        )
    raw = file.read(header_bytes)
    if not raw.startswith(b"{"):
        _bad_header("its header does not start with '{'")
    entries = parse_object(raw, source=f"the header of {WEIGHTS_FILE}", max_bytes=MAX_HEADER_BYTES)
    _check_metadata(entries.pop("__metadata__", {}))
    data_offset = _LENGTH_BYTES + header_bytes
    header = {name: _tensor_info(name, entry, data_offset) for name, entry in entries.items()}
    _check_contiguous(header, data_offset, file_bytes)
    return header


def _check_metadata(metadata: object) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _bad_header("__metadata__ must map strings to strings")


def _tensor_info(name: str, entry: Any, data_offset: int) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        _bad_header(f"tensor {brief(name)} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InvalidAdapterError(
            f"tensor {brief(name)} has dtype {brief(dtype)}; save the adapter as one of {', '.join(DTYPES)}",
            reason="BAD_DTYPE",
        )
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        _bad_header(f"tensor {brief(name)} has shape {brief(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        _bad_header(f"tensor {brief(name)} has data_offsets {brief(offsets)}")
    size_bytes = offsets[1] - offsets[0]
    if size_bytes != _product(shape) * DTYPES[dtype].itemsize:
        _bad_header(f"tensor {brief(name)} of shape {brief(shape)} and dtype {dtype} has {size_bytes} bytes")
    return TensorInfo(dtype, tuple(shape), data_offset + offsets[0], size_bytes)


def _are_sizes(values: Any) -> bool:
    """Whether this is a list of integers that fit in 64 bits, as in safetensors."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _product(shape: list[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _check_contiguous(header: Mapping[str, TensorInfo], data_offset: int, file_bytes: int) -> None:
    """Every byte after the header belongs to exactly one tensor."""
    end = data_offset
    for name, info in sorted(header.items(), key=lambda item: (item[1].offset, item[1].size_bytes)):
        if info.offset != end:
            _bad_header(
                f"tensor {brief(name)} starts at byte {info.offset}, not at {end}: an overlap or a gap"
            )
        end += info.size_bytes
    if end != file_bytes:
        _bad_header(f"its tensors end at byte {end}, the file at byte {file_bytes}; is it complete?")


def _tensor_faults(
    header: Mapping[str, TensorInfo], expected: Mapping[str, tuple[int, int]], layout: BaseLayout
) -> Iterator[AdapterError]:
    yield from (_unexpected(name, layout) for name in header if name not in expected)
    for name, shape in expected.items():
        if name not in header:
            yield InvalidAdapterError(
                f"tensor {name} is missing, though {CONFIG_FILE} targets its module", reason="MISSING_TENSOR"
            )
        elif header[name].shape != shape:
            yield InvalidAdapterError(
                f"tensor {name} is {list(header[name].shape)}; rank in {CONFIG_FILE} and the base's layer "
                f"call for {list(shape)}",
                reason="SHAPE_MISMATCH",
            )


def _unexpected(name: str, layout: BaseLayout) -> AdapterError:
    for part, refused in REFUSED_TENSORS.items():
        if part in name:
            return UnsupportedAdapterError(
                f"tensor {brief(name)} cannot be applied: {refused}", feature=part.strip(".")
            )
    module = name.removeprefix(_PREFIX).rpartition(".lora_")[0]
    if module in layout.modules:
        why = (
            f"{CONFIG_FILE} does not target its module, or it is not called …lora_A.weight or …lora_B.weight"
        )
    else:
        why = "this base has no such linear module"
    return InvalidAdapterError(f"unknown tensor {brief(name)}: {why}", reason="UNKNOWN_TENSOR")


def _read_tensors(file: io.BufferedReader, header: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
    """All tensors by name, in one piece of memory that is read at once."""
    in_order = sorted(header.items(), key=lambda item: (item[1].offset, item[1].size_bytes))
    sizes = [info.size_bytes for _, info in in_order]  # no gaps between them: the header was checked
    memory = _read_bytes(file, in_order[0][1].offset if in_order else 0, sum(sizes))
    pieces = torch.split(memory, sizes)
    return {name: _typed(piece, info) for (name, info), piece in zip(in_order, pieces, strict=True)}


def _read_tensor(file: io.BufferedReader, info: TensorInfo) -> Tensor:
    return _typed(_read_bytes(file, info.offset, info.size_bytes), info)


def _read_bytes(file: io.BufferedReader, offset: int, count: int) -> Tensor:
    memory = empty(count, torch.uint8, torch.device("cpu"))
    file.seek(offset)
    if file.readinto(memory.numpy().data) != count:
        raise AdapterCorruptError(f"{WEIGHTS_FILE} became shorter while it was read; publish it again")
    return memory


def _typed(piece: Tensor, info: TensorInfo) -> Tensor:
    dtype = DTYPES[info.dtype]
    if piece.storage_offset() % dtype.itemsize:  # a file of several types need not align them
        piece = piece.clone()
    return piece.view(dtype).view(info.shape)


def _bad_header(why: str) -> NoReturn:
    raise InvalidAdapterError(f"{WEIGHTS_FILE} is not a valid safetensors file: {why}", reason="BAD_HEADER")
