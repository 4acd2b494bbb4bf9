"""Folds into a model's weights what no server applies: DoRA, IA³ and biases. Knows no server.

What such a folder may hold adapters/unserved_folder.py checks. PEFT then does the arithmetic, in float32,
some rows of one layer at a time.

O out-features, D in-features.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapters.base import Base
from adapters.files import CONFIG_FILE, WEIGHTS_FILE
from adapters.model_folder import untie
from adapters.skeleton import empty_model
from adapters.unserved_folder import biases_to_change, load_modules, read_unserved, unserved_kind
from adapters.wrapping import wrapped

_PREFIX: Final = "base_model.model."
_ADAPTER: Final = "default"


def open_unserved(base: Base, folder: Path) -> "PeftFolding | BiasFolding | None":
    """The adapter, ready to be folded; None if it is of a kind that this module does not know.

    Args:
        base: its model may be without data; its head gets a weight of its own if the adapter changes it.

    Raises:
        InvalidAdapterError, UnsupportedAdapterError: it is of such a kind, and malformed.
    """
    if unserved_kind(folder) in ("prefix", "prompt"):  # there is no weight to fold them into
        return None
    adapter = read_unserved(folder)
    if adapter is None:
        return None
    if adapter.kind == "biases":
        return BiasFolding(unserved_digest(folder), base, adapter.tensors)
    return PeftFolding(unserved_digest(folder), base, adapter.peft, adapter.tensors)


def unserved_digest(folder: Path) -> str:
    """ "sha256:…" over the bytes of such a folder's two files."""
    content = hashlib.sha256()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        content.update((folder / name).read_bytes())
    return f"sha256:{content.hexdigest()}"


class BiasFolding:
    """Biases in the places of the base's.

    Attributes:
        digest: "sha256:…" of the adapter's files.
        modules: how many change.
    """

    def __init__(self, digest: str, base: Base, tensors: Mapping[str, Tensor]) -> None:
        biases_to_change(base, tensors)
        self.digest, self.modules = digest, len(tensors)
        self._tensors = tensors
        self._squares = dict.fromkeys(tensors, 0.0)

    @property
    def delta_norm(self) -> float:
        """Frobenius norm of all that was changed so far."""
        return math.sqrt(sum(self._squares.values()))

    def folded(self, name: str, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        """As of `adapters.fold.Folding`."""
        if name not in self._tensors:
            yield from blocks
            return
        start = 0
        for block in blocks:
            trained = self._tensors[name][start : start + len(block)].float()
            start += len(block)
            self._squares[name] += _square(trained - block)
            yield trained


class PeftFolding:
    """What PEFT merges: DoRA and IA³.

    Attributes: as of `BiasFolding`.
    """

    def __init__(self, digest: str, base: Base, config: Any, tensors: Mapping[str, Tensor]) -> None:
        adapted = wrapped(empty_model(base.model.config), config, empty=True)
        _give_data(adapted)
        load_modules(adapted, tensors)
        self._layers: dict[str, Any] = {
            name.removeprefix(_PREFIX): module
            for name, module in adapted.named_modules()
            if isinstance(module, BaseTunerLayer) and hasattr(module, "merge")
        }
        self.digest, self.modules = digest, len(self._layers)
        self._squares = dict.fromkeys(self._layers, 0.0)
        if base.layout.head in self._layers:
            untie(base.model, base.model.get_output_embeddings())

    @property
    def delta_norm(self) -> float:
        """Frobenius norm of all weights' change so far; biases, which IA³ scales too, do not count."""
        return math.sqrt(sum(self._squares.values()))

    @torch.no_grad()
    def folded(self, name: str, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        """As of `adapters.fold.Folding`."""
        module, _, kind = name.rpartition(".")
        layer = self._layers.get(module)
        if layer is None:
            yield from blocks
        elif kind == "weight":
            yield from self._weights(module, layer, blocks)
        else:
            yield _merged_bias(layer, torch.cat(list(blocks)))

    def _weights(self, module: str, layer: Any, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        per_output = _per_output(layer)
        if per_output is None:
            blocks, per_output = [torch.cat(list(blocks))], []
        whole, start = [parameter.data for parameter in per_output], 0
        for block in blocks:
            rows = slice(start, start := start + len(block))
            for parameter, data in zip(per_output, whole, strict=True):
                parameter.data = data[rows]
            merged = _merged_weight(layer, block)
            self._squares[module] += _square(merged - block)
            yield merged
        for parameter, data in zip(per_output, whole, strict=True):
            parameter.data = data


def _give_data(adapted: nn.Module) -> None:
    """To what the adapter brings; the base's own weights stay without."""
    for module in adapted.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad:
                setattr(module, name, nn.Parameter(torch.empty(parameter.shape)))


def _per_output(layer: Any) -> list[nn.Parameter] | None:
    """What of an adapted layer has a row for each of its outputs, if its rows can be merged by themselves."""
    if _ADAPTER in getattr(layer, "lora_B", ()):
        return [layer.lora_B[_ADAPTER].weight, layer.lora_magnitude_vector[_ADAPTER].weight]
    if _ADAPTER in getattr(layer, "ia3_l", ()):
        return [] if layer.is_feedforward else [layer.ia3_l[_ADAPTER]]
    return None


def _merged_weight(layer: Any, weight_OD: Tensor) -> Tensor:
    """Leaves the weight that it is given as it was."""
    inner, transposed = layer.get_base_layer(), isinstance(layer.get_base_layer(), Conv1D)
    kept = weight_OD.T.contiguous() if transposed else weight_OD.clone()
    inner.weight, bias = nn.Parameter(kept, requires_grad=False), getattr(inner, "bias", None)
    if bias is not None:
        inner.bias = None  # it has no data, and is merged by itself
    _merge(layer)
    if bias is not None:
        inner.bias = bias
    merged: Tensor = inner.weight.detach()
    return merged.T if transposed else merged


def _merged_bias(layer: Any, bias_O: Tensor) -> Tensor:
    """IA³ scales the bias of a layer whose output it scales; DoRA leaves every bias as it is."""
    if _ADAPTER not in getattr(layer, "ia3_l", ()):
        return bias_O
    inner = layer.get_base_layer()
    shape = (0, len(bias_O)) if isinstance(inner, Conv1D) else (len(bias_O), 0)
    if layer.is_feedforward:
        return bias_O
    inner.weight = nn.Parameter(torch.empty(shape), requires_grad=False)
    inner.bias = nn.Parameter(bias_O.clone(), requires_grad=False)
    _merge(layer)
    merged: Tensor = inner.bias.detach()
    return merged


def _merge(layer: Any) -> None:
    layer.merge()
    layer.merged_adapters.clear()  # more rows will follow


def _square(change: Tensor) -> float:
    return float(change.double().square().sum())
