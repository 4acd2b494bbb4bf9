"""Large tensors without content. Knows no adapters."""

import numpy
import torch
from torch import Tensor


def empty(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[count], not initialised.

    On a CPU it comes from numpy, which asks the system for huge pages: filling 20 MB takes 1 ms, and 9 in
    pages of 4 KiB, nearly all of it page faults.
    """
    if device.type != "cpu":
        return torch.empty(count, dtype=dtype, device=device)
    return torch.from_numpy(numpy.empty(count * dtype.itemsize, dtype=numpy.uint8)).view(dtype)
