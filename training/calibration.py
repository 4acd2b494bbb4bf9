"""Owns the measurement of this machine's processor that plans stand on. Knows no base but by its shape."""

import time
from collections.abc import Callable
from typing import Final

import torch

from training.pace import Device
from training.shape import ModelShape

_MEASURED_ROWS: Final = 512
_REPEATS: Final = 5


def measured_cpu(shape: ModelShape, product_bytes: int, memory_bytes: int) -> Device:
    """This machine's processor, by products of the shape's own widths; takes well under two seconds."""
    dtype = torch.bfloat16 if product_bytes == 2 else torch.float32
    x_TH = torch.ones(_MEASURED_ROWS, shape.hidden, dtype=dtype)
    weight_IH = torch.ones(shape.inner, shape.hidden, dtype=dtype)
    y_TI = torch.ones(_MEASURED_ROWS, shape.inner)
    product_s = _fastest_s(lambda: torch.nn.functional.linear(x_TH, weight_IH))
    pass_s = _fastest_s(lambda: torch.nn.functional.silu(y_TI))
    return Device(
        name="cpu",
        place="cpu",
        memory_bytes=memory_bytes,
        operations_per_s=2.0 * _MEASURED_ROWS * shape.hidden * shape.inner / product_s,
        activation_bytes_per_s=2.0 * y_TI.nbytes / pass_s,
        estimated=False,
    )


def _fastest_s(work: Callable[[], object]) -> float:
    return min(_seconds(work) for _ in range(_REPEATS))


def _seconds(work: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s
