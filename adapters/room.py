"""Whether a base can fit into the memory that is free, before it is loaded. Knows no model.

What it is told to need is a lower bound, of the weights alone: a base that passes may still not fit, one that
does not pass cannot.
"""

import math
from pathlib import Path
from typing import Final

import torch

from adapters import host_memory
from adapters.errors import BaseTooLargeError
from adapters.fingerprint import stored_tensors, weight_files
from adapters.quantize import Quantization

_GIB: Final = 2**30
_LEAST_BITS: Final = {"nf4": 4, "fp4": 4, "int8": 8, "none": 16}
"""Of a weight in memory, whatever the type of the file."""


def memory_free_on(device: torch.device) -> int:
    """Bytes that a device has left now; for a CPU what the host can give without swapping."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return host_memory.now().available_bytes


def check_fits(folder: Path, quantization: Quantization, device: torch.device) -> None:
    """
    Raises:
        BaseTooLargeError: the weights alone need more than is free.
        BaseNotFoundError: the folder has no readable weights.
    """
    weights = sum(math.prod(each.shape) for path in weight_files(folder) for each in stored_tensors(path))
    needed, free = weights * _LEAST_BITS[quantization] // 8, memory_free_on(device)
    if needed > free:
        remedy = "free some, or take a smaller base"
        if quantization == "none":
            remedy += ", or quantization nf4"
        raise BaseTooLargeError(
            f"{folder} has {weights / 1e9:.1f} billion weights, which need at least {needed / _GIB:.1f} GiB "
            f"of {device.type} memory, and {free / _GIB:.1f} GiB are free; {remedy}"
        )
