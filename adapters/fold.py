"""Adds an adapter to the weights it was trained on, some rows at a time. Knows no server and no training.

The sum is of whatever rows are there, and the same bits come out however they are cut. DoRA,
IA³ and biases, which no server applies, are folded by adapters/unserved.py.

R rank, D in-features, O out-features.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapters.base import Base, dequantized_base
from adapters.bundle import Bundle, read_bundle
from adapters.errors import WrongBaseError
from adapters.files import CONFIG_FILE, WEIGHTS_FILE, read_bounded
from adapters.measures import in_digest_order, measure
from adapters.model_folder import untie
from adapters.quantize import Scheme, recoded
from adapters.spec import MAX_CONFIG_BYTES, parse_spec
from adapters.unserved import open_unserved
from adapters.weights import check_tensors, expected_tensors, read_header, read_pairs

Target = Literal["dequantized", "requantized", "original"]
"""What the sum is of: the base as the adapter knows it; the source's own weights, quantised or not."""


class Folding(Protocol):
    """An adapter that is being folded.

    Attributes:
        digest: the adapter's, "sha256:…".
        modules: how many layers change.
    """

    @property
    def digest(self) -> str: ...

    @property
    def modules(self) -> int: ...

    @property
    def delta_norm(self) -> float:
        """Frobenius norm of all that is added, once all weights were folded."""

    def folded(self, name: str, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        """A weight of the base with the adapter in it.

        Args:
            name: in the model's state dictionary.
            blocks: all its rows, in order, in float32; a linear module's weight is [O, D].
        """


class LowRankFolding:
    """What servers apply, read as they read it: W += scaling · B @ A; one pair of factors is in memory.

    In float64, where products of stored factors are exact, and rounded once. So the order of summation, which
    depends on processor and threads, hardly ever shows, and the sum has one fingerprint.

    Attributes: as of `Folding`.

    Raises:
        AdapterError: on construction: it is malformed, or does not fit the base.
    """

    def __init__(self, base: Base, folder: Path) -> None:
        self._file, layout = folder / WEIGHTS_FILE, base.layout
        spec = parse_spec(read_bounded(folder / CONFIG_FILE, MAX_CONFIG_BYTES))
        ranks_and_scalings = spec.ranks_and_scalings(layout)
        ranks = {module: rank for module, (rank, _) in ranks_and_scalings.items()}
        self._scalings = {module: scaling for module, (_, scaling) in ranks_and_scalings.items()}
        self._header = read_header(self._file)
        check_tensors(self._header, expected_tensors(spec, ranks, layout), layout)
        pairs = read_pairs(self._file, self._header, in_digest_order(ranks))
        measures = measure(spec, checked_bundle(folder, base), self._scalings, pairs)
        self.digest, self.modules, self.delta_norm = measures.digest, len(ranks), measures.delta_norm
        if layout.head in ranks:
            untie(base.model, base.model.get_submodule(layout.head))

    @torch.no_grad()
    def folded(self, name: str, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        """As of `Folding`."""
        module, _, kind = name.rpartition(".")
        if kind != "weight" or module not in self._scalings:
            yield from blocks
            return
        ((_, pair),) = read_pairs(self._file, self._header, [module])
        a_RD, b_OR, start = pair.a_RD.double(), pair.b_OR.double(), 0
        for block_OD in blocks:
            stop = start + len(block_OD)
            delta_OD = (b_OR[start:stop] @ a_RD).mul_(self._scalings[module])
            yield delta_OD.add_(block_OD).float()
            start = stop


def base_to_fold_into(
    source: str, scheme: Scheme, *, as_source: bool, cache_dir: Path | None = None, progress: bool = True
) -> Base:
    """A base in float32, in transformers' own layers; fingerprint and scheme are of the one trained on.

    Args:
        as_source: whether its weights are the source's own, and not what their quantisation left of them.

    Raises:
        BaseModelError: it cannot be read.
    """
    base = dequantized_base(
        source,
        quantization=scheme.quantization,
        double_quantization=scheme.double,
        cache_dir=cache_dir,
        progress=progress,
    )
    if not as_source:
        return base
    original = dequantized_base(source, quantization="none", cache_dir=cache_dir, progress=progress)
    return replace(base, model=original.model)


def checked_bundle(folder: Path, base: Base) -> Bundle | None:
    """An adapter's manifest; None if it has none.

    Raises:
        WrongBaseError: it says that the adapter was trained on another base, or another quantisation of it.
        AdapterError: it cannot be read.
    """
    bundle = read_bundle(folder)
    if bundle is not None and bundle.base_fingerprint != base.fingerprint:
        raise WrongBaseError(
            f"{folder} was trained on base {bundle.base_fingerprint}; {base.name} as {base.scheme.name} is "
            f"{base.fingerprint}; give the base and quantisation it was trained on"
        )
    return bundle


def open_folding(base: Base, folder: Path) -> Folding:
    """Reads an adapter of any kind that can be folded, and checks all of it.

    Args:
        base: its model may be without data; its head gets a weight of its own if the adapter changes it.

    Raises:
        AdapterError: it is malformed, cannot be folded, or does not fit the base.
    """
    checked_bundle(folder, base)
    return open_unserved(base, folder) or LowRankFolding(base, folder)


def folded_blocks(
    base: Base, folding: Folding, into: Target, name: str, blocks: Iterable[Tensor]
) -> Iterator[Tensor]:
    """As `Folding.folded`, and quantised where that is wanted; the head is quantised in no base."""
    after = folding.folded(name, blocks)
    module, _, kind = name.rpartition(".")
    is_coded = kind == "weight" and module in base.layout.modules and module != base.layout.head
    return recoded(after, base.scheme) if into == "requantized" and is_coded else after


@torch.no_grad()
def fold_in_place(base: Base, folding: Folding, into: Target) -> None:
    """Folds an adapter into base.model, dequantised, in transformers' own float32 layers."""
    for name, parameter in base.model.named_parameters():
        layer = base.model.get_submodule(name.rpartition(".")[0])
        before = oriented(parameter.data, layer)
        after = torch.cat(list(folded_blocks(base, folding, into, name, [before])))
        parameter.data.copy_(oriented(after, layer))


def fold_folder(base: Base, folder: Path) -> Folding:
    """Folds an adapter folder into base.model, in place.

    Args:
        base: dequantised, its model in transformers' own float32 layers.

    Raises:
        AdapterError: it is malformed, cannot be folded, or does not fit the base.
    """
    folding = open_folding(base, folder)
    fold_in_place(base, folding, "dequantized")
    return folding


def oriented(weight: Tensor, layer: nn.Module) -> Tensor:
    """Between [O, D] and what the layer keeps; a bias is as it is."""
    return weight.T if isinstance(layer, Conv1D) and weight.ndim == 2 else weight
