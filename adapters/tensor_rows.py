"""Rows of a tensor of a safetensors file, read when they are asked for. Knows no models.

They are copied, not mapped: pages that were looked at would count as this process's memory.
"""

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from adapters.errors import BaseNotFoundError
from adapters.fingerprint import StoredTensor
from adapters.memory import empty
from adapters.weights import DTYPES

BLOCK_WEIGHTS: Final = 2**20
"""Elements of a block: 4 MiB in float32."""
_ROWS_TOGETHER: Final = 64


@dataclass(frozen=True, slots=True)
class TensorRows:
    """A stored tensor, [N, …], of one of the types that `DTYPES` names."""

    stored: StoredTensor

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.stored.dtype]

    def read(self, rows: slice) -> Tensor:
        """Some rows, in the type they are stored in.

        Raises:
            BaseNotFoundError: the file became shorter.
        """
        stored = self.stored
        per_row = math.prod(stored.shape[1:])
        memory = empty((rows.stop - rows.start) * per_row, self.dtype, torch.device("cpu"))
        with stored.path.open("rb", buffering=0) as file:
            file.seek(stored.start + rows.start * per_row * self.dtype.itemsize)
            _fill(file, memory.view(torch.uint8).numpy().data, stored)
        return memory.view(-1, *stored.shape[1:])

    def blocks(self, *, whole: bool = False) -> Iterator[Tensor]:
        """All rows, in pieces as `row_blocks` cuts them; in one piece if `whole`."""
        shape = self.stored.shape
        for rows in [slice(0, shape[0])] if whole else row_blocks(shape):
            yield self.read(rows)


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Rows of some BLOCK_WEIGHTS elements, and of a multiple of 64, at which no quantisation block is cut."""
    per_row = max(1, math.prod(shape[1:]))
    step = max(1, BLOCK_WEIGHTS // per_row // _ROWS_TOGETHER) * _ROWS_TOGETHER
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def _fill(file: io.RawIOBase, memory: memoryview, stored: StoredTensor) -> None:
    filled = 0
    while filled < len(memory):  # a system reads 2 GiB at most at a time
        count = file.readinto(memory[filled:])
        if not count:
            raise BaseNotFoundError(f"{stored.path} ends in tensor {stored.name!r}; download the model again")
        filled += count
