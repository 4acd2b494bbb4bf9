"""Large tensors without content, and how it shows that there is no memory for one. Knows no adapters."""

import numpy
import torch
from torch import Tensor

_ALLOCATION_FAILED = ("can't allocate memory", "not enough memory")


def empty(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[count], not initialised.

    On a CPU it comes from numpy, which asks the system for huge pages: filling 20 MB takes 1 ms, and 9 in
    pages of 4 KiB, nearly all of it page faults.
    """
    if device.type != "cpu":
        return torch.empty(count, dtype=dtype, device=device)
    return torch.from_numpy(numpy.empty(count * dtype.itemsize, dtype=numpy.uint8)).view(dtype)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a device or on the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # torch's allocator on a CPU raises nothing more special.
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _ALLOCATION_FAILED)
