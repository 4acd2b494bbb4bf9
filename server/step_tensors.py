"""The integers of a step on the device: one copy, at shapes that come back. Knows neither models nor queues.

T tokens, B sequences, M blocks of one sequence.

Steps that only decode are padded to a few numbers of rows and of blocks, and the tensors of such a shape are
the same ones every time: what is launched over them could be recorded once and replayed. Rows that pad belong
to nobody; they write to a block of their own and their logits are dropped.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from kernels.varlen import VarlenPlan
from server.batch import Batch, Row


@dataclass(frozen=True, slots=True)
class StepTensors:
    """What the model is called with.

    Attributes:
        ids_T, positions_T: of each token.
        rows_S: which tokens need logits; those past the batch's own are padding.
    """

    ids_T: Tensor
    positions_T: Tensor
    rows_S: Tensor
    plan: VarlenPlan


@dataclass(frozen=True, slots=True)
class _Shape:
    """Sizes of a step: tokens, sequences, logits, blocks of one sequence."""

    tokens: int
    rows: int
    samples: int
    blocks: int

    @property
    def sizes(self) -> list[int]:
        """Of ids, positions, slots, starts, lengths, logits' rows and tables, one behind the other."""
        return [*[self.tokens] * 3, self.rows + 1, self.rows, self.samples, self.rows * self.blocks]


class StepBuffers:
    """Memory for the tensors of a step, on the host and on the device; one thread, one step at a time."""

    def __init__(self, device: torch.device, block_tokens: int, spare_block: int) -> None:
        """
        Args:
            spare_block: of the cache, which no sequence has.
        """
        self._device, self._block_tokens, self._spare = device, block_tokens, spare_block
        self._kept: dict[_Shape, _Buffer] = {}

    def fill(self, batch: Batch) -> StepTensors:
        """The batch's tensors; valid until the next call."""
        decodes = all(row.is_decode for row in batch.rows)
        shape = self._shape_of(batch.rows, decodes)
        buffer = self._kept.get(shape) or _Buffer(shape, self._device)
        if decodes:
            self._kept[shape] = buffer
        return buffer.filled(self._numbers(batch.rows, shape), max(row.count for row in batch.rows))

    def _shape_of(self, rows: Items[Row], decodes: bool) -> _Shape:
        blocks = max(len(row.blocks(self._block_tokens)) for row in rows)
        samples = sum(row.samples for row in rows)
        if not decodes:
            return _Shape(sum(row.count for row in rows), len(rows), samples, blocks)
        padded = bucket(len(rows))
        return _Shape(padded, padded, padded, bucket(blocks))

    def _numbers(self, rows: Items[Row], shape: _Shape) -> list[int]:
        """All of the step's integers in the order of `_Shape.sizes`."""
        size, pad = self._block_tokens, shape.rows - len(rows)
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        tables: list[int] = []
        for row in rows:
            blocks = row.blocks(size)
            ids += row.sequence.token_ids[row.start : row.start + row.count]
            positions += row.positions
            slots += row.slots(size)
            tables += blocks + blocks[-1:] * (shape.blocks - len(blocks))
        starts = [*accumulate([row.count for row in rows] + [1] * pad, initial=0)]
        lengths = [row.start + row.count for row in rows] + [1] * pad
        spans = zip(starts[1:], rows, strict=False)
        ends = [at for end, row in spans for at in range(end - row.samples, end)]
        zeros, spare = [0] * pad, [self._spare * size] * pad
        ends += [0] * (shape.samples - len(ends))
        tables += [self._spare] * (pad * shape.blocks)
        return [*ids, *zeros, *positions, *zeros, *slots, *spare, *starts, *lengths, *ends, *tables]


class _Buffer:
    """One shape's memory: written on the host, copied at once, read in parts."""

    def __init__(self, shape: _Shape, device: torch.device) -> None:
        on_cuda = device.type == "cuda"
        total = sum(shape.sizes)
        self._host = torch.empty(total, dtype=torch.int32, pin_memory=on_cuda)
        self._memory = torch.empty(total, dtype=torch.int32, device=device)
        self._write_T = torch.empty(shape.tokens, dtype=torch.int64, device=device)
        self._copied = torch.cuda.Event() if on_cuda else None  # type: ignore[no-untyped-call]  # torch has no types here
        self._parts = torch.split(self._memory, shape.sizes)
        self._shape = shape

    def filled(self, numbers: list[int], max_queries: int) -> StepTensors:
        if self._copied is not None:
            self._copied.synchronize()  # of the step before, which ended long ago
        self._host.copy_(torch.tensor(numbers, dtype=torch.int32))
        self._memory.copy_(self._host, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        ids, positions, slots, starts, lengths, rows, tables = self._parts
        self._write_T.copy_(slots)
        plan = VarlenPlan(
            self._write_T, starts, lengths, tables.view(self._shape.rows, self._shape.blocks), max_queries
        )
        return StepTensors(ids, positions, rows, plan)


def bucket(count: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24 … that is not below a count."""
    power = 1 << max(0, count - 1).bit_length()
    return power * 3 // 4 if count <= power * 3 // 4 and power >= 4 else power
