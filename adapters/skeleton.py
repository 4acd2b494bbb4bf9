"""Owns a base without its weights: its modules on torch's meta device, and where each weight lies.

What it is for is work on one weight at a time, in less memory than the base takes. Knows no adapters.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D

from adapters.base import Base, complete, describe, replace_conv1d
from adapters.cache import default_cache_dir
from adapters.errors import BaseModelError
from adapters.fingerprint import fingerprint_of, stored_tensors, weight_files
from adapters.quantize import Scheme, coded_modules, is_cut_exactly, recoded
from adapters.sources import resolve_source
from adapters.support import supported_config
from adapters.tensor_rows import TensorRows, row_blocks
from adapters.weights import DTYPES


class ScatteredError(BaseModelError):
    """A weight of the model is no single tensor of the source's files, or is in no form that is read."""


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A base and where its weights are.

    Attributes:
        base: as `adapters.base.dequantized_base` gives it, but its model has no data: all is on meta.
        tensors: for each name in the model's state dictionary what lies in the source; tied ones share it.
        coded: modules whose weights are quantised in the base.
        coded_dtype: the type from which they are quantised.
    """

    base: Base
    tensors: Mapping[str, TensorRows]
    coded: frozenset[str]
    coded_dtype: torch.dtype

    def blocks(self, name: str, *, dequantized: bool) -> Iterator[Tensor]:
        """A weight in float32, in blocks of its rows; a linear module's is [O, D], whatever the layer keeps.

        Args:
            name: in the model's state dictionary.
            dequantized: what it is in the base, once quantised; else what it is in the source.
        """
        module, _, kind = name.rpartition(".")
        blocks = self.tensors[name].blocks(whole=self._is_whole(name))
        if self.is_transposed(name):
            blocks = (block.T for block in blocks)
        if dequantized and kind == "weight" and module in self.coded:
            return recoded((block.to(self.coded_dtype) for block in blocks), self.base.scheme)
        return (block.float() for block in blocks)

    def _is_whole(self, name: str) -> bool:
        """Whether the weight comes in one block: it is transposed, and small then, or cannot be cut."""
        shape = self.base.layout.modules.get(name.removesuffix(".weight"))
        cut = shape is None or is_cut_exactly(shape.in_features, self.base.scheme)
        return not cut or self.is_transposed(name)

    def is_transposed(self, name: str) -> bool:
        """Whether the weight's layer keeps [D, O]."""
        module, _, kind = name.rpartition(".")
        return kind == "weight" and isinstance(self.base.model.get_submodule(module), Conv1D)


def skeleton_of(
    source: str, scheme: Scheme, *, cache_dir: Path | None = None, progress: bool = True
) -> Skeleton:
    """Finds a base and its weights, and reads none but for the fingerprint, once per machine.

    Args:
        source: as for `adapters.base.load_base`.

    Raises:
        ScatteredError: transformers makes this model's weights of several tensors, or of others than these.
        BaseModelError: as of `load_base`.
    """
    cache = cache_dir or default_cache_dir()
    found = resolve_source(source, cache, progress=progress)
    config = supported_config(found.folder)
    fingerprint = fingerprint_of(found.folder, scheme.name, cache)
    model, alike = empty_model(config), empty_model(config)
    for each in (model, alike):
        complete(each, found.folder)
    replace_conv1d(alike)  # as in a loaded base, whose layout is to be described
    meta, plain = torch.device("meta"), torch.float32
    base = describe(alike, found, fingerprint, scheme, meta, plain, plain, None)
    tensors = _tensors(model, found.folder)
    return Skeleton(
        base=replace(base, model=model),
        tensors=tensors,
        coded=frozenset() if scheme.quantization == "none" else coded_modules(config, scheme),
        coded_dtype=_coded_dtype(config, tensors, found.folder),
    )


def empty_model(config: Any) -> Any:
    """transformers' own float32 model of a configuration, all of it on torch's meta device."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    return model.eval().requires_grad_(False)


def _tensors(model: Any, folder: Path) -> dict[str, TensorRows]:
    """By transformers' own rules of names, which it is told are in use, so that it saves by them too."""
    expected: dict[str, Tensor] = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    stored = {tensor.name: tensor for path in weight_files(folder) for tensor in stored_tensors(path)}
    found: dict[str, TensorRows] = {}
    for key in sorted(stored, key=dot_natural_key):
        name, converter = rename_source_key(key, renamings, converters, model.base_model_prefix, expected)
        if name not in expected and key in expected:
            name, converter = rename_source_key(key, [], [], model.base_model_prefix, expected)
        if name not in expected:
            continue  # transformers leaves out what the model has no place for
        if converter is not None or name in found:
            raise ScatteredError(f"{folder.name}: transformers makes {name} of {key} and others")
        if stored[key].dtype not in DTYPES or stored[key].shape != expected[name].shape:
            raise ScatteredError(
                f"{folder.name}: {key} is {stored[key].dtype} {list(stored[key].shape)}, not floats of "
                f"{list(expected[name].shape)}"
            )
        found[name] = TensorRows(stored[key])
    model._weight_conversions = [each for each in transforms if each.was_used()]
    return _with_tied(model, found, folder)


def _with_tied(model: Any, found: dict[str, TensorRows], folder: Path) -> dict[str, TensorRows]:
    """All names of the model, those too whose weight is another's."""
    shared: dict[int, list[str]] = {}
    for name in model.state_dict():
        shared.setdefault(id(model.get_parameter_or_buffer(name)), []).append(name)
    complete: dict[str, TensorRows] = {}
    for names in shared.values():
        there = [found[name] for name in names if name in found]
        if not there or not all(_are_same(there[0], other) for other in there[1:]):
            raise ScatteredError(f"{folder.name} has {len(there)} tensors for {' and '.join(names)}")
        complete |= dict.fromkeys(names, there[0])
    if not all(tensor.stored.shape for tensor in complete.values()):
        raise ScatteredError(f"{folder.name} has a weight that is a single number")
    return complete


def _are_same(one: TensorRows, other: TensorRows) -> bool:
    if one.dtype != other.dtype:
        return False
    return all(torch.equal(one.read(rows), other.read(rows)) for rows in row_blocks(one.stored.shape))


def _coded_dtype(config: Any, tensors: Mapping[str, TensorRows], folder: Path) -> torch.dtype:
    """In which transformers loads what it then quantises: what config.json says, else what is stored."""
    if config.dtype is not None:
        stated: torch.dtype = getattr(torch, config.dtype) if isinstance(config.dtype, str) else config.dtype
        return stated
    stored = {tensor.dtype for tensor in tensors.values()}
    if len(stored) > 1:
        raise ScatteredError(f"{folder.name} has weights of several types, and none in its config.json")
    return stored.pop()
