"""An adapter's factors in one piece of device memory, in the type and order in which they are applied.

Knows neither the store nor slots.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from adapters.memory import empty
from adapters.spec import AdapterSpec
from adapters.weights import LoraPair
from kernels.lora import LoraFactors

_ALIGNMENT_BYTES = 64
"""Of every factor: a cache line of a CPU, and more than a GPU's vector loads ask for."""


def device_factors(
    pairs: Mapping[str, LoraPair], spec: AdapterSpec, device: torch.device, dtype: torch.dtype
) -> dict[str, LoraFactors]:
    """By module: a_RD, and b_OR transposed to b_RO.

    One allocation and one call that copies, so that a load keeps the interpreter from others for as short as
    can be.
    """
    sources = [factor for pair in pairs.values() for factor in (pair.a_RD, pair.b_OR.t())]
    places = _places([tuple(source.shape) for source in sources], device, dtype)
    torch._foreach_copy_(places, sources)
    return {
        module: LoraFactors(a_RD=a_RD, b_RO=b_RO, scaling=spec.scaling_of(module))
        for module, a_RD, b_RO in zip(pairs, places[::2], places[1::2], strict=True)
    }


def _places(shapes: list[tuple[int, ...]], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Tensors of these shapes, one behind the other."""
    step = _ALIGNMENT_BYTES // dtype.itemsize
    sizes = [-(-rows * columns // step) * step for rows, columns in shapes]
    memory = empty(sum(sizes), dtype, device)
    pieces = torch.split(memory, sizes)
    return [
        piece[: rows * columns].view(rows, columns)
        for piece, (rows, columns) in zip(pieces, shapes, strict=True)
    ]
