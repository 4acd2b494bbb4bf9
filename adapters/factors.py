"""An adapter's factors in one piece of memory, in the type and order in which they are applied.

Knows neither the store nor slots. R rank, D in-features, O out-features.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.facts import AdapterFacts
from adapters.layout import BaseLayout
from adapters.memory import empty
from adapters.spec import AdapterSpec
from adapters.weights import LoraPair
from kernels.lora import LoraFactors

_ALIGNMENT_BYTES = 64
"""Of every factor: a cache line of a CPU, and more than a GPU's vector loads ask for."""


@dataclass(frozen=True, slots=True)
class AdapterFactors:
    """All factors of one adapter, one behind the other, so that they move in one copy.

    Attributes:
        memory: holds them, and nothing else holds it.
        by_module: views of it: a_RD, and b_OR transposed to b_RO.
    """

    memory: Tensor
    by_module: Mapping[str, LoraFactors]

    def moved_to(self, memory: Tensor) -> "AdapterFactors":
        """The same in other memory, which has the same content."""
        shapes = [tuple(f.shape) for pair in self.by_module.values() for f in (pair.a_RD, pair.b_RO)]
        scalings = {module: pair.scaling for module, pair in self.by_module.items()}
        return AdapterFactors(memory, _by_module(scalings, _places(memory, shapes)))


def read_factors(
    pairs: Mapping[str, LoraPair], spec: AdapterSpec, dtype: torch.dtype, *, page_locked: bool
) -> AdapterFactors:
    """Stored factors, converted, in memory of the host.

    One allocation and one call that copies, so that a load keeps the interpreter from others for as short as
    can be.

    Args:
        page_locked: so that a GPU can fetch them by itself.
    """
    sources = [factor for pair in pairs.values() for factor in (pair.a_RD, pair.b_OR.t())]
    shapes = [tuple(source.shape) for source in sources]
    memory = host_memory(sum(_padded_sizes(shapes, dtype)), dtype, page_locked=page_locked)
    places = _places(memory, shapes)
    torch._foreach_copy_(places, sources)
    return AdapterFactors(memory, _by_module({module: spec.scaling_of(module) for module in pairs}, places))


def host_memory(count: int, dtype: torch.dtype, *, page_locked: bool) -> Tensor:
    """[count], not initialised."""
    if page_locked:
        return torch.empty(count, dtype=dtype, pin_memory=True)
    return empty(count, dtype, torch.device("cpu"))


def bytes_of(facts: AdapterFacts, layout: BaseLayout, dtype: torch.dtype) -> int:
    """Of an adapter's factors, known before they are read; padding is counted as if there were most of it."""
    parameters = facts.parameter_count * dtype.itemsize
    shapes = [layout.modules[name] for name in facts.matched_modules if name in layout.modules]
    features = [count for shape in shapes for count in (shape.in_features, shape.out_features)]
    uneven = sum(1 for count in features if count * dtype.itemsize % _ALIGNMENT_BYTES)
    return parameters + uneven * (_ALIGNMENT_BYTES - dtype.itemsize)


def _padded_sizes(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[int]:
    step = _ALIGNMENT_BYTES // dtype.itemsize
    return [-(-rows * columns // step) * step for rows, columns in shapes]


def _places(memory: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Tensors of these shapes, one behind the other."""
    pieces = torch.split(memory, _padded_sizes(shapes, memory.dtype))
    return [
        piece[: rows * columns].view(rows, columns)
        for piece, (rows, columns) in zip(pieces, shapes, strict=True)
    ]


def _by_module(scalings: Mapping[str, float], places: list[Tensor]) -> dict[str, LoraFactors]:
    return {
        module: LoraFactors(a_RD=a_RD, b_RO=b_RO, scaling=scaling)
        for (module, scaling), a_RD, b_RO in zip(scalings.items(), places[::2], places[1::2], strict=True)
    }
